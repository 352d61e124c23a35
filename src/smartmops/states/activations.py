"""What never changes while prompts and gate are trained, computed once: hidden states at the injection layer.

Knows files, keys and room. Knows no training loop: a filled cache is a collator, and its indices are the data set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smartmops.backbone import halves
from smartmops.checks.errors import AdapterError, DataError, NoRoom, RunError
from smartmops.checks.folders import replacing
from smartmops.progress.bars import console, counted
from smartmops.runs.folder import write_text
from smartmops.tokens.batches import Encoded, by_budget, pack
from smartmops.tuner.engine import Engine

from .fingerprint import acting, fingerprint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHARD = 2**28  # bytes of hidden states in one file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass
class ActivationCache:
    """Hidden states at the injection layer, and what the gate reads, of every example, computed once.

    Serves every epoch, seed, sweep, gate pretraining and federated client on a machine: it depends on the frozen base
    below the injection layer, the recovery prompts and the tokens, never on prompts or gate. It is a collator for a
    data set of its own indices: `Trainer(train_dataset=range(len(cache)), data_collator=cache)`.

    On disk, `folder/<key>/` holds safetensors files that are memory-mapped, so only what a batch needs is read.
    Folders of other keys are left alone; delete them to free their space. Handles are opened where they are first
    needed, so a cache can be pickled and handed to workers.

    Attributes:
        lengths: Tokens of each example.
        width: Size of a hidden state.
        inputs: Size of what the gate reads.
        dtype: Of the hidden states.
        key: What the folder is named after; empty in memory.
        home: The folder; None in memory.
    """

    lengths: list[int] = field(repr=False)
    width: int
    inputs: int
    dtype: torch.dtype
    key: str = ""
    home: Path | None = None
    _parts: dict[int, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # tensors, or slices of files

    def __post_init__(self) -> None:
        self._shards = _split(self.lengths, self.width * self.dtype.itemsize)
        self._shard_of = [number for number, rows in enumerate(self._shards) for _ in rows]
        ends = [list(accumulate(self.lengths[rows.start : rows.stop], initial=0)) for rows in self._shards]
        self._start = [start for each in ends for start in each[:-1]]  # of each example, in its file

    @classmethod
    def fill(
        cls,
        model: Any,
        rows: Sequence[Encoded],
        folder: Path | None = None,
        dtype: Dtype = "auto",
        budget: int = 4096,
        progress: bool = True,
    ) -> ActivationCache:
        """Run the lower half over `rows`, or find what an earlier run left in `folder`.

        A killed run leaves whole files, which the next one keeps. Of several processes that fill one folder at once,
        one computes and the others wait for it (not on Windows, where each computes for itself).

        Args:
            model: A PEFT model whose MoPs adapter is switched on.
            rows: In the order in which the cache will hold them.
            folder: Where caches are kept; None: in memory.
            dtype: Of the stored hidden states; "auto" is the model's own, so that nothing is lost.
            budget: Tokens that go through the lower half at once.
            progress: Say what it will take, and show a bar.

        Raises:
            ValueError: there are no rows, no adapter is switched on, or it does not fit the disk or the memory.
        """
        cache = cls._planned(model, rows, dtype)

        def compute(number: int, advance: Callable[[int], None]) -> dict[str, Tensor]:
            return _compute(model, [rows[i] for i in cache._shards[number]], cache.dtype, budget, advance)

        if folder is not None:
            cache.key = fingerprint(model, rows, cache.dtype)
            cache.home = folder.absolute() / cache.key
            cache._fill_folder(compute, progress)
            return cache
        _require(cache.nbytes, free_memory(), "memory", "give a folder to keep them on disk")
        cache._say(progress, "memory")
        with _bar(sum(cache.lengths), progress) as advance:
            cache._parts = {number: compute(number, advance) for number in range(len(cache._shards))}
        return cache

    @staticmethod
    def size(model: Any, rows: Sequence[Encoded], dtype: Dtype = "auto") -> int:
        """Bytes that `fill` would take, computing nothing."""
        return ActivationCache._planned(model, rows, dtype).nbytes

    def __len__(self) -> int:
        return len(self.lengths)

    def __call__(self, indices: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """The keyword arguments of the model's `forward` for these examples."""
        return {"packed": self.batch(indices)}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """These examples end to end: `hidden`, `labels`, `lengths` and `pooled`, on the CPU (see `packed.Packed`).

        Raises:
            IndexError: an index is none of the cache's.
            ValueError: a file has gone or was damaged since the cache was filled.
        """
        if outside := [i for i in indices if not 0 <= i < len(self)]:
            raise IndexError(f"example {outside[0]} of a cache of {len(self)}: choose 0 to {len(self) - 1}")
        return {
            "hidden": torch.cat([self._tokens("hidden", i) for i in indices]),
            "labels": torch.cat([self._tokens("labels", i) for i in indices]).long(),
            "lengths": torch.tensor([self.lengths[i] for i in indices]),
            "pooled": self.gate_inputs(indices),
        }

    @property
    def pooled(self) -> Float[Tensor, "n inputs"]:
        """What the gate reads of each example, before standardisation."""
        return torch.cat([self._part(number)["pooled"][:] for number in range(len(self._shards))])

    def gate_inputs(self, indices: Sequence[int]) -> Float[Tensor, "some inputs"]:
        """What the gate reads of these examples, before standardisation."""
        return torch.cat([self._row("pooled", i) for i in indices])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (labels and gate inputs have four each)."""
        return sum(self.lengths) * (self.width * self.dtype.itemsize + 4) + len(self) * self.inputs * 4

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.home is None else self.__dict__ | {"_parts": {}}

    def _part(self, number: int) -> Mapping[str, Any]:
        if number not in self._parts:
            file = self._file(number)
            try:
                opened: Any = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise RunError(f"{file} has gone or is damaged ({error}): fill the cache again") from error
            self._parts[number] = {name: opened.get_slice(name) for name in ("hidden", "labels", "pooled")}
        return self._parts[number]

    def _tokens(self, name: str, i: int) -> Tensor:
        start = self._start[i]
        found: Tensor = self._part(self._shard_of[i])[name][start : start + self.lengths[i]]
        return found

    def _row(self, name: str, i: int) -> Tensor:
        number = self._shard_of[i]
        at = i - self._shards[number].start
        found: Tensor = self._part(number)[name][at : at + 1]
        return found

    @classmethod
    def _planned(cls, model: Any, rows: Sequence[Encoded], dtype: Dtype) -> ActivationCache:
        _, config = acting(model)
        if not rows:
            raise DataError("0 examples to compute activations of: give one at least")
        lengths = [len(row.input_ids) for row in rows]
        backbone = Engine.on(model.base_model.model).backbone
        width = halves.hidden_size(backbone)
        own = next(p.dtype for p in backbone.parameters() if p.is_floating_point())
        return cls(lengths, width, config.embedding_size or width, DTYPES.get(dtype, own))

    def _fill_folder(self, compute: Callable[..., dict[str, Tensor]], progress: bool) -> None:
        assert self.home is not None
        if not self._missing() and self._recorded():
            return
        if not self.home.exists():
            self._require_disk(range(len(self._shards)))
        self.home.mkdir(parents=True, exist_ok=True)
        with _alone(self.home, progress):
            missing = self._missing()
            self._require_disk(missing)
            if missing:
                there = len(self._shards) - len(missing)
                self._say(
                    progress, f"{self.home}" + (f" ({there} of {len(self._shards)} files are there)" if there else "")
                )
            with _bar(sum(self.lengths[i] for n in missing for i in self._shards[n]), progress) as advance:
                for number in missing:
                    self._write(number, compute(number, advance))
            if missing or not self._recorded():
                self._record()

    def _say(self, progress: bool, where: str) -> None:
        if progress:
            what = f"activations of {len(self)} examples ({sum(self.lengths)} tokens)"
            console.print(f"{what} take {decimal(self.nbytes)} in {str(self.dtype).removeprefix('torch.')}: {where}")

    def _require_disk(self, numbers: Sequence[int]) -> None:
        assert self.home is not None
        place = next(each for each in (self.home, *self.home.parents) if each.exists())
        share = sum(self.lengths[i] for n in numbers for i in self._shards[n]) / sum(self.lengths)
        where, way_out = f"the disk of {place}", "free some, choose another folder"
        _require(round(self.nbytes * share), shutil.disk_usage(place).free, where, way_out)

    def _file(self, number: int) -> Path:
        assert self.home is not None
        return self.home / f"{number:05}.safetensors"

    def _metadata(self, number: int) -> dict[str, str]:
        rows = self._shards[number]
        return {"key": self.key, "first": str(rows.start), "last": str(rows.stop - 1)}

    def _missing(self) -> list[int]:
        recorded: list[int | None] = [*self._recorded()] or [None] * len(self._shards)
        return [number for number, size in enumerate(recorded) if not self._whole(number, size)]

    def _whole(self, number: int, size: int | None) -> bool:
        """Whether a file is there, of its full length, and holds what it should. Content is not read again."""
        file, rows = self._file(number), self._shards[number]
        tokens = sum(self.lengths[i] for i in rows)
        shapes = {"hidden": [tokens, self.width], "labels": [tokens], "pooled": [len(rows), self.inputs]}
        opened: Any
        try:
            with safe_open(file, "pt") as opened:
                found = {name: opened.get_slice(name).get_shape() for name in shapes}
                same = opened.metadata() == self._metadata(number) and found == shapes
            return same and size in (None, file.stat().st_size)
        except (OSError, SafetensorError):
            return False

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        with replacing(self._file(number)) as fresh:
            save_file(tensors, fresh, self._metadata(number))

    def _recorded(self) -> list[int]:
        """Bytes of each file as `meta.json`, which is written last, has them; empty without one."""
        assert self.home is not None
        try:
            found = json.loads((self.home / "meta.json").read_bytes())
            same = found["key"] == self.key and len(found["bytes"]) == len(self._shards)
            return list(found["bytes"]) if same else []
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def _record(self) -> None:
        assert self.home is not None
        meta = {
            "key": self.key, "examples": len(self), "tokens": sum(self.lengths), "hidden_size": self.width,
            "gate_inputs": self.inputs, "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": [self._file(number).stat().st_size for number in range(len(self._shards))],
        }  # fmt: skip
        write_text(self.home / "meta.json", json.dumps(meta, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- numbers
@torch.no_grad()
def _compute(
    model: Any, rows: Sequence[Encoded], dtype: torch.dtype, budget: int, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """All tensors of one file. Rows of similar length run together, since attention alone pads; stored in order."""
    _, config = acting(model)
    width = halves.hidden_size(Engine.on(model.base_model.model).backbone)
    lengths = [len(row.input_ids) for row in rows]
    starts = [0, *accumulate(lengths)]
    found = {
        "hidden": torch.empty(sum(lengths), width, dtype=dtype),
        "labels": torch.tensor([label for row in rows for label in row.labels], dtype=torch.int32),
        "pooled": torch.empty(len(rows), config.embedding_size or width),
    }
    with evaluating(model):
        for group in by_budget(lengths, budget):
            hidden, pooled = model.base_model.lower(_packed(model, [rows[i] for i in group], config.embedding_size))
            for i, part in zip(group, hidden.to("cpu", dtype).split([lengths[i] for i in group]), strict=True):
                found["hidden"][starts[i] : starts[i] + lengths[i]] = part
            found["pooled"][group] = pooled.float().cpu()
            advance(sum(lengths[i] for i in group))
    return found


def _packed(model: Any, rows: Sequence[Encoded], embedding_size: int | None) -> dict[str, Tensor]:
    device = Engine.on(model.base_model.model).backbone.get_input_embeddings().weight.device
    widths = [0 if row.gate_embedding is None else len(row.gate_embedding) for row in rows]
    if embedding_size is not None and set(widths) != {embedding_size}:
        raise AdapterError(f"this adapter's gate reads embeddings of width {embedding_size}: give every row one as "
                           "gate_embedding")  # fmt: skip
    return {name: value.to(device) for name, value in pack(rows).items() if name != "pooled" or embedding_size}


def _split(lengths: Sequence[int], per_token: int) -> list[range]:
    """Consecutive rows whose hidden states fill a file."""
    shards, first, size = [], 0, 0
    for i, length in enumerate(lengths):
        if size and size + length * per_token > SHARD:
            shards.append(range(first, i))
            first, size = i, 0
        size += length * per_token
    return [*shards, range(first, len(lengths))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -------------------------------------------------------------------------------------------------------------- around
@contextmanager
def _alone(home: Path, progress: bool) -> Iterator[None]:
    """One process at a time, where the system can lock a file; a killed holder lets go."""
    if fcntl is None:
        yield
        return
    with open(home / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                console.print(f"another process is filling {home}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        for torn in home.glob(".*.tmp"):
            torn.unlink()
        yield


@contextmanager
def _bar(tokens: int, progress: bool) -> Iterator[Callable[[int], None]]:
    with counted("activations", tokens, progress) as done:
        yield done


def _require(need: int, free: int | None, where: str, way_out: str) -> None:
    if free is not None and need > free:
        raise NoRoom(f"activations take {decimal(need)}, but {where} has {decimal(free)} free: {way_out}, store "
                     "them in bfloat16, or use fewer examples")  # fmt: skip


def free_memory() -> int | None:
    """Bytes a process can still take; None where the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
