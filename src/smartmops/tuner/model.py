"""The method as a PEFT tuner: a wrapper around the injection layer, and hooks that send prefix and gate with each pass.

Knows PEFT, masks and caches. Knows no text, no tasks, no files.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from . import attention, experts, gate, halves
from .attention import Passage, Record
from .config import MoPsConfig

NO_MERGE = "gated prompts depend on the input and cannot be merged into weights: keep the adapter, or call unload()"


class MoPsLayer(nn.Module, BaseTunerLayer):
    """The injection layer, and the parameters of every adapter that enters there.

    Shapes, per adapter: `mops_prompts` [K, hidden]; `mops_gate_in` [d_g, inputs]; `mops_gate_out` [groups, d_g]; frozen:
    `mops_recovery` [R, hidden]; `mops_gate_mean`, `mops_gate_scale` [inputs], which standardise what the gate reads.
    """

    adapter_layer_names = ("mops_prompts", "mops_gate_in", "mops_gate_out")
    other_param_names = ("mops_recovery", "mops_gate_mean", "mops_gate_scale")

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
        """Create the parameters of one adapter: random prompts of the embeddings' spread, a uniform gate."""
        hidden, width = config.base_hidden_size, config.embedding_size or config.base_hidden_size
        assert hidden is not None and width is not None
        table = self.engine.backbone.get_input_embeddings().weight
        spread = float(table.detach().float().std()) if table.is_floating_point() and not table.is_meta else 0.02
        self.configs[adapter] = config
        self.mops_prompts[adapter] = nn.Parameter(torch.randn(config.num_prompts, hidden) * spread)
        self.mops_gate_in[adapter] = nn.Parameter(torch.randn(config.gate_hidden_size, width) * (2 / width) ** 0.5)
        self.mops_gate_out[adapter] = nn.Parameter(torch.zeros(config.num_groups, config.gate_hidden_size))
        frozen = {
            "mops_recovery": torch.randn(config.num_recovery_prompts, hidden) * spread,
            "mops_gate_mean": torch.zeros(width),
            "mops_gate_scale": torch.ones(width),
        }
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
        on = [name for name in self.active_adapters if name in self.mops_prompts]
        if len(on) > 1:
            raise ValueError(f"adapters {on} are active at once: activate one with set_adapter({on[0]!r})")
        return on[0] if on and not self.disable_adapters else None

    def log_gate(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Float[Tensor, "batch groups"]:
        """Natural log of the gate weights for pooled (not yet standardised) inputs."""
        config = self.configs[adapter]
        mean, scale, w_in, w_out = (
            getattr(self, name)[adapter].to(torch.float32)
            for name in ("mops_gate_mean", "mops_gate_scale", "mops_gate_in", "mops_gate_out")
        )
        return gate.log_gate(pooled, mean, scale, w_in, w_out, config.gate_temperature, config.gate_top_k)

    def gate(self, pooled: Float[Tensor, "batch inputs"], adapter: str) -> Float[Tensor, "batch groups"]:
        """Gate weights, summing to one over the groups, for pooled inputs."""
        return self.log_gate(pooled, adapter).exp()

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
        adapter, config = passage.adapter, self.configs[passage.adapter]
        if passage.gate_embedding is not None:
            pooled = passage.gate_embedding.to(hidden.device, torch.float32)
        else:
            assert passage.gate_mask is not None
            pooled = gate.pool(hidden, passage.gate_mask.to(hidden.device))
        with torch.autocast(hidden.device.type, enabled=False):
            log_g = self.log_gate(pooled, adapter)
        passage.gate = log_g.exp()
        columns, scale = gate.bias(log_g, config.num_prompts), None
        if config.gate_target == "hidden_states":
            scale = passage.gate.repeat_interleave(config.num_prompts // config.num_groups, -1)
            columns = torch.zeros_like(columns)
        isolated = config.expert_attention == "isolated"
        prompts = self.mops_prompts[adapter]
        passage.put(
            experts.prefix(self.engine.backbone, self.index, prompts, config.num_experts, isolated, scale), columns
        )


@dataclass
class _Call:
    """One `generate` call: its gate is read from the first forward pass and kept, cache or no cache."""

    gate_mask: Tensor | None
    gate_embedding: Tensor | None
    passage: Passage | None = None


class Engine:
    """Sits on the base model: decides for each forward pass which adapter acts, what its gate reads, what came before."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.backbone = model, model.base_model
        _refuse_unsupported(model, self.backbone)
        self.wrappers: dict[int, MoPsLayer] = {}
        self.call: _Call | None = None
        self.last: Passage | None = None
        self.warned = False
        self.caches: weakref.WeakKeyDictionary[Any, Passage] = weakref.WeakKeyDictionary()
        layers = getattr(self.backbone, halves.layers_name(self.backbone))
        self.layers = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
        for layer in self.layers:
            attention.attach(layer)
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
            *(layer.register_forward_pre_hook(_before_layer, with_kwargs=True) for layer in self.layers),
        ]
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        model.__dict__["mops_engine"] = self

    @staticmethod
    def on(model: nn.Module) -> Engine:
        """The engine of a base model, made at the first call."""
        return model.__dict__.get("mops_engine") or Engine(model)

    def remove(self) -> None:
        """Leave the base model as it was found (the wrappers are taken off by `unload`)."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            attention.detach(layer)
        self.model.__dict__.pop("generate", None)
        self.model.__dict__.pop("mops_engine", None)

    def active(self) -> MoPsLayer | None:
        """The wrapper whose adapter acts, or None when all are switched off."""
        on = [wrapper for wrapper in self.wrappers.values() if wrapper.current is not None]
        if len(on) > 1:
            names = [wrapper.current for wrapper in on]
            raise ValueError(f"adapters {names} are active at once: activate one with set_adapter({names[0]!r})")
        return on[0] if on else None

    def _generate(self, *args: Any, gate_mask: Any = None, gate_embedding: Any = None, **kwargs: Any) -> Any:
        settings = [kwargs.get("generation_config"), getattr(self.model, "generation_config", None)]
        chunk = kwargs.get("prefill_chunk_size", None) or next(
            (c.prefill_chunk_size for c in settings if getattr(c, "prefill_chunk_size", None)), None
        )
        if chunk is not None and self.active() is not None:
            raise ValueError(f"prefill_chunk_size={chunk}: the gate must read the whole instruction at once: leave it unset")
        self.call = _Call(gate_mask, gate_embedding)
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.call = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        explicit, embedding = kwargs.pop("gate_mask", None), kwargs.pop("gate_embedding", None)
        if (wrapper := self.active()) is None:
            return (), kwargs
        _refuse_reentrant(self.layers, model.training)
        inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        rows, length = inputs.shape[:2]
        attended = kwargs.get("attention_mask")
        flat = attended if attended is not None and attended.dim() == 2 else None
        _refuse_packed(kwargs.get("position_ids"), flat)
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        passage = self._known(cache, past)
        if passage is None:
            passage = self._fresh(wrapper, rows, length, inputs.device, flat, kwargs.get("labels"), explicit, embedding)
        elif passage.gate is not None and len(passage.gate) != rows:
            raise ValueError(f"this cache was filled by {len(passage.gate)} rows, but {rows} came: run the prompt again")
        if flat is not None and kwargs.get("position_ids") is None and "position_ids" in names:
            kwargs["position_ids"] = (flat.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        self.last = kwargs["mops"] = passage
        if self.call is not None:
            self.call.passage = passage
        return (), kwargs

    def _known(self, cache: Any, past: int) -> Passage | None:
        if self.call is not None and self.call.passage is not None:
            return self.call.passage
        if past == 0:
            return None
        if cache not in self.caches:
            raise ValueError(f"past_key_values hold {past} tokens that were not read under this adapter: "
                             "start from an empty cache")  # fmt: skip
        return self.caches[cache]

    def _fresh(
        self, wrapper: MoPsLayer, rows: int, length: int, device: Any, attended: Any, labels: Any, mask: Any, embedding: Any
    ) -> Passage:
        adapter = wrapper.current
        assert adapter is not None
        config = wrapper.configs[adapter]
        if self.call is not None:
            mask = mask if mask is not None else self.call.gate_mask
            embedding = embedding if embedding is not None else self.call.gate_embedding
        every = torch.ones(rows, length, dtype=torch.bool, device=device) if attended is None else attended.bool()
        passage = Passage(adapter, wrapper.index)
        if config.embedding_size is not None:
            passage.gate_embedding = _embedding(embedding, config, rows)
        elif config.gate_input == "sequence":
            passage.gate_mask = every
        elif mask is not None:
            passage.gate_mask = _rows(mask, rows).bool() & every
        else:
            passage.gate_mask = every if labels is None else self._instruction(every, labels)
        if config.num_recovery_prompts:
            self._recover(passage, wrapper, config)
        return passage

    def _instruction(self, every: Tensor, labels: Tensor) -> Tensor:
        mask = every & (labels == -100)
        empty = ~mask.any(-1, keepdim=True)
        if empty.any() and not self.warned:
            self.warned = True
            warnings.warn(
                "labels cover the whole text of some rows, so the gate reads all of it: set the labels of the "
                "instruction to -100, or pass gate_mask",
                stacklevel=2,
            )
        return torch.where(empty, every, mask)

    def _recover(self, passage: Passage, wrapper: MoPsLayer, config: MoPsConfig) -> None:
        prompts = wrapper.mops_recovery[passage.adapter]
        kv = experts.prefix(self.backbone, 0, prompts, 1, False)
        if not config.keep_recovery_prompts:
            kv = {layer: pair for layer, pair in kv.items() if layer < wrapper.index}
        passage.put(kv, torch.zeros(1, len(prompts), device=prompts.device))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        passage, cache = kwargs.get("mops"), getattr(output, "past_key_values", None)
        if passage is not None and cache is not None:
            self.caches[cache] = passage


def _before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any] | None:
    """Algorithm 1 scales prompt columns before every layer; below the injection layer text never records a graph."""
    mops = kwargs.get("mops")
    scaled = isinstance(mops, Record) and mops.scale is not None
    below = isinstance(mops, Passage) and _index(layer) < mops.first
    if not scaled and not below:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = hidden * mops.scale if scaled else hidden.detach()  # type: ignore[union-attr]
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _index(layer: nn.Module) -> int:
    return int(next(attention.attention_modules(layer)).layer_idx)  # type: ignore[arg-type]


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """Repeat for beams: `generate` lays the copies of one row side by side."""
    if rows % len(tensor):
        raise ValueError(f"gate_mask or gate_embedding has {len(tensor)} rows for a batch of {rows}: give one per row")
    return tensor.repeat_interleave(rows // len(tensor), 0)


def _embedding(embedding: Tensor | None, config: MoPsConfig, rows: int) -> Tensor:
    if embedding is None:
        raise ValueError(f"this adapter's gate reads an instruction embedding of width {config.embedding_size} made by "
                         f"{config.embedder!r}: pass gate_embedding=[rows, {config.embedding_size}]")  # fmt: skip
    if embedding.shape[-1] != config.embedding_size:
        raise ValueError(f"gate_embedding has width {embedding.shape[-1]}, but embedding_size={config.embedding_size}")
    return _rows(embedding, rows)


def _refuse_unsupported(model: nn.Module, backbone: nn.Module) -> None:
    config = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: smartmops adapts decoder-only models")
    if not getattr(model, "_supports_attention_backend", False) or getattr(config, "alibi", False):
        raise ValueError(f"{kind} does not use transformers' attention registry with rotary or learned positions "
                         "(Falcon, Bloom and MPT do not): choose another architecture, such as Llama or Qwen")  # fmt: skip
    halves.layers_name(backbone)


def _refuse_reentrant(layers: list[nn.Module], training: bool) -> None:
    for layer in layers:
        if training and getattr(layer, "gradient_checkpointing", False):
            options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant", False):
                raise ValueError("use_reentrant=True loses the gradients of prompts: call gradient_checkpointing_enable("
                                 'gradient_checkpointing_kwargs={"use_reentrant": False})')  # fmt: skip
        return


def _refuse_packed(position_ids: Tensor | None, attended: Tensor | None) -> None:
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] < 2:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attended is not None:
        real = attended[:, -position_ids.shape[-1] :].bool()
        falls = falls & real[:, 1:] & real[:, :-1]
    if falls.any():
        raise ValueError("position_ids restart inside a row, so several examples are packed into it and one gate cannot "
                         "serve them: turn packing (padding_free) off")  # fmt: skip


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
        text = engine.backbone.config.get_text_config()
        peft_config.resolve(len(engine.layers), text.hidden_size)
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

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base model as it was."""
        model: nn.Module = super().unload()
        Engine.on(model).remove()
        return model

    def layer(self, adapter: str | None = None) -> MoPsLayer:
        """The wrapper that holds an adapter's parameters (default: the active adapter).

        Raises:
            ValueError: there is no such adapter.
        """
        name = adapter or self.active_adapters[0]
        for wrapper in Engine.on(self.model).wrappers.values():
            if name in wrapper.mops_prompts:
                return wrapper
        raise ValueError(f"no adapter {name!r}: there are {sorted(self.peft_config)}")

    @property
    def last_gate(self) -> Float[Tensor, "batch groups"] | None:
        """Gate weights of the latest pass of text."""
        last = Engine.on(self.model).last
        return None if last is None or last.gate is None else last.gate.detach()

    @torch.no_grad()
    def hidden_at_injection(self, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "batch seq hidden"]:
        """Hidden states entering the injection layer, as the gate meets them (recovery prompts in front, if any)."""
        engine, wrapper = Engine.on(self.model), self.layer()
        config = wrapper.configs[wrapper.current or self.active_adapters[0]]
        passage = Passage(self.active_adapters[0], wrapper.index)
        if config.num_recovery_prompts:
            engine._recover(passage, wrapper, config)
        if wrapper.index == 0:
            return engine.backbone.get_input_embeddings()(input_ids)  # type: ignore[no-any-return]
        out = halves.lower(engine.backbone, wrapper.index)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            mops=passage,
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, gate_mask: Tensor | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """What the gate reads, before standardisation: the mean over `gate_mask` of `hidden_at_injection`."""
        mask = attention_mask if gate_mask is None else gate_mask
        return gate.pool(self.hidden_at_injection(input_ids, attention_mask), mask.bool())
