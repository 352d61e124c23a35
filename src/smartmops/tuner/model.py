"""The method as a PEFT tuner: a wrapper around the injection layer holds all parameters and reads the gate.

Knows PEFT and parameters. Knows no text, no tasks, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import experts, fresh, gate, halves, head, keys_values, null, states
from .bases import refuse_changed_embeddings
from .config import MoPsConfig
from .engine import Engine
from .packed import Packed, each_nats, mean_loss
from .passage import Beside, KeyValue, Passage

NO_MERGE = "gated prompts depend on the input and cannot be merged into weights: keep the adapter, or call unload()"


class MoPsLayer(nn.Module, BaseTunerLayer):
    """The injection layer, and the parameters of every adapter that enters there.

    Shapes, per adapter, where experts are hidden states: `mops_prompts` [K, hidden], `mops_shared` [S, hidden]; where
    they are keys and values: `mops_keys` [K, layers, kv_heads, key], `mops_values`, and `mops_shared_keys`,
    `mops_shared_values` with S for K, all in units of `mops_key_size`, `mops_value_size` [layers];
    `mops_head_weight` [layers, heads]. The gate: `mops_gate_in` [d_g, inputs]; `mops_gate_out` [groups, d_g];
    `mops_gate_bias` [groups]. Frozen: those sizes, `mops_recovery` [R, hidden], `mops_gate_mean` and `mops_gate_scale`
    [inputs], which standardise the gate's input, and the null expert's `mops_null_basis`, `_centres`, `_cut`.
    """

    adapter_layer_names = (
        "mops_prompts", "mops_shared", "mops_keys", "mops_values", "mops_shared_keys", "mops_shared_values",
        "mops_head_weight", "mops_gate_in", "mops_gate_out", "mops_gate_bias",
    )  # fmt: skip
    other_param_names = (
        "mops_recovery", "mops_gate_mean", "mops_gate_scale", "mops_key_size", "mops_value_size", "mops_null_basis",
        "mops_null_centres", "mops_null_cut",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, index: int, engine: Engine) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.__dict__["engine"] = engine
        self.configs: dict[str, MoPsConfig] = {}
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, nn.ParameterDict())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def add(self, adapter: str, config: MoPsConfig, inference: bool) -> None:
        """Create the parameters of one adapter: random experts of the base's own size, a uniform gate."""
        trained, frozen = fresh.parameters(self.engine.backbone, self.index, config)
        self.configs[adapter] = config
        for name, value in trained.items():
            getattr(self, name)[adapter] = nn.Parameter(value)
        for name, value in frozen.items():
            getattr(self, name)[adapter] = nn.Parameter(value, requires_grad=False)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter's parameters."""
        self.configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        weight = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (None, None) if weight is None else (weight.device, weight.dtype)

    @property
    def current(self) -> str | None:
        """The adapter of this layer that is switched on."""
        on = [name for name in self.active_adapters if name in self.configs]
        if len(on) > 1:
            raise ValueError(f"adapters {on} are active at once: activate one with set_adapter({on[0]!r})")
        return on[0] if on and not self.disable_adapters else None

    def _float(self, name: str, adapter: str) -> Tensor:
        found: Tensor = getattr(self, name)[adapter].to(torch.float32)
        return found

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
        return gate.log_gate(pooled, mean, scale, w_in, w_out, *how, constant)

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
        basis, centres, cut = (self._float(f"mops_null_{name}", adapter) for name in ("basis", "centres", "cut"))
        return null.weight(self.standardised(pooled, adapter), basis, centres, cut, config.null_threshold)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """At prefill, read the gate and put the experts in front of this and all later layers; then run the layer."""
        passage = kwargs.get("mops")
        if isinstance(passage, Passage) and passage.first == self.index:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            args = (hidden.detach(), *args)
            if passage.gate is None:
                self._enter(passage, args[0])
        return self.base_layer(*args, **kwargs)

    def _enter(self, passage: Passage, hidden: Float[Tensor, "batch seq hidden"]) -> None:
        if passage.gate_embedding is not None:
            pooled = passage.gate_embedding.to(hidden.device, torch.float32)
        else:
            assert passage.gate_mask is not None
            mask, segments = passage.gate_mask.to(hidden.device), passage.segments
            pooled = gate.pool(hidden, mask) if segments is None else segments.mean(hidden[0], mask)
        self.enter(passage, pooled)

    def enter(self, passage: Passage, pooled: Float[Tensor, "batch inputs"]) -> None:
        """Read the gate from pooled inputs, and put the experts in front of this and all later layers."""
        adapter, config = passage.adapter, self.configs[passage.adapter]
        with torch.autocast(pooled.device.type, enabled=False):
            log_g = self.log_gate(pooled, adapter)
            passage.lost = lost = self.null_weight(pooled, adapter)
        passage.gate = log_g.exp() if lost is None else log_g.exp() * (1 - lost)[:, None]
        columns, scale = gate.bias(log_g, config.num_prompts), None
        shared = columns.new_zeros(len(columns), config.shared_prompts)
        if lost is not None:
            if bool((lost >= 1).all()):
                passage.attended = True  # nothing is put anywhere, so the pass is the base's own, bit for bit
                return
            passage.closed = lost >= 1 if bool((lost >= 1).any()) else None
            columns, shared = (gate.dimmed(each, lost) for each in (columns, shared))
        if config.gate_target == "hidden_states":
            scale = passage.gate.repeat_interleave(config.num_prompts // config.num_groups, -1)
            columns = torch.zeros_like(columns)
        if config.experts == "keys_values":
            self._put_keys_values(passage, torch.cat([columns, shared], -1), lost)
            return
        isolated = config.expert_attention == "isolated"
        prompts, backbone = self.mops_prompts[adapter], self.engine.backbone

        def make() -> dict[int, KeyValue]:
            return experts.prefix(backbone, self.index, prompts, config.num_experts, isolated, scale)

        kv = make() if scale is not None else self.engine.kept.get(adapter, prompts, backbone, make)
        passage.put(kv, columns)
        if config.shared_prompts:
            own = self.mops_shared[adapter]
            kv = self.engine.kept.get(f"shared of {adapter}", own, backbone,
                                      lambda: experts.prefix(backbone, self.index, own, 1, False))  # fmt: skip
            passage.put(kv, shared)

    def _put_keys_values(self, passage: Passage, bias: Float[Tensor, "batch columns"], lost: Tensor | None) -> None:
        adapter, config = passage.adapter, self.configs[passage.adapter]
        keys, values = self.mops_keys[adapter], self.mops_values[adapter]
        if config.shared_prompts:
            keys = torch.cat([keys, self.mops_shared_keys[adapter]])
            values = torch.cat([values, self.mops_shared_values[adapter]])
        if not torch.is_grad_enabled():  # what no row sees need not be there
            live = (bias > gate.CLOSED).any(0)
            if not bool(live.all()):
                keys, values, bias = keys[live], values[live], bias[:, live]
        kv = keys_values.prefix(self.index, keys, values, self.mops_key_size[adapter], self.mops_value_size[adapter])
        if config.prefix_attention == "joint":
            passage.put(kv, bias)
            return
        strength = torch.ones_like(bias[:, 0]) if lost is None else 1 - lost
        weights = self.mops_head_weight[adapter] if config.prefix_attention == "separate" else None
        for number, (layer, (key, value)) in enumerate(kv.items()):
            passage.beside[layer] = Beside(key, value, bias, strength, None if weights is None else weights[number])


class MoPsModel(BaseTuner):
    """Mixture of Prompts over a frozen causal language model; made by `peft.get_peft_model(model, MoPsConfig(...))`."""

    prefix: str = "mops_"
    tuner_layer_cls = MoPsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's own signature

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def _prepare_adapter_config(self, peft_config: MoPsConfig, model_config: dict[str, Any]) -> MoPsConfig:
        engine = Engine.on(self.model)
        peft_config.resolve(len(engine.layers), halves.hidden_size(engine.backbone))
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        for name in ("prompts_per_expert", "shared_prompts"):
            if (count := getattr(peft_config, name)) > room:
                raise ValueError(f"{name}={count}, but this model has {room} positions: choose {room} at most")
        runs = peft_config.experts == "hidden_states" or peft_config.num_recovery_prompts > 0
        refuse_changed_embeddings(self.model, engine.backbone, engine.layers[0], runs)
        wrapped = {id(layer.get_base_layer()) for layer in engine.wrappers.values()}
        layer = engine.layers[peft_config.injection_layer]  # type: ignore[index]
        if id(layer) in wrapped:
            layer = engine.wrappers[peft_config.injection_layer]  # type: ignore[index]
        peft_config.target_modules = {next(name for name, module in self.model.named_modules() if module is layer)}
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: MoPsConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self, peft_config: MoPsConfig, adapter_name: str, target: Any, target_name: str, parent: Any, **_: Any
    ) -> None:
        engine = Engine.on(self.model)
        if not isinstance(target, MoPsLayer):
            index = peft_config.injection_layer
            assert index is not None
            target = MoPsLayer(target, index, engine)
            target.train(self.model.training)
            engine.wrappers[index] = target
            parent._modules[target_name] = target
        target.set_adapter(self.active_adapters)
        target.add(adapter_name, peft_config, peft_config.inference_mode)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        parent._modules[child_name] = new_module

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(NO_MERGE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            ValueError: always; the message says why and what to do instead.
        """
        raise ValueError(NO_MERGE)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, MoPsLayer):
                module.requires_grad_(False)  # another method's adapter underneath is part of the frozen base

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: value for name, value in found.items() if f".{cls.prefix}" in name}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():  # PEFT's casts make new parameters, which are trainable
            for name in MoPsLayer.other_param_names if isinstance(module, MoPsLayer) else ():
                if adapter_name in getattr(module, name):
                    getattr(module, name)[adapter_name].requires_grad_(False)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, MoPsLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)

    def unload(self) -> nn.Module:
        """Take every adapter of ours off and return the base model as it was."""
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, MoPsLayer | AuxiliaryTrainingWrapper):
                continue
            parent = self.model.get_submodule(name.rpartition(".")[0])
            own = module.base_layer if isinstance(module, MoPsLayer) else module.original_module
            parent._modules[name.rpartition(".")[2]] = own
        Engine.on(self.model).remove()
        if self.model.__dict__.get("peft_config") is self.peft_config:
            del self.model.peft_config
        model: nn.Module = self.model
        return model

    def layer(self, adapter: str | None = None) -> MoPsLayer:
        """The wrapper that holds an adapter's parameters (default: the active adapter).

        Raises:
            ValueError: there is no such adapter.
        """
        name = adapter or self.active_adapters[0]
        wrappers: list[MoPsLayer] = list(Engine.on(self.model).wrappers.values())
        for wrapper in wrappers:
            if name in wrapper.configs:
                return wrapper
        raise ValueError(f"no adapter {name!r}: there are {sorted(self.peft_config)}")

    def forward(self, *args: Any, packed: Packed | Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """The base model's `forward`; with `packed`, the mean loss of examples laid end to end (`packed.Packed`)."""
        if packed is None:
            return self.model(*args, **kwargs)
        batch = self._reduced(Packed.of(packed))
        at, targets = batch.targets()
        hidden = self._through(batch)[at]
        return CausalLMOutputWithPast(loss=mean_loss(self._head, hidden, targets, self._vocabulary))

    @torch.no_grad()
    def nats(self, packed: Packed | Mapping[str, Tensor]) -> Float[Tensor, " tokens"]:
        """Nats of each labelled token of a packed batch, 0 elsewhere (on the position that predicts it)."""
        batch = Packed.of(packed)
        at, targets = batch.targets()
        found = torch.zeros(len(batch.labels), device=targets.device)
        reduced = self._reduced(batch)
        hidden = self._through(reduced)[reduced.targets()[0]]
        found[at] = each_nats(self._head, hidden, targets, self._vocabulary)
        return found

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _head(self, hidden: Float[Tensor, "some hidden"]) -> Float[Tensor, "some vocabulary"]:
        return head.logits(self.model, hidden)

    @torch.no_grad()
    def lower(
        self, batch: Packed | Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "segments inputs"] | None]:
        """Of packed tokens, what enters the injection layer, and what the gate reads (before standardisation).

        Neither changes while experts and gate are trained. With adapters off: what enters the final norm, and None.
        """
        return states.below(Engine.on(self.model), Packed.of(batch))

    @torch.no_grad()
    def answers(self, batch: Packed | Mapping[str, Tensor]) -> Packed:
        """Of packed tokens, all that training needs where answers alone see experts; none of it ever changes."""
        return states.answers(Engine.on(self.model), Packed.of(batch))

    def _reduced(self, batch: Packed) -> Packed:
        wrapper = Engine.on(self.model).active()
        if wrapper is None or batch.past_keys is not None:
            return batch
        return self.answers(batch) if wrapper.configs[wrapper.current].visible_to == "answers" else batch

    def _through(self, batch: Packed) -> Float[Tensor, "tokens hidden"]:
        """Normed last hidden states, from tokens or from hidden states at the injection layer."""
        engine = Engine.on(self.model)
        passage = states.passage(engine, batch)
        hidden, pooled = states.below(engine, batch)
        if (wrapper := engine.active()) is not None:
            wrapper.enter(passage, pooled)
            engine.last = passage
        above = halves.upper(engine.backbone, passage.first)
        dtype = next(p.dtype for p in engine.backbone.parameters() if p.is_floating_point())
        out: Tensor = above(inputs_embeds=hidden[None].to(dtype), **states.packed(passage)).last_hidden_state
        return out[0]

    @property
    def last_gate(self) -> Float[Tensor, "batch groups"] | None:
        """Gate weights of the latest pass of text."""
        last = Engine.on(self.model).last
        return None if last is None or last.gate is None else last.gate.detach()

    @property
    def last_null(self) -> Float[Tensor, " batch"] | None:
        """What the latest pass of text left to the base; None where there is no null expert."""
        last = Engine.on(self.model).last
        return None if last is None or last.lost is None else last.lost.detach()

    @torch.no_grad()
    def hidden_at_injection(self, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "batch seq hidden"]:
        """Hidden states entering the injection layer (recovery prompts in front, if any)."""
        wrapper = self.layer()
        return states.entering(wrapper, self.active_adapters[0], wrapper.index, input_ids, attention_mask)

    @torch.no_grad()
    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, gate_mask: Tensor | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """What the gate reads, before standardisation: the mean over `gate_mask` of what enters the gate's layer."""
        mask, wrapper = attention_mask if gate_mask is None else gate_mask, self.layer()
        config = wrapper.configs[wrapper.current or self.active_adapters[0]]
        layer = wrapper.index if config.gate_layer is None else config.gate_layer
        hidden = states.entering(wrapper, self.active_adapters[0], layer, input_ids, attention_mask)
        return gate.pool(hidden, mask.bool())
