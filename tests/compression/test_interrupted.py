"""What a kill or a full disk leaves of a compression: nothing that loads, and all that is needed to go on."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from kill import Killed, kill_at_solve
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smartmops.checks.errors import BaseModelError, SmartmopsError
from smartmops.compression import compress as module
from smartmops.compression.compress import compress
from smartmops.compression.solvers import SOLVERS, sparsegpt


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "compression.json").read_text())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each solved module."""
    solves: list[int] = []
    monkeypatch.setitem(SOLVERS, "sparsegpt", lambda *args: [sparsegpt(*args), solves.append(1)][0])
    return solves


def assert_nothing_loads(partial: Path) -> None:
    """Neither from the folder of what is half done nor from any folder in it."""
    for folder in [partial, *(each for each in partial.rglob("*") if each.is_dir())]:
        with pytest.raises((OSError, ValueError, SafetensorError)):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("solve", [1, 10, 21])
def test_a_killed_compression_goes_on_to_the_same_bytes(
    solve: int, configured: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    kill_at_solve(monkeypatch, solve)
    with pytest.raises(Killed):
        compress(configured(out))
    assert not out.exists()
    assert_nothing_loads(tmp_path / "out.partial")
    solves = counted(monkeypatch)
    compress(configured(out, resume=True))
    assert len(solves) == 21 - (solve - 1) // 7 * 7
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert record(out)["layers"] == record(whole)["layers"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="nf4 needs bitsandbytes, which is not installed")
def test_a_compression_killed_while_quantising_goes_on(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    compress(configured(tmp_path / "whole", pattern="2:4", nf4=True))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "_quantise", killed)
        compress(configured(tmp_path / "out", pattern="2:4", nf4=True))
    solves = counted(monkeypatch)
    compress(configured(tmp_path / "out", pattern="2:4", nf4=True, resume=True))
    assert solves == []
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


@pytest.fixture
def killed(configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a compression was killed in its second layer."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_solve(patch, 10)
        compress(configured(tmp_path / "out"))
    return tmp_path / "out"


@pytest.mark.parametrize("changes", [
    dict(pattern="4:8"), dict(seed=1), dict(sequences=8), dict(damping=0.1), dict(method="wanda"), dict(data_seed=1),
    dict(block_size=64), dict(sequence_length=16),
], ids=str)  # fmt: skip
def test_going_on_with_another_argument_is_refused(changes: dict[str, Any], killed: Path, configured: Any) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(FileExistsError, match=f"was begun with {name}=.*, but now {name}={value!r} is asked for"):
        compress(configured(killed, resume=True, **changes))


def test_going_on_with_another_model_of_the_same_name_is_refused(
    configured: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_solve(patch, 10)
        compress(configured(tmp_path / "out", model=str(base)))
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(base)
    with pytest.raises(FileExistsError, match="was begun with files="):
        compress(configured(tmp_path / "out", model=str(base), resume=True))


def test_going_on_with_another_text_of_the_same_name_is_refused(
    configured: Any, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(shutil.copy(prose, tmp_path / "prose.txt"))
    given = {"calibration": str(text)}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_solve(patch, 10)
        compress(configured(tmp_path / "out", **given))
    text.write_text(prose.read_text().replace("river", "house"))
    said = rf"out\S* was begun with another text of --calibration {text} \(fingerprint \w{{32}}, now \w{{32}}\): bring"
    with pytest.raises(FileExistsError, match=said):
        compress(configured(tmp_path / "out", resume=True, **given))
    text.write_text(prose.read_text())
    compress(configured(tmp_path / "out", resume=True, **given))
    text.write_text(prose.read_text().replace("river", "house"))
    with pytest.raises(FileExistsError, match=said):
        compress(configured(tmp_path / "out", resume=True, **given))


def test_a_compression_begun_before_the_text_was_kept_goes_on(killed: Path, configured: Any) -> None:
    file = killed.with_name("out.partial") / "state.json"
    known = json.loads(file.read_text())
    del known[module.TEXT]
    file.write_text(json.dumps(known))
    assert compress(configured(killed, resume=True))["sparsity"] == 0.5


@pytest.mark.parametrize("error", [BaseModelError("mend this"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_the_user_has_to_mend_before_a_layer_is_done_leaves_nothing(
    error: Exception, configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(SmartmopsError):
        patch.setitem(SOLVERS, "sparsegpt", fails)
        compress(configured(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    assert compress(configured(tmp_path / "out", damping=0.1))["sparsity"] == 0.5


def test_batch_size_may_change_on_the_way(killed: Path, configured: Any) -> None:
    assert compress(configured(killed, resume=True, batch_size=8))["sparsity"] == 0.5


def test_an_unfinished_compression_is_not_begun_again(killed: Path, configured: Any) -> None:
    with pytest.raises(FileExistsError, match=r"out\.partial holds an unfinished compression: go on with --resume, or"):
        compress(configured(killed))


def test_a_finished_one_is_not_done_again(whole: Path, configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    solves = counted(monkeypatch)
    assert compress(configured(whole, resume=True)) == record(whole)["metrics"]
    with pytest.raises(FileExistsError, match="was begun with seed=0, but now seed=1 is asked for"):
        compress(configured(whole, resume=True, seed=1))
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        compress(configured(whole))
    assert solves == []


def test_a_disk_without_room_is_refused_before_anything_is_solved(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solves = counted(monkeypatch)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
        with pytest.raises(OSError, match=r"has 0.00 GiB free, and .* GiB are needed .*: free some, or choose another"):
            compress(configured(tmp_path / "out"))
    assert solves == []
    assert not (tmp_path / "out").exists()
    compress(configured(tmp_path / "out"))  # nothing was begun, so there is nothing to resume


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of any file fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# A layer takes 147 kB here and the model 600 kB: the first layer cannot be kept, or the model cannot be saved.
@pytest.mark.parametrize("size", [100_000, 300_000])
def test_a_disk_that_fills_up_leaves_no_model_and_can_be_resumed(
    size: int, configured: Any, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    message = r"writing into .*out\.partial failed \(.*\): nothing was put at --out; make room and go on with --resume"
    with no_file_above(size), pytest.raises(OSError, match=message):
        compress(configured(out))
    assert not out.exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    assert_nothing_loads(tmp_path / "out.partial")
    compress(configured(out, resume=True))
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_a_disk_that_fills_up_while_saving_says_so(
    configured: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device.*go on with --resume"):
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        compress(configured(tmp_path / "out"))
    solves = counted(monkeypatch)
    compress(configured(tmp_path / "out", resume=True))
    assert solves == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
