"""What a launcher's environment asks for and cannot have, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from smartmops.flow.trainer import TrainConfig, train
from smartmops.runs import ranks


@pytest.mark.parametrize("name", ranks.SHARDING)
def test_a_launcher_that_would_shard_the_base_is_refused(
    name: str, config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    ranks.join()  # of one process nothing is sharded
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"{name}=true: .* launch it with torchrun"):
        train(config(model=str(tmp_path / "none"), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
