"""What a process that computes sets for itself before torch is loaded. Knows names of commands, and no options."""

from __future__ import annotations

import ctypes
import os
import sys

# One of them set by the user says how threads wait, and is left as it is.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
GENERATING = ("generate", "chat", "serve")
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt's names for its settings, from glibc's malloc.h
ALLOCATING = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def start(command: str | None) -> None:
    """For a command that trains: let threads sleep where they wait for each other, and keep memory for the next step.

    OpenMP reads its settings when it is loaded, so this comes before torch. By default a thread that has nothing to do
    spins, and so uses up the time that it is given on a shared core just before it is wanted; its sleep leaves it that
    time. Commands that generate wait for each other far more often, and keep spinning.
    """
    if command in GENERATING:
        return
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    keep_memory()


def keep_memory() -> None:
    """Have glibc keep what is freed rather than hand it back and fault it in again at every step; nothing elsewhere.

    As MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ do, which must stand in the environment before a process.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt") or any(name in os.environ for name in ALLOCATING):
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, -1)
