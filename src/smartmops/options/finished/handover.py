"""Options of the commands that hand a finished run on: `export` and `push`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from smartmops.checks.errors import RunError
from smartmops.checks.folders import OutFolder, filled
from smartmops.checks.limits import Options, Text, listed, unused

from .serving import Run, adapter_config, experts_of

Format = Literal["peft-prefix", "cartridge", "kv", "router"]
PREFIXES = ("peft-prefix", "cartridge")  # that stand before every token in every layer


@dataclass(kw_only=True)
class ExportConfig(Options):
    """What a run has learnt, in a form that other programs load."""

    run: Run  # run folder
    format: Format
    """each expert as a prefix that PEFT loads (two of its methods) or as keys and values; or the gate, as ONNX"""
    out: OutFolder  # a new or empty folder
    experts: tuple[Annotated[str, Text("an expert's name")], ...] = ()  # that are exported; none given: all

    def problems(self) -> Iterator[str]:
        """Whether the run's adapter can be carried in that form at all."""
        names, found = experts_of(self.run), adapter_config(self.run)
        if not names:
            yield f"RUN {self.run} has no experts to export: give a run of --method mops or prompt-tuning"
            return
        for name in self.experts:
            if name not in names:
                yield f"--experts {name} is no expert of {self.run}: choose {listed(names)}"
        yield from (f"--format {self.format}{said}" for said in uncarried(self.format, found))

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from unused(self, ("experts",), self.format != "router", "is of forms that carry experts, and --format "
                          "router carries the gate, which weighs all of them: leave it away")  # fmt: skip

    def taken(self) -> RunError | None:
        """As `Options`."""
        return filled(self.out, "--out")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, `owner/name`."""

    def wrong(self, value: str) -> str | None:
        """As `limits.Limit`."""
        if re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", value) and ".." not in value and "--" not in value:
            return None
        return ": give owner/name, such as me/office-experts"


@dataclass(kw_only=True)
class PushConfig(Options):
    """A run's adapter, put on the hub with its card."""

    run: Run  # run folder
    repo: Annotated[str, Repository(), tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]  # owner/name on the hub
    private: bool = False  # make the repository private; one that all can read is refused
    dry_run: bool = False  # only list what would be pushed

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from unused(self, ("private",), not self.dry_run, "is of a repository that is made, and with --dry-run "
                          "none is: leave one of them away")  # fmt: skip


def uncarried(format: Format, adapter: dict[str, Any]) -> Iterator[str]:
    """Why an adapter with this config cannot be carried in a form exactly, each with the way out."""
    if format == "router":
        if adapter.get("num_experts") == 1:
            yield " names an expert, and this run has one alone: there is nothing to route"
        elif (adapter.get("null_threshold", 1) or 0) <= 0:
            yield (" names an expert, and this run leaves every text to the base, because nothing was gained "
                   "by training: give a run that gained")  # fmt: skip
        return
    if adapter.get("prefix_attention", "joint") != "joint":
        yield (f": experts of --prefix-attention {adapter['prefix_attention']} stand outside the softmax over text, "
               "where no cache of keys and values has a place: train with --prefix-attention joint")  # fmt: skip
    if format not in PREFIXES:
        return
    if adapter.get("visible_to", "all") == "answers":
        yield (" is seen by every token, and this run's experts by answers alone: choose --format kv, or train with "
               "--visible-to all --injection-layer 0")  # fmt: skip
    elif first := adapter.get("injection_layer") or 0:
        yield (f" puts as many columns into every layer, and this run's experts begin at layer {first} (no key is left "
               "out of a softmax): choose --format kv, or train with --injection-layer 0")  # fmt: skip
