"""Options of `compress`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from smartmops.checks.errors import ConfigError, RunError, RunExists
from smartmops.checks.folders import OutFolder, beside, held_by, missing, near
from smartmops.checks.limits import LARGEST, Count, NotNegative, Number, OneOf, Options, Seed, Share, Text, unused

from .training import Base, Columns, Zeros

Method = Literal["sparsegpt", "wanda", "magnitude"]
Quantisation = Literal["int8", "nf4", "int8-torchao"]
TEXT_ENDINGS = (".txt", ".raw", ".md", ".xz")  # of plain text; anything else is DATA
Calibration = Annotated[str, Text("DATA or a text file")]
Length = Annotated[int, Number("2 tokens or more, such as 2048", 2, LARGEST)]


@dataclass(frozen=True)
class OfEvery:
    """`n:m` in the paper's notation: prune n of every m."""

    def wrong(self, value: str) -> str | None:
        """As `limits.Limit`."""
        parts = numbers_of(value)
        if parts and 0 < parts[0] < parts[1]:
            return None
        return ": n:m prunes n of every m, so choose 0 < n < m, such as 7:8 or 2:4"


@dataclass(frozen=True)
class Device:
    """A name that torch knows, as far as its form says."""

    def wrong(self, value: str) -> str | None:
        """As `limits.Limit`."""
        return None if re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", value) else ": choose cpu, cuda, cuda:N, xpu or mps"


def numbers_of(pattern: str) -> tuple[int, int] | None:
    """The two numbers of `n:m`; None where it is none."""
    parts = pattern.split(":")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 10 for part in parts):
        return None
    return int(parts[0]), int(parts[1])


def undivided(columns: int, m: int, layer: str) -> str | None:
    """What is wrong with groups of `m` for a layer of so many inputs; None where nothing is, or where `m` is 0."""
    if not m or columns % m == 0:
        return None
    return (f"{layer} has {columns} inputs, which {m} does not divide: choose an m that divides {columns}, such as "
            "2:4 or 4:8, or a sparsity")  # fmt: skip


def uneven(block_size: int, m: int) -> str | None:
    """What is wrong with blocks of so many columns for groups of `m`; None where nothing is, or where `m` is 0."""
    if block_size > 0 and (not m or block_size % m == 0):
        return None
    return f": choose a positive multiple of {max(m, 1)}"


@dataclass(kw_only=True)
class Pruning:
    """Which weights become zero."""

    ABOUT: ClassVar[str] = "pruning"

    method: Method = "sparsegpt"  # how the weights to set to zero are chosen
    sparsity: Zeros | None = None  # share of zeros in each linear layer of the decoder, such as 0.75
    pattern: Annotated[str, OfEvery()] | None = None  # n:m prunes n of every m inputs, such as 7:8
    block_size: Count = 128  # columns that SparseGPT solves at once
    damping: NotNegative = 0.01  # damping of the Hessian, as a share of its mean diagonal


@dataclass(kw_only=True)
class Quantised:
    """In how many bits the weights are kept."""

    ABOUT: ClassVar[str] = "quantisation"

    int8: bool = False  # quantise to 8 bits after pruning (LLM.int8() of bitsandbytes)
    int8_engine: Annotated[str, OneOf(("bitsandbytes", "torchao")), tyro.conf.arg(metavar="{bitsandbytes,torchao}")] = (
        "bitsandbytes"  # library that quantises to 8 bits
    )
    nf4: bool = False  # quantise to 4-bit NormalFloat after pruning (bitsandbytes)


@dataclass(kw_only=True)
class Calibrated:
    """The text that decides what a weight is worth."""

    ABOUT: ClassVar[str] = "calibration"

    calibration: Calibration | None = None
    """data or text file to calibrate and measure on; by default office, for tiny only"""
    columns: Columns = ()  # FIELD=COLUMN where the data name their columns differently, such as response=answer
    sequences: Count = 128  # number of calibration sequences
    sequence_length: Length | None = None
    """tokens of a calibration sequence; by default as text and model allow, at most 2048"""
    seed: Seed = 0  # seed of the draw of calibration sequences
    data_seed: Seed = 0  # --data-seed of the `train` to come, whose test split calibration must not see
    limit: Count | None = None  # --limit of the `train` to come
    test_share: Share = 0.1  # --test-share of the `train` to come


