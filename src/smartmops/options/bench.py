"""Options of `bench`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

import tyro

from smartmops.checks.errors import RunError
from smartmops.checks.folders import OutFolder, refused
from smartmops.checks.limits import Count, Number, OneOf, Options, Several, Whole, listed, unused

from .training import Columns, Data, Model

RATIOS = (
    "train_vs_prompt_tuning", "train_vs_lora", "train_vs_padded", "first_epoch_vs_prompt_tuning",
    "train_memory_vs_prompt_tuning", "prefill_vs_bare", "decode_vs_bare_batch_1", "decode_vs_bare_batch_8",
    "mixed_batch_vs_lora", "matrix_peak_share", "experts_70_vs_7", "gate_pretraining_seconds", "busy_neighbour",
)  # fmt: skip
# Of a base that is named, `smartmops bench MODEL`.
ROWS = ("train", "train_short", "train_middle", "train_long", "memory", "preparing", "quality", "prefill", "decode_1",
        "decode_16", "mixed", "start_up", "busy_neighbour")  # fmt: skip
DECODED = ("decode_vs_bare_batch_1", "decode_vs_bare_batch_8", "mixed_batch_vs_lora", "decode_1", "decode_16", "mixed")
READ_BY = {  # options that not every row reads
    "repeats": tuple(name for name in RATIOS + ROWS if name not in ("preparing", "quality")),
    "prompt_tokens": ("prefill_vs_bare", "decode_vs_bare_batch_1", "decode_vs_bare_batch_8"),
    "new_tokens": DECODED,
    "quality_steps": ("quality",),
    "gate_examples": ("gate_pretraining_seconds",),
    "peak_sizes": ("matrix_peak_share",),
    "many_experts": ("experts_70_vs_7",),
}
POSITIONS = 4096  # of the random model
Ratio = Annotated[str, OneOf(tuple(dict.fromkeys(RATIOS + ROWS)))]
Positions = Annotated[int, Number(f"1 to {POSITIONS}, the positions of the model", 1, POSITIONS)]
Threads = Annotated[int, Number("1 to 1024", 1, 1024)]
Words = Annotated[int, Number("4 or more", 4, 2**31 - 1)]
Sizes = tuple[Count, ...]


@dataclass
class Measuring:
    """What is measured, on whose lengths, and how often."""

    ABOUT: ClassVar[str] = "measuring"

    out: OutFolder  # run folder
    model: Annotated[Model | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """base to measure on, as `train` takes it; by default a random Llama, shaped by the options below"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """type of MODEL's weights; auto: bfloat16 where the processor computes faster in it"""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # keep what `out` has, and measure the rest
    data: Data = "office"  # whose examples give the lengths: office, dolly, superni, a JSONL file, a folder or a hub id
    columns: Columns = ()  # FIELD=COLUMN where columns of the data have names of their own: response=answer
    only: Annotated[tuple[Ratio, ...], tyro.conf.arg(metavar="NAME...")] = ()  # what to measure; by default all
    repeats: Count = 5  # measurements of each side, which take turns; the median counts
    threads: Threads = 2  # threads of torch
    batches: Count = 8  # number of different batches, the same for every side
    batch_size: Count = 8  # examples of a batch
    max_length: Positions = 512  # tokens of an example at most
    prompt_tokens: Positions = 200  # tokens of an instruction, for prefill and decode
    new_tokens: Positions = 32  # tokens that are generated
    quality_steps: Count = 20  # steps of LoRA whose validation loss the experts are to reach
    gate_examples: Count = 4500  # examples of gate pretraining
    peak_sizes: Annotated[Sizes, Several("1024")] = (
        1024,
        1536,
        2048,
        3072,
        4096,
    )
    """sizes of the square matrices that the machine's peak is taken from"""


