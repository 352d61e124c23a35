"""Two processes over gloo, each with half of the base (FSDP2 through HF's Trainer), train what one does with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharding
import torch
from safetensors.torch import load_file

import tiny_models


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes have written, and what each found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(Path(each.__file__).parent) for each in (sharding, tiny_models)]
    there = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([*command, sharding.__file__, str(folder)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": there})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", sharding.CASES)
def test_a_sharded_base_trains_the_adapter_that_a_whole_one_does(
    case: str, two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, found = two
    want = sharding.trained(case, tmp_path)
    for rank in found:
        assert rank[case]["losses"] == pytest.approx(want["losses"], rel=1e-4)
        assert rank[case]["whole"] == [], "every weight, of base and adapter, lies in two parts"
        assert rank[case]["answer"] == want["answer"]
    got, wanted = (load_file(each / case / "adapter" / "adapter_model.safetensors") for each in (folder, tmp_path))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=f"{case}: {name}")


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in two[1]:
        assert rank["again"]["losses"] == pytest.approx(rank[sharding.KEPT]["losses"], rel=1e-6)