@dataclass(kw_only=True)
class CompressRun:
    """What is compressed, where it is written, and how it is gone about."""

    ABOUT: ClassVar[str] = "run"

    model: Base  # model to compress: a folder, a *.gguf file, a hub id, smollm2 or tiny
    out: OutFolder  # model folder to write
    batch_size: Count = 8  # sequences that pass through a layer at once
    device: Annotated[str, Device()] | None = None
    """device that layers are solved on; by default the GPU if there is one"""
    resume: bool = False  # continue a compression that was killed


@dataclass(kw_only=True)
class CompressConfig(CompressRun, Calibrated, Quantised, Pruning, Options):
    """Everything `smartmops compress` takes: prune to `sparsity` or `pattern`, or quantise, or one after the other."""

    @property
    def quantisation(self) -> Quantisation | None:
        """What `load_base` calls it."""
        if self.nf4:
            return "nf4"
        return None if not self.int8 else "int8" if self.int8_engine == "bitsandbytes" else "int8-torchao"

    @property
    def pruned(self) -> bool:
        """Whether weights become zero."""
        return (self.sparsity, self.pattern) != (None, None)

    @property
    def calibrates(self) -> bool:
        """Whether text decides which weights become zero."""
        return self.pruned and self.method != "magnitude"

    @property
    def reads(self) -> bool:
        """Whether there is text to calibrate or measure on."""
        return self.calibrates or self.calibration is not None or self.model == "tiny"

    @property
    def of_data(self) -> bool:
        """Whether that text is of DATA."""
        return self.reads and not (self.calibration or "").endswith(TEXT_ENDINGS)

    def check_positions(self, positions: object) -> None:
        """Whether a model of so many positions (None: it does not say) takes sequences of the length asked for.

        Raises:
            ConfigError: it does not.
        """
        if isinstance(positions, int) and self.sequence_length and self.sequence_length > positions:
            raise ConfigError(f"--sequence-length {self.sequence_length}, but the model has {positions} positions: "
                              "choose that at most")  # fmt: skip

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        if self.int8 and self.nf4:
            yield "--int8 and --nf4 are both asked for: choose one"
        if self.sparsity is not None and self.pattern is not None:
            yield f"--sparsity {self.sparsity} and --pattern {self.pattern} are both asked for: choose one"
        if self.sparsity is None and self.pattern is None and self.quantisation is None:
            yield "nothing to do: give --sparsity 0.75 or --pattern 7:8, --int8 or --nf4"
        if self.calibrates and self.calibration is None and self.model != "tiny":
            yield f"no calibration text for {self.model}: give --calibration a text file, or the DATA it will serve"

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        solved = self.pruned and self.method == "sparsegpt"
        acting = {
            ("method",): (self.pruned, "pruning: give --sparsity or --pattern"),
            ("block_size", "damping"): (solved, "pruning by --method sparsegpt: choose that"),
            ("int8_engine",): (self.int8, "--int8: give that"),
            ("sequences", "seed"): (self.calibrates, "text that pruning is calibrated on, and none is: choose --method "
                                                     "sparsegpt or wanda, with --sparsity or --pattern"),
            ("sequence_length", "batch_size"): (self.reads, "text, and none is read to calibrate or measure on: give "
                                                            "--calibration"),
            ("columns", "data_seed", "limit", "test_share"): (self.of_data, "DATA, and none are read to calibrate or "
                                                                            "to measure on: name them by "
                                                                            "--calibration"),
            ("device",): (self.pruned or self.reads, "layers that are pruned or measured: give --calibration"),
        }  # fmt: skip
        for names, (acts, of) in acting.items():
            yield from unused(self, names, acts, f"is of {of}, or leave it away")

    def taken(self) -> RunError | None:
        """As `Options`."""
        partial, held = beside(self.out), held_by(self.out)
        if held and not (self.resume and "compression.json" in held):
            return RunExists(f"--out {self.out} exists and is not empty: choose another folder")
        if partial.exists() and not self.resume:
            return RunExists(f"{partial} holds an unfinished compression: go on with --resume, or delete it")
        if self.resume and not self.out.exists() and not partial.exists():
            return missing(self.out, near(self.out, lambda folder: (folder / "compression.json").is_file()))
        return None