@dataclass
class MeasuredModel:
    """The random model that is measured on, and its experts."""

    ABOUT: ClassVar[str] = "model"

    layers: Count = 16  # decoder layers
    hidden: Count = 512  # width of hidden states
    intermediate: Count = 1376  # width of the MLPs
    heads: Count = 8  # attention heads
    vocabulary: Words = 32000  # tokens of the vocabulary
    injection_layer: Whole = 5  # first decoder layer (from 0) that sees the experts
    experts: Count = 7  # number of experts
    prompts_per_expert: Count = 10  # number of prompts in each expert
    many_experts: Count = 70  # number of experts that --experts is compared with


@dataclass
class Growth:
    """What --growth goes over."""

    ABOUT: ClassVar[str] = "growth"

    growth: bool = False  # also measure over experts, sequence length and size of the data
    growth_experts: Annotated[Sizes, Several("7")] = (7, 14, 35, 70, 140, 350, 700)
    """numbers of experts that --growth goes over"""
    growth_lengths: Annotated[Sizes, Several("64")] = (
        64,
        128,
        256,
        512,
        1024,
        2048,
    )
    """lengths of a row, in tokens, that --growth goes over"""
    growth_examples: Annotated[Sizes, Several("1000")] = (1_000, 3_000, 10_000, 30_000, 100_000)
    """numbers of examples that --growth goes over"""
    growth_tokens: Count = 8  # tokens of each of those examples


@dataclass
class BenchConfig(Growth, MeasuredModel, Measuring, Options):
    """Measure speed and memory on a base, or on a random Llama, against PEFT and the bare model, all in one run."""

    @property
    def width(self) -> int:
        """K, the number of prompts."""
        return self.experts * self.prompts_per_expert

    @property
    def known(self) -> tuple[str, ...]:
        """All that is measured by default."""
        return RATIOS if self.model is None else ROWS

    def problems(self) -> Iterator[str]:
        """Whether the shape is one, and what is named can be measured on it."""
        known = self.known
        for name in self.only:
            if name not in known:
                what = "the random Llama" if self.model is None else f"{self.model}, a base that is named"
                yield f"--only {name} is not measured on {what}: choose {', '.join(known)}"
        if self.model is not None and self.growth:
            yield f"--growth is measured on the random Llama, not on {self.model}: leave {self.model} or --growth away"
        if self.injection_layer >= self.layers:
            yield (f"--injection-layer {self.injection_layer}, but the model is given --layers {self.layers}: choose 0 "
                   f"to {self.layers - 1}")  # fmt: skip
        if self.hidden % (2 * self.heads):
            yield (f"--hidden {self.hidden} cannot be shared out in pairs among --heads {self.heads}: choose a "
                   f"multiple of {2 * self.heads}")  # fmt: skip
        if self.prompt_tokens + self.new_tokens > POSITIONS:
            yield (f"--prompt-tokens {self.prompt_tokens} and --new-tokens {self.new_tokens} are more than the model's "
                   f"{POSITIONS} positions: choose fewer")  # fmt: skip

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        own = self.model is None
        yield from unused(self, ("dtype",), not own, "is of a base that is named: give MODEL, or leave it away")
        yield from unused(self, ("layers", "hidden", "intermediate", "heads", "vocabulary", "injection_layer"), own,
                          f"is of the random Llama, and {self.model} is measured: leave one of them away")  # fmt: skip
        yield from unused(self, tuple(each.name for each in fields(Growth) if each.name != "growth"), self.growth,
                          "is of --growth: give that, or leave it away")  # fmt: skip
        for name, rows in READ_BY.items():
            here = [row for row in self.known if row in rows]
            acts = not {*here}.isdisjoint(self.only or self.known) or (self.growth and name == "repeats")
            way = f"of {listed(here)}, which --only leaves out: name it there" if here else (
                f"not of what is measured {'on the random Llama' if own else f'on {self.model}'}: choose "
                f"{'a MODEL' if own else 'the random Llama'}")  # fmt: skip
            yield from unused(self, (name,), acts, f"is {way}, or leave it away")

    def taken(self) -> RunError | None:
        """As `Options`."""
        return refused(self.out, self.resume)
