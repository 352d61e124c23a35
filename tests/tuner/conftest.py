"""One thread for models this small (a second one only costs), and prompts that nobody attends to."""

from __future__ import annotations

import pytest
import torch
from by_hand import HIDE


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def masked_out(monkeypatch):
    """Every prompt, expert or recovery, is hidden from every token."""
    from smartmops.tuner.attention import Passage

    put = Passage.put
    monkeypatch.setattr(Passage, "put", lambda self, kv, bias: put(self, kv, torch.full_like(bias, HIDE)))
