"""The wrapper of an injection layer: it holds the parameters of every adapter that enters there, and reads the gate.

Knows PEFT's layers and parameters. Knows no model, no text, no tasks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smartmops.adapter import fresh
from smartmops.adapter.config import MoPsConfig
from smartmops.attention.context import ForwardContext
from smartmops.backbone import halves
from smartmops.calls import mixed
from smartmops.checks.errors import AdapterError
from smartmops.experts import gate, null, routes
from smartmops.experts.hidden_states import HiddenStates
from smartmops.experts.keys_values import KeysValues
from smartmops.experts.opened import Experts, Opened

from .engine import Engine

EXPERTS = ("mops_prompts", "mops_keys", "mops_values")  # parameters that hold the columns of experts


class MoPsLayer(nn.Module, BaseTunerLayer):
    """The injection layer, and the parameters of every adapter that enters there.

    Shapes, per adapter, where experts are hidden states: `mops_prompts` [K, hidden], `mops_shared` [S, hidden]; where
    they are keys and values: `mops_keys` [K, layers, kv_heads, key], `mops_values`, and `mops_shared_keys`,
    `mops_shared_values` with S for K, all in units of `mops_key_size`, `mops_value_size` [layers];
    `mops_head_weight` [layers, heads]. The gate: `mops_gate_in` [d_g, inputs]; `mops_gate_out` [groups, d_g];
    `mops_gate_bias` [groups]. Buffers, for they never train: those sizes, `mops_recovery` [R, hidden], `mops_gate_mean`
    and `mops_gate_scale` [inputs], which standardise the gate's input, the null expert's `mops_null_*`, and the rules
    of experts added later, `mops_claim_*` (see experts/routes.py).
    """

    adapter_layer_names = (
        "mops_prompts", "mops_shared", "mops_keys", "mops_values", "mops_shared_keys", "mops_shared_values",
        "mops_head_weight", "mops_gate_in", "mops_gate_out", "mops_gate_bias",
    )  # fmt: skip
    other_param_names = (
        "mops_recovery", "mops_gate_mean", "mops_gate_scale", "mops_key_size", "mops_value_size", "mops_null_basis",
        "mops_null_centres", "mops_null_direction", "mops_null_cut", "mops_claim_basis", "mops_claim_centre",
        "mops_claim_direction", "mops_claim_cut",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, index: int, engine: Engine) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.engine = engine
        self.configs: dict[str, MoPsConfig] = {}
        self.warned: set[str] = set()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, BufferDict(persistent=True))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def add(self, adapter: str, config: MoPsConfig, inference: bool) -> None:
        """Create the parameters of one adapter: random experts of the base's own size, a uniform gate."""
        if not adapter or "." in adapter or hasattr(nn.ParameterDict, adapter):
            raise AdapterError(f"adapter_name={adapter!r} cannot name parameters: choose a word without dots, such as "
                               "'default'")  # fmt: skip
        trained, frozen = fresh.parameters(self.engine.backbone, self.index, config)
        self.configs[adapter] = config
        for name, value in trained.items():
            getattr(self, name)[adapter] = nn.Parameter(value)
        for name, value in frozen.items():
            getattr(self, name)[adapter] = value
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference)

    def drop(self, adapter: str) -> None:
        """Delete one adapter's parameters, if they are here; which one acts is as it was."""
        self.configs.pop(adapter, None)
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter in (held := getattr(self, name)):
                del held[adapter]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter's parameters; where it was active, one that is left becomes so (PEFT's own contract)."""
        self.configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weight = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        if weight is None:
            return None, None
        return (halves.runs_on(base_layer) if weight.is_meta else None) or weight.device, weight.dtype

    @property
    def current(self) -> str | None:
        """The adapter of this layer that is switched on."""
        on = [name for name in self.active_adapters if name in self.configs]
        if len(on) > 1:
            raise AdapterError(f"adapters {on} are active at once: activate one with set_adapter({on[0]!r})")
        return on[0] if on and not self.disable_adapters else None

    def _float(self, name: str, adapter: str) -> Tensor:
        found: Tensor = getattr(self, name)[adapter].to(torch.float32)
        return found

    def _trained(self, name: str, adapter: str) -> Float[Tensor, "prompts ..."]:
        """Columns of all experts; no gradient reaches those that stay as they start."""
        found: Tensor = getattr(self, name)[adapter]
        kept = self._kept(found, adapter)
        return found if kept is None else torch.where(kept.view(-1, *[1] * (found.dim() - 1)), found.detach(), found)

    def _kept(self, columns: Float[Tensor, "prompts ..."], adapter: str) -> Bool[Tensor, " prompts"] | None:
        """Which columns of all experts stay as they start; None: none of them."""
        config = self.configs[adapter]
        if not config.freeze_first_column and not config.frozen_experts:
            return None
        at = torch.arange(len(columns), device=columns.device)
        kept = at % config.prompts_per_expert == 0 if config.freeze_first_column else torch.zeros_like(at).bool()
        for each in config.frozen_experts or []:
            kept = kept | (at // config.prompts_per_expert == config.named_experts.index(each))
        return kept

    def untrained(self, adapter: str) -> int:
        """How many numbers no gradient reaches though they are parameters: columns that stay, a gate over one alone."""
        count = 0
        for name in self.adapter_layer_names:
            value = getattr(self, name).get(adapter)
            if value is None or not value.requires_grad:
                continue
            if name.startswith("mops_gate"):
                count += value.numel() if self.configs[adapter].num_groups == 1 else 0
            elif name in EXPERTS and (kept := self._kept(value, adapter)) is not None:
                count += int(kept.sum()) * value[0].numel()
        return count

    def standardised(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Float[Tensor, "batch inputs"]:
        """Pooled inputs by the mean and scale of the training instructions."""
        return (pooled - self._float("mops_gate_mean", adapter)) / self._float("mops_gate_scale", adapter)

    def log_gate(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Float[Tensor, "batch groups"]:
        """Natural log of the gate weights for pooled (not yet standardised) inputs; they sum to one."""
        config = self.configs[adapter]
        mean, scale, w_in, w_out = (
            self._float(f"mops_gate_{name}", adapter) for name in ("mean", "scale", "in", "out")
        )
        how = (config.gate_temperature, config.gate_top_k, config.gate_renormalise)
        constant = self._float("mops_gate_bias", adapter) if config.gate_bias else None
        found = gate.log_gate(pooled, mean, scale, w_in, w_out, *how, constant)
        if config.routes is None:
            return found
        return routes.log_weights(found, self._held(pooled, adapter), config.routes, config.num_experts)

    def _held(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Bool[Tensor, "batch claims"] | None:
        """Which rules of experts added later hold; None: there are none."""
        if not self.configs[adapter].claims:
            return None
        rules = (self._float(f"mops_claim_{name}", adapter) for name in ("basis", "centre", "direction", "cut"))
        return routes.held(self.standardised(pooled, adapter), *rules)

    def gate(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Float[Tensor, "batch groups"]:
        """Gate weights for pooled inputs; they sum to one, less what goes to the null expert."""
        weights = self.log_gate(pooled, adapter).exp()
        lost = self.null_weight(pooled, adapter)
        return weights if lost is None else weights * (1 - lost)[:, None]

    def null_weight(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Float[Tensor, " batch"] | None:
        """Weight that goes to no expert; None where there is no null expert, and in training."""
        config = self.configs[adapter]
        if config.null_threshold <= 0:
            return torch.ones(len(pooled), device=pooled.device)
        if not config.null_expert or self.training:
            return None
        names = ("basis", "centres", "direction", "cut")
        basis, centres, direction, cut = (self._float(f"mops_null_{name}", adapter) for name in names)
        features = self.standardised(pooled, adapter)
        found = null.weight(features, basis, centres, direction, cut, config.null_threshold)
        holds = self._held(pooled, adapter)
        return found if holds is None else found.masked_fill(holds.any(-1), 0.0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """At prefill, read the gate and put the experts in front of this and all later layers; then run the layer."""
        context = kwargs.get("mops")
        if context is not None and (context.injection_layer == self.index or context.parts):
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            hidden = hidden.detach() if context.injection_layer == self.index else hidden
            args = (hidden, *args)
            if context.parts:
                mixed.read(context, self, hidden)
            elif context.gate is None:
                self.read(context, hidden)
        return self.base_layer(*args, **kwargs)

    def read(self, context: ForwardContext, hidden: Float[Tensor, "batch seq hidden"]) -> None:
        """Read the gate, and put the experts in front of this and all later layers.

        Its input is known by now, or it is what enters this layer.
        """
        adapter, config = context.adapter, self.configs[context.adapter]
        if self.training and not config.initialised:
            self._warn(adapter, config)
        if context.pooled is None:
            assert context.gate_mask is not None
            context.pooled = gate.pool(hidden, context.gate_mask.to(hidden.device), context.segments)
        pooled = context.pooled.to(hidden.device, torch.float32)
        with torch.autocast(pooled.device.type, enabled=False):
            log_g, lost = self.log_gate(pooled, adapter), self.null_weight(pooled, adapter)
            if context.gate_weights is not None:
                log_g, lost = gate.told(log_g, lost, context.gate_weights)
        context.null_weight = lost
        context.gate = log_g.exp() if lost is None else log_g.exp() * (1 - lost)[:, None]
        if lost is not None and bool((lost >= 1).all()):
            context.attended = True  # nothing is put anywhere, so the pass is the base's own, bit for bit
            return
        bias, scale = gate.bias(log_g, config.num_prompts, config.expert_scale), None
        shared, strength = bias.new_zeros(len(bias), config.shared_prompts), torch.ones_like(bias[:, 0])
        if lost is not None:
            context.leave_to_base(lost >= 1)
            bias, shared, strength = gate.dimmed(bias, lost), gate.dimmed(shared, lost), 1 - lost
        if config.gate_target == "hidden_states":
            scale = context.gate.repeat_interleave(config.num_prompts // config.num_groups, -1)
            bias = torch.zeros_like(bias)
        self._experts(adapter).put(context, Opened(bias, shared, strength, scale))

    def _experts(self, adapter: str) -> Experts:
        """An adapter's experts, made of its parameters."""
        config = self.configs[adapter]
        if config.experts == "hidden_states":
            shared = self.mops_shared[adapter] if config.shared_prompts else None
            return HiddenStates(self.engine.backbone, self.index, self._trained("mops_prompts", adapter),
                                config.num_experts, config.expert_attention == "isolated", shared)  # fmt: skip
        keys, values = (self._trained(name, adapter) for name in ("mops_keys", "mops_values"))
        if config.shared_prompts:
            keys = torch.cat([keys, self.mops_shared_keys[adapter]])
            values = torch.cat([values, self.mops_shared_values[adapter]])
        weight = self.mops_head_weight[adapter] if config.prefix_attention == "separate" else None
        return KeysValues(self.index, keys, values, self.mops_key_size[adapter], self.mops_value_size[adapter],
                          config.prefix_attention == "joint", weight)  # fmt: skip

    def _warn(self, adapter: str, config: MoPsConfig) -> None:
        """Once for each adapter that is trained from random experts though it asks for others."""
        if config.init == "random" or adapter in self.warned:
            return
        self.warned.add(adapter)
        warnings.warn(f"the experts of adapter {adapter!r} are random: call smartmops.prepare(model, tokenizer, "
                      "examples) to start them from text, or choose init='random'", stacklevel=2)  # fmt: skip
