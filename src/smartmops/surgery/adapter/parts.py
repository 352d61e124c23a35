"""An adapter taken apart: its config and tensors by name, and what becomes of them when experts come, go or merge.

Knows names, shapes and the rules of `experts/routes.py`. Knows no data and no files. Nothing changes what it
is given, but `put` the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smartmops.checks.errors import ConfigError
from smartmops.checks.limits import Unreserved
from smartmops.tuner import MoPsConfig
from smartmops.tuner.engine import Engine

ADAPTER = "default"
COLUMNS = ("mops_keys", "mops_values")  # a group of rows for each expert
ROWS = ("mops_gate_out", "mops_gate_bias", "mops_null_centres")  # a row for each row of the gate
CLAIMS = ("mops_claim_basis", "mops_claim_centre", "mops_claim_direction", "mops_claim_cut")  # one for each rule


@dataclass(frozen=True)
class Claim:
    """A rule by which the gate sends instructions to an expert that was added (see `experts/routes.py`)."""

    basis: Float[Tensor, "rank inputs"]
    centre: Float[Tensor, " rank"]
    direction: Float[Tensor, " inputs"]
    cut: Float[Tensor, " four"]


@dataclass(frozen=True)
class Parts:
    """An adapter's config and its tensors, by the names they have in a layer."""

    config: MoPsConfig
    tensors: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        """Of the experts, in order."""
        return self.config.named_experts

    @property
    def routes(self) -> list[int]:
        """The expert that each row of the gate, and then each rule, leads to."""
        return list(self.config.routes or range(self.config.num_experts))

    @property
    def scale(self) -> list[float]:
        """What the weight of each expert is multiplied by."""
        return list(self.config.expert_scale or [float(self.config.num_experts)] * self.config.num_experts)

    def number(self, name: str) -> int:
        """Of an expert, by its name.

        Raises:
            ValueError: there is no such expert.
        """
        if name not in self.names:
            raise ConfigError(f"{name!r} is no expert of this run: choose one of {', '.join(self.names)}")
        return self.names.index(name)

    def columns(self, expert: int) -> dict[str, Tensor]:
        """Keys and values of one expert, [P, layers, heads, width]."""
        count = self.config.prompts_per_expert
        return {name: self.tensors[name][expert * count : (expert + 1) * count] for name in COLUMNS}


def taken(model: Any) -> Parts:
    """The adapter of a model, copied."""
    layer = model.base_model.layer(ADAPTER)
    held = {name: getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)}
    tensors = {name: own[ADAPTER].detach().clone() for name, own in held.items() if ADAPTER in own}
    return Parts(copy.deepcopy(layer.configs[ADAPTER]), tensors)


def put(model: Any, parts: Parts, trained: Sequence[str] = ()) -> None:
    """Make it the adapter of the model, in eval mode; only `trained` parameters want a gradient."""
    layer = model.base_model.layer(ADAPTER)
    config = layer.configs[ADAPTER]
    for each in fields(MoPsConfig):
        setattr(config, each.name, copy.deepcopy(getattr(parts.config, each.name)))
    device = next(iter(layer.mops_gate_in.values())).device
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, name)
        if ADAPTER in held:
            del held[ADAPTER]
        if name not in parts.tensors:
            continue
        value = parts.tensors[name].detach().clone().to(device)
        parameter = name in layer.adapter_layer_names
        held[ADAPTER] = nn.Parameter(value, requires_grad=name in trained) if parameter else value
    Engine.on(model.base_model.model).last = None
    model.eval()


def by_rule(parts: Parts) -> list[str]:
    """Experts that a rule leads to, rather than the gate or a caller by name alone."""
    later = zip(parts.routes[parts.config.num_rows :], hold(parts), strict=True)
    return [parts.names[expert] for expert in dict.fromkeys(expert for expert, holds in later if holds)]


def hold(parts: Parts) -> list[bool]:
    """Whether each rule may hold; one that never does stands for an expert that answers by name only."""
    cuts = parts.tensors["mops_claim_cut"][:, 3].tolist() if parts.config.claims else []
    return [cut > -torch.inf for cut in cuts]


