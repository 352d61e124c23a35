"""Flower's SuperNode without its pauses: it asks for work four times a second, not every 3 s, and calls a missing server every second.

What it says, and to whom, is its own. Started as a program, by `test_federation.py`.
"""

from __future__ import annotations

import sys
import time

from flwr.supercore.retry import http_retry
from flwr.supernode.cli import flower_supernode

ASKING, CALLING = 0.25, 1  # seconds

if __name__ == "__main__":
    pause = time.sleep
    time.sleep = lambda seconds: pause(min(seconds, ASKING))
    http_retry.MAX_RETRY_DELAY = CALLING
    sys.argv[0] = "flower-supernode"
    sys.exit(flower_supernode())
