"""Decides, for each forward pass of the base model, which adapter acts, what its gate may read and what came before.

Knows masks, caches and `generate`. Knows no adapter's parameters: a wrapper (see model.py) is told of a pass and acts.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import attention, experts, growing, halves, prefill
from .attention import Passage
from .config import MoPsConfig
from .packed import text_positions


@dataclass
class _Call:
    """One `generate` call: its gate is read from the first forward pass and kept, cache or no cache."""

    gate_mask: Tensor | None
    gate_embedding: Tensor | None
    attended: Tensor | None  # as the caller gave it: `generate` may turn it into a 4-D mask before we see it
    passage: Passage | None = None


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit weights as backward needs them.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first pass in eval mode without gradient, and
    every later gradient through them is silently wrong (cosine 0.04 with the right one).

    Raises:
        ValueError: some are repacked already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(f"the 4-bit weights of {name} were repacked by a pass without gradient, and gradients "
                                 "through them are now wrong: load the model again and adapt it first")  # fmt: skip


class Engine:
    """Sits on the base model and sends each forward pass on its way with what the attention will need."""

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.backbone: Any = model.base_model
        _refuse_unsupported(model, self.backbone)
        keep_unpacked(model)
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]  # what `forward` takes, in order
        self.wrappers: dict[int, Any] = {}
        self.call: _Call | None = None
        self.last: Passage | None = None
        self.warned = False
        self.kept = experts.Kept()
        self.caches: weakref.WeakKeyDictionary[Any, Passage] = weakref.WeakKeyDictionary()
        layers = getattr(self.backbone, halves.layers_name(self.backbone))
        self.layers = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
        for layer in self.layers:
            attention.check(layer)
        _refuse_scaled_embeddings(model, self.backbone, self.layers[0])
        for layer in self.layers:
            attention.attach(layer)
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        model.__dict__["mops_engine"] = self

    @staticmethod
    def on(model: nn.Module) -> Engine:
        """The engine of a base model, made at the first call; under another adapter (LoRA) it sits on the model."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        return inner.__dict__.get("mops_engine") or Engine(inner)

    def remove(self) -> None:
        """Leave the base model as it was found (the wrappers are taken off by `unload`)."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            attention.detach(layer)
        self.model.__dict__.pop("generate", None)
        self.model.__dict__.pop("mops_engine", None)

    def active(self) -> Any:
        """The wrapper whose adapter acts, or None when all are switched off."""
        on = [wrapper for wrapper in self.wrappers.values() if wrapper.current is not None]
        if len(on) > 1:
            names = [wrapper.current for wrapper in on]
            raise ValueError(f"adapters {names} are active at once: activate one with set_adapter({names[0]!r})")
        return on[0] if on else None

    def _generate(self, *args: Any, gate_mask: Any = None, gate_embedding: Any = None, **kwargs: Any) -> Any:
        settings = [kwargs.get("generation_config"), getattr(self.model, "generation_config", None)]
        chunks = [kwargs.get("prefill_chunk_size"), *(getattr(each, "prefill_chunk_size", None) for each in settings)]
        chunk = next((size for size in chunks if size is not None), None)
        if chunk is not None and self.active() is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk}: the gate must read the whole instruction at once: leave it unset"
            )
        self.call = _Call(gate_mask, gate_embedding, kwargs.get("attention_mask"))
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.call = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        if "packed" in kwargs:
            raise ValueError("a packed batch reached the base model: make the adapter with task_type='CAUSAL_LM'")
        explicit, embedding = kwargs.pop("gate_mask", None), kwargs.pop("gate_embedding", None)
        if (wrapper := self.active()) is None:
            return (), kwargs
        _refuse_reentrant(self.layers, model.training)
        inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        rows, length = inputs.shape[:2]
        flat = self._flat(kwargs.get("attention_mask"), rows, length)
        _refuse_packed(kwargs.get("position_ids"), flat)
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        passage = self._known(cache, past)
        if fresh := passage is None:
            if self.call is not None:
                growing.make_room(cache)
            passage = self._fresh(wrapper, rows, length, inputs.device, flat, kwargs.get("labels"), explicit, embedding)
        elif passage.gate is not None and len(passage.gate) != rows:
            raise ValueError(
                f"this cache was filled by {len(passage.gate)} rows, but {rows} came: run the prompt again"
            )
        if flat is not None and kwargs.get("position_ids") is None and "position_ids" in self.names:
            kwargs["position_ids"] = text_positions(flat)[:, -length:]
        self.last = kwargs["mops"] = passage
        if self.call is not None:
            self.call.passage = passage
            if fresh and prefill.packable(model, self.names, kwargs, flat):
                kwargs = prefill.pack(kwargs, flat.bool(), passage)
        return (), kwargs

    def _flat(self, mask: Any, rows: int, length: int) -> Any:
        """[rows, seq]: which tokens are real, from a 2-D, 4-D or per-layer-type mask."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None or mask.dim() == 2:
            return mask
        given = None if self.call is None else self.call.attended
        if given is not None and given.dim() == 2 and given.shape[1] == length:
            return _rows(given, rows)
        own = mask[:, 0, :, :length].diagonal(dim1=-2, dim2=-1)  # a real token sees itself, in any sliding window
        return (own if own.dtype == torch.bool else own > -1).expand(rows, -1)

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
        self, wrapper: Any, rows: int, length: int, device: Any, attended: Any, labels: Any, mask: Any, embedding: Any
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
            passage.gate_mask = _readable(_rows(mask, rows), every)
        else:
            passage.gate_mask = every if labels is None else self._instruction(every, labels)
        if config.num_recovery_prompts:
            self.recover(passage, wrapper, config)
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

    def recover(self, passage: Passage, wrapper: Any, config: MoPsConfig) -> None:
        """Put the recovery prompts in front of every layer, or only below the injection layer."""
        prompts = wrapper.mops_recovery[passage.adapter]
        kv = self.kept.get(f"recovery of {passage.adapter}", prompts, self.backbone,
                           lambda: experts.prefix(self.backbone, 0, prompts, 1, False))  # fmt: skip
        if not config.keep_recovery_prompts:
            kv = {layer: pair for layer, pair in kv.items() if layer < wrapper.index}
        passage.put(kv, torch.zeros(1, len(prompts), device=prompts.device))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        passage, cache = kwargs.get("mops"), getattr(output, "past_key_values", None)
        if passage is not None and not passage.attended:
            raise ValueError(f"no attention module of {type(model).__name__} saw the prompts: its layers do not hand "
                             "on what they carry; please report the architecture")  # fmt: skip
        if passage is not None and cache is not None:
            self.caches[cache] = passage
        return output if passage is None or passage.segments is None else prefill.unpack(output, passage)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """Repeat for beams: `generate` lays the copies of one row side by side."""
    if rows % len(tensor):
        raise ValueError(f"gate_mask or gate_embedding has {len(tensor)} rows for a batch of {rows}: give one per row")
    return tensor.repeat_interleave(rows // len(tensor), 0)


def _readable(mask: Tensor, every: Tensor) -> Tensor:
    if mask.shape != every.shape:
        raise ValueError(f"gate_mask is of shape {list(mask.shape)} for tokens of shape {list(every.shape)}: give one "
                         "entry per token")  # fmt: skip
    readable = mask.bool() & every
    if not readable.any(-1).all():
        row = int((~readable.any(-1)).nonzero()[0])
        raise ValueError(f"gate_mask lets the gate read no token of row {row}: set 1 on the tokens of its instruction")
    return readable


def _embedding(embedding: Tensor | None, config: MoPsConfig, rows: int) -> Tensor:
    if embedding is None:
        raise ValueError(f"this adapter's gate reads an instruction embedding of width {config.embedding_size} made by "
                         f"{config.embedder!r}: pass gate_embedding=[rows, {config.embedding_size}]")  # fmt: skip
    if embedding.shape[-1] != config.embedding_size:
        raise ValueError(f"gate_embedding has width {embedding.shape[-1]}, but embedding_size={config.embedding_size}")
    return _rows(embedding, rows)


def _refuse_unsupported(model: Any, backbone: Any) -> None:
    config = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: smartmops adapts decoder-only models")
    if getattr(config, "alibi", False):
        raise ValueError(f"{kind} uses ALiBi positions, which prompts have none of: choose another architecture")
    halves.layers_name(backbone)


class _Seen(Exception):
    """Carries what enters the first layer out of a forward pass that ends there."""


@torch.no_grad()
def _refuse_scaled_embeddings(model: Any, backbone: Any, first: nn.Module) -> None:
    """Prompts are handed over as `inputs_embeds`: a backbone that changes those on the way in would change prompts."""
    weight = next((p for p in first.parameters() if p.is_floating_point()), None)
    if weight is None or weight.is_meta:
        return

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(args[0] if args else kwargs["hidden_states"])

    given = torch.linspace(-1, 1, halves.hidden_size(backbone), device=weight.device, dtype=weight.dtype)[None, None]
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        halves.upper(backbone, 0)(inputs_embeds=given, use_cache=False)
    except _Seen as seen:
        if not torch.equal(seen.args[0], given):
            raise ValueError(f"{type(model).__name__} changes inputs_embeds before its first layer (it scales or "
                             "normalises them): choose another architecture, such as Llama") from None  # fmt: skip
    finally:
        handle.remove()


def _refuse_reentrant(layers: list[nn.Module], training: bool) -> None:
    for layer in layers:
        if training and getattr(layer, "gradient_checkpointing", False):
            options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant", False):
                raise ValueError("use_reentrant=True loses the gradients of prompts: enable checkpointing with "
                                 'gradient_checkpointing_kwargs={"use_reentrant": False}')  # fmt: skip
        return


def _refuse_packed(position_ids: Tensor | None, attended: Tensor | None) -> None:
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] < 2:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attended is not None:
        real = attended[:, -position_ids.shape[-1] :].bool()
        falls = falls & real[:, 1:] & real[:, :-1]
    if falls.any():
        raise ValueError("position_ids restart inside a row, so several examples are packed into it and one gate "
                         "cannot serve them: turn packing (padding_free) off")  # fmt: skip
