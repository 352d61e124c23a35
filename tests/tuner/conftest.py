"""One thread for models this small (a second one only costs), and prompts that nobody attends to."""

from __future__ import annotations

import pytest
import torch
from by_hand import HIDE


@pytest.fixture
def masked_out(monkeypatch):
    """Every prompt, expert or recovery, is hidden from every token."""
    from smartmops.tuner.passage import Passage

    put = Passage.put
    monkeypatch.setattr(Passage, "put", lambda self, kv, bias: put(self, kv, torch.full_like(bias, HIDE)))