def without(parts: Parts, name: str) -> Parts:
    """What is left when an expert goes: the gate's softmax over the other rows, and the other rules as they were.

    Raises:
        ValueError: there is no such expert, or no other that the gate can choose.
    """
    gone, count = parts.number(name), parts.config.prompts_per_expert
    rows = parts.config.num_rows
    kept = [i for i, expert in enumerate(parts.routes) if expert != gone]
    kept_rows, kept_claims = [i for i in kept if i < rows], [i - rows for i in kept if i >= rows]
    if not kept_rows:
        raise ConfigError(f"{name!r} is the last expert of the gate: drop the whole adapter, or train another run")
    tensors = dict(parts.tensors)
    for each in COLUMNS:
        held = tensors[each]
        tensors[each] = torch.cat([held[: gone * count], held[(gone + 1) * count :]])
    tensors |= {each: tensors[each][kept_rows] for each in ROWS if each in tensors}
    tensors |= {each: tensors[each][kept_claims] for each in CLAIMS if each in tensors and kept_claims}
    tensors = {each: value for each, value in tensors.items() if kept_claims or each not in CLAIMS}
    left = [i for i in range(len(parts.names)) if i != gone]
    routes = [left.index(parts.routes[i]) for i in kept]
    return Parts(_config(parts, left, routes, len(kept_claims)), tensors)


def _config(parts: Parts, experts: Sequence[int], routes: Sequence[int], claims: int) -> MoPsConfig:
    """The config with these experts of the former ones."""
    old = parts.config
    names, scale = [parts.names[i] for i in experts], [parts.scale[i] for i in experts]
    plain = list(routes) == list(range(len(names))) and not claims
    top = old.gate_top_k if old.gate_top_k is None else min(old.gate_top_k, len(routes) - claims)
    even = scale == [float(len(names))] * len(names)
    return replace(old, num_experts=len(names), expert_names=names, routes=None if plain else list(routes),
                   claims=claims, expert_scale=None if even else scale, gate_top_k=top,
                   frozen_experts=[each for each in old.frozen_experts or [] if each in names] or None)  # fmt: skip


def grown(parts: Parts, name: str, columns: dict[str, Tensor], scale: float, claim: Claim) -> Parts:
    """With one expert more, whose rule comes last; where its rule does not hold, nothing changes.

    Args:
        parts: Of the adapter.
        name: Of the expert.
        columns: Its keys and values, in the adapter's own units.
        scale: What its weight is multiplied by.
        claim: Its rule.

    Raises:
        ValueError: there is an expert of that name.
    """
    check_new(parts, name)
    old, tensors = parts.config, opened(parts).tensors
    tensors |= {each: torch.cat([tensors[each], columns[each].to(tensors[each])]) for each in COLUMNS}
    rule = dict(zip(CLAIMS, (claim.basis, claim.centre, claim.direction, claim.cut), strict=True))
    for each, value in rule.items():
        before = [tensors[each]] if each in tensors else []
        tensors[each] = torch.cat([*before, value[None].float().cpu().to(tensors["mops_gate_mean"])])
    count = old.num_experts + 1
    config = replace(opened(parts).config, num_experts=count, expert_names=[*parts.names, name],
                     routes=[*parts.routes, count - 1], claims=old.claims + 1,
                     expert_scale=[*parts.scale, float(scale)])  # fmt: skip
    return Parts(config, tensors)


def opened(parts: Parts) -> Parts:
    """An adapter that left everything to the base by its threshold, made to do so by its null expert's cut.

    So an expert that is added can answer, and nothing else changes.
    """
    if parts.config.null_threshold > 0:
        return Parts(parts.config, dict(parts.tensors))
    tensors = dict(parts.tensors)
    mean = tensors["mops_gate_mean"]
    tensors.setdefault("mops_null_basis", mean.new_zeros(1, len(mean)))
    tensors.setdefault("mops_null_centres", mean.new_zeros(parts.config.num_rows, len(tensors["mops_null_basis"])))
    tensors.setdefault("mops_null_direction", torch.zeros_like(mean))
    tensors["mops_null_cut"] = mean.new_tensor([-torch.inf, 1.0, torch.inf])
    return Parts(replace(parts.config, null_expert=True, null_threshold=0.5), tensors)


