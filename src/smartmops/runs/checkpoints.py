"""Where a killed run goes on: its newest whole checkpoint. Knows files; knows no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .folder import Run, check_adapter


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one torn by a kill (no `trainer_state.json`, which comes last) is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text())
            check_adapter(found[-1])
            return found[-1]
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
    return None


def rewound(run: Run) -> Path | None:
    """The checkpoint to go on from; what was logged after it is discarded."""
    checkpoint = last_checkpoint(run.checkpoints)
    run.rewind(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    return checkpoint
