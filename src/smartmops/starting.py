"""What a process that computes sets for itself before torch is loaded. Knows names of commands, and no options."""

from __future__ import annotations

import os
import sys

# One of them set by the user says how threads wait, and is left as it is.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
GENERATING = ("generate", "chat", "serve")
# Looks at a barrier before a thread sleeps: about as long as small products are apart, far from a share of a core.
SPINS = 500


def start(command: str | None) -> None:
    """For a command that trains: let threads soon sleep where they wait, in this process and its children.

    OpenMP reads its settings when it is loaded, so this comes before torch. By default a thread that has nothing to do
    spins, and so uses up the time that it is given on a shared core just before it is wanted; its sleep leaves it that
    time. Commands that generate wait for each other far more often, and keep spinning.
    """
    settled = "torch" in sys.modules or any(name in os.environ for name in WAITING)
    if command not in GENERATING and not settled:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)  # counts for more, where OpenMP is GNU's
