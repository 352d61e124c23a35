"""Caches on disk: shown and refused beforehand, torn files found, killed fills resumed, two at once ending as one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import WIDTH, adapted, base, fill, made_up, same
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from smartmops.states import activations
from smartmops.states.activations import ActivationCache
from smartmops.tokens.batches import by_budget
from smartmops.tuner.model import MoPsModel

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass of the lower half."""
    seen: list[int] = []
    lower = MoPsModel.lower

    def spy(self: MoPsModel, batch: Any) -> Any:
        seen.append(int(batch["lengths"].sum()))
        return lower(self, batch)

    monkeypatch.setattr(MoPsModel, "lower", spy)
    return seen


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of at most 40 tokens."""
    monkeypatch.setattr(activations, "SHARD", 40 * WIDTH * 4)


def files(cache: ActivationCache) -> dict[str, int]:
    assert cache.home is not None
    return {file.name: file.stat().st_mtime_ns for file in sorted(cache.home.glob("*.safetensors"))}


@pytest.mark.usefixtures("small")
def test_disk_and_memory_hold_the_same(tmp_path: Path) -> None:
    model, rows = adapted(), made_up()
    memory, disk = fill(model, rows), fill(model, rows, tmp_path / "not" / "there yet")
    same(memory, disk)
    assert torch.equal(memory.pooled, disk.pooled) and memory.pooled.shape == (8, WIDTH)
    assert memory([3])["packed"]["lengths"].tolist() == [18]
    stored = sum(v.nbytes for i in range(8) for n, v in memory.batch([i]).items() if n in ("hidden", "pooled"))
    tokens = sum(len(row.input_ids) for row in rows)
    assert ActivationCache.size(model, rows) == memory.nbytes == disk.nbytes == stored + 4 * tokens
    assert ActivationCache.size(model, rows, "bfloat16") == memory.nbytes - 2 * WIDTH * tokens
    assert len(files(disk)) == 4
    assert {file.suffix for file in disk.home.iterdir()} == {".safetensors", ".json", ""}  # the last is the lock


@pytest.mark.usefixtures("small")
def test_workers_and_pickles_read_the_same_files(tmp_path: Path) -> None:
    cache = fill(adapted(), made_up(), tmp_path)
    cache.batch([0])
    assert not cache.__getstate__()["_parts"]
    same(pickle.loads(pickle.dumps(cache)), cache)
    loader = DataLoader(range(8), batch_size=3, collate_fn=cache, num_workers=2)  # type: ignore[arg-type]
    for start, batch in zip((0, 3, 6), loader, strict=True):
        want = cache.batch(range(8)[start : start + 3])
        assert all(torch.equal(batch["packed"][name], value) for name, value in want.items())


def test_a_second_fill_reads_and_does_not_compute(tmp_path: Path, passes: list[int]) -> None:
    rows = made_up()
    first = fill(adapted(), rows, tmp_path, budget=40)
    assert sum(passes) == sum(len(row.input_ids) for row in rows) and max(passes) <= 40
    passes.clear()
    again = fill(adapted(), rows, tmp_path, budget=40)
    assert passes == [] and again.key == first.key
    same(first, again)


def test_the_size_is_shown_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = adapted(), made_up()
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "_compute", lambda *_: 1 // 0)
        ActivationCache.fill(model, rows, tmp_path)
    told = " ".join(capsys.readouterr().out.split())
    assert "activations of 8 examples (110 tokens) take 15.5 kB in float32" in told
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_without_room_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    model, rows = adapted(), made_up()
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda place: Disk(100, 90, 10))
    with pytest.raises(ValueError, match=r"activations take 15.5 kB, but the disk of .* has 10 bytes free: free some"):
        fill(model, rows, tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(activations, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"but memory has 1.0 kB free: give a folder to keep them on disk, store them"):
        fill(model, rows)
    assert passes == []
    monkeypatch.setattr(activations, "free_memory", lambda: None)
    assert len(fill(model, rows)) == 8


def test_the_system_is_asked_for_itsfree_memory() -> None:
    free = activations.free_memory()
    if free is None:
        pytest.skip("free memory: no /proc/meminfo")
    assert 2**20 < free < 2**50


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="0 examples"):
        fill(model, [])
    with model.disable_adapter(), pytest.raises(ValueError, match="no MoPs adapter is switched on"):
        fill(model, made_up())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoPs adapter"):
        fill(base(), made_up())
    cache = fill(model, made_up(), tmp_path)
    for outside in (8, -1):
        with pytest.raises(IndexError, match=f"example {outside} of a cache of 8: choose 0 to 7"):
            cache.batch([0, outside])
    model.base_model.model.model.layers[0].mlp.to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        fill(model, made_up(), tmp_path)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80))
def test_rows_are_shared_out_whole_and_within_limits(lengths: list[int], limit: int) -> None:
    groups = by_budget(lengths, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= limit for group in groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SHARD", limit)
        shards = activations._split(lengths, 1)
    assert [i for rows in shards for i in rows] == list(range(len(lengths)))
    assert all(len(rows) == 1 or sum(lengths[i] for i in rows) <= limit for rows in shards)


# --------------------------------------------------------------------------------------------------------- interruptions
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["cut short", "emptied", "gone", "of other rows", "grown"])
def test_a_damaged_file_is_found_and_it_alone_is_computed_again(damage: str, tmp_path: Path, passes: list[int]) -> None:
    model, rows = adapted(), made_up()
    cache = fill(model, rows, tmp_path)
    before, want = files(cache), fill(model, rows)
    torn = cache.home / "00001.safetensors"
    if damage == "gone":
        torn.unlink()
    elif damage == "of other rows":
        torn.write_bytes((cache.home / "00002.safetensors").read_bytes())
    elif damage == "grown":
        torn.write_bytes(torn.read_bytes() + b"?")
    else:
        os.truncate(torn, 0 if damage == "emptied" else torn.stat().st_size - 1)
    passes.clear()
    again = fill(model, rows, tmp_path)
    assert sum(passes) == sum(cache.lengths[i] for i in cache._shards[1])
    after = files(again)
    assert [name for name in before if before[name] != after[name]] == ["00001.safetensors"]
    same(again, want)


def test_a_file_that_goes_while_it_is_in_use_is_told_of(tmp_path: Path) -> None:
    cache = fill(adapted(), made_up(), tmp_path)
    (cache.home / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00000.safetensors has gone or is damaged .*: fill the cache again"):
        cache.batch([0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("text", ["", "[1]", '{"key": "another", "bytes": [1, 2, 3, 4]}', None])
def test_a_lost_record_costs_no_computing(text: str | None, tmp_path: Path, passes: list[int]) -> None:
    model, rows = adapted(), made_up()
    meta = fill(model, rows, tmp_path).home / "meta.json"
    right = meta.read_text()
    passes.clear()
    meta.unlink() if text is None else meta.write_text(text)
    same(fill(model, rows, tmp_path), fill(model, rows))
    assert meta.read_text() == right
    assert sum(passes) == sum(len(row.input_ids) for row in rows)  # of the one in memory


@pytest.mark.usefixtures("small")
def test_a_killed_fill_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    model, rows = adapted(), made_up()
    lower = MoPsModel.lower

    def dies(self: MoPsModel, batch: Any) -> Any:
        if len(passes) == 5:
            raise KeyboardInterrupt
        return lower(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MoPsModel, "lower", dies)
        fill(model, rows, tmp_path, budget=1)
    (home,) = tmp_path.iterdir()
    kept = {file.name: file.stat().st_mtime_ns for file in home.glob("*.safetensors")}
    assert len(kept) == 2 and not (home / "meta.json").exists()
    passes.clear()
    cache = fill(model, rows, tmp_path, budget=1)
    assert len(passes) == sum(len(cache._shards[n]) for n in (2, 3))
    assert kept.items() <= files(cache).items()
    same(cache, fill(model, rows, budget=1))


def _in_a_process(folder: Path, waits: Any, done: Any, die: bool) -> None:
    """Fill in files of 40 tokens, not before `waits` is set, as it is by who waits; or be killed in the middle of the second."""
    computed: list[int] = []
    compute, flock = activations._compute, activations.fcntl.flock

    def locks(file: Any, how: int) -> None:
        if not how & activations.fcntl.LOCK_NB:
            waits.set()
        flock(file, how)

    def slow(*args: Any) -> Any:
        if die and computed:
            (next(folder.iterdir()) / ".00001.safetensors.1.tmp").write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        computed.append(1)
        waits.wait()
        return compute(*args)

    activations._compute, activations.SHARD = slow, 40 * WIDTH * 4  # type: ignore[assignment]
    torch.set_num_threads(1)
    activations.fcntl.flock = locks
    cache = fill(adapted(), made_up(), folder)
    done.put((len(computed), float(cache.batch(range(8))["hidden"].sum())))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_processes_at_once_end_with_one_good_cache_and_a_killed_one_holds_nobody_up(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system cannot lock files: every process computes for itself")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["smartmops.states.activations", "transformers.trainer"])  # imported once
    done = context.Queue()

    def start(count: int, die: bool) -> list[Any]:
        waits = context.Event()
        if count == 1:
            waits.set()
        started = [context.Process(target=_in_a_process, args=(tmp_path, waits, done, die)) for _ in range(count)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        return [process.exitcode for process in started]

    assert start(1, die=True) == [-signal.SIGKILL]
    assert start(2, die=False) == [0, 0]
    computed, sums = zip(*(done.get() for _ in range(2)), strict=True)
    assert sorted(computed) == [0, 3], "one process computes what the killed one left, the other waits for it"
    want = fill(adapted(), made_up())
    assert sums[0] == sums[1]
    (home,) = tmp_path.iterdir()
    assert sorted(file.name for file in home.iterdir()) == [
        *(f"0000{n}.safetensors" for n in range(4)),
        "lock",
        "meta.json",
    ]
    cache = fill(adapted(), made_up(), tmp_path)
    assert cache.home == home
    same(cache, want, 1e-5)