def merged(parts: Parts, first: str, second: str, name: str, columns: dict[str, Tensor]) -> Parts:
    """With one expert in place of two: it gets the sum of their weights, and nothing else changes.

    Raises:
        ValueError: there are no such experts, they are one, or another has that name.
    """
    one, other = sorted((parts.number(first), parts.number(second)))
    if one == other:
        raise ConfigError(f"{first!r} cannot be merged with itself: name two experts")
    if name not in (first, second):
        check_new(parts, name)
    count, tensors = parts.config.prompts_per_expert, dict(parts.tensors)
    for each in COLUMNS:
        held = tensors[each].clone()
        held[one * count : (one + 1) * count] = columns[each]
        tensors[each] = torch.cat([held[: other * count], held[(other + 1) * count :]])
    left = [i for i in range(len(parts.names)) if i != other]
    routes = [left.index(one if expert == other else expert) for expert in parts.routes]
    config = _config(parts, left, routes, parts.config.claims)
    names, scale = list(config.named_experts), [parts.scale[i] for i in left]
    names[one], scale[one] = name, max(parts.scale[one], parts.scale[other])
    frozen = [each for each in config.frozen_experts or [] if each in names] or None
    return Parts(replace(config, expert_names=names, expert_scale=scale, frozen_experts=frozen), tensors)


def renamed(parts: Parts, name: str, to: str) -> Parts:
    """With another name for one expert.

    Raises:
        ValueError: there is no such expert, or one has the new name.
    """
    at = parts.number(name)
    check_new(parts, to)
    names = [to if i == at else each for i, each in enumerate(parts.names)]
    frozen = [to if each == name else each for each in parts.config.frozen_experts or []] or None
    return Parts(replace(parts.config, expert_names=names, frozen_experts=frozen), parts.tensors)


def frozen(parts: Parts, names: Sequence[str], off: bool = False) -> Parts:
    """With experts that further training leaves as they are, or with `off` trains again.

    Raises:
        ValueError: there is no such expert.
    """
    for name in names:
        parts.number(name)
    before = parts.config.frozen_experts or []
    after = [name for name in parts.names if (name in before or name in names) and not (off and name in names)]
    return Parts(replace(parts.config, frozen_experts=after or None), parts.tensors)


def alone(parts: Parts, columns: dict[str, Tensor], scale: float) -> Parts:
    """One expert without a gate, beside the columns that every row sees: how a new one is trained."""
    tensors = dict(parts.tensors) | {name: value.detach().clone() for name, value in columns.items()}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(("mops_null", "mops_claim"))}
    tensors |= {name: tensors[name][:1] * 0 for name in ROWS if name in tensors}
    config = replace(parts.config, num_experts=1, expert_names=None, routes=None, claims=0, expert_scale=[float(scale)],
                     frozen_experts=None, null_expert=False, null_threshold=0.5, gate_top_k=None)  # fmt: skip
    return Parts(config, tensors)


def check_new(parts: Parts, name: str) -> None:
    """Whether no expert has a name yet.

    Raises:
        ValueError: one has, or it is blank, or means something else to a server.
    """
    if wrong := Unreserved("one by --name").wrong(name):
        raise ConfigError(f"an expert's name, {name!r},{wrong}")
    if name in parts.names:
        raise ConfigError(f"{name!r} is an expert of this run already: give another --name")


def fits(own: MoPsConfig, other: MoPsConfig) -> str | None:
    """Why an expert of another adapter cannot move into this one; None: it can."""
    same = ("experts", "prompts_per_expert", "injection_layer", "key_value_shape", "visible_to", "prefix_attention")
    for name in same:
        mine, theirs = getattr(own, name), getattr(other, name)
        if mine != theirs:
            return f"its {name} is {theirs}, here it is {mine}: an expert moves between runs that agree in it"
    if own.shared_prompts or other.shared_prompts:
        return "one of the runs has shared prompts, which its experts were trained beside: train it here with --data"
    return None


def moved(columns: dict[str, Tensor], there: Parts, here: Parts) -> dict[str, Tensor]:
    """Keys and values in the units of another adapter."""
    found = {}
    for name in COLUMNS:
        unit = name[:-1] + "_size"
        ratio = there.tensors[unit].to(columns[name]) / here.tensors[unit].to(columns[name])
        found[name] = columns[name] * ratio[None, :, None, None]
    return found
