"""Decides, for each forward pass of the base model, which adapter acts, what its gate may read and what came before.

Knows masks, caches and `generate`. Knows no adapter's parameters: a wrapper (see model.py) is told of a pass and acts.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.cache_utils import Cache

from smartmops.adapter.config import MoPsConfig
from smartmops.attention import attached
from smartmops.attention.context import ForwardContext
from smartmops.attention.packed import text_positions
from smartmops.backbone import bases, following, growing, halves
from smartmops.calls import call, mixed, packing, reading, trainers
from smartmops.calls.call import Told
from smartmops.checks.errors import AdapterError
from smartmops.experts import gate
from smartmops.experts.hidden_states import HiddenStates

from . import first_pass


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit weights as backward needs them.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in the first pass in eval mode without gradient, and
    every later gradient through them is silently wrong (cosine 0.04 with the right one).

    Raises:
        AdapterError: some are repacked already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise AdapterError(
                    f"the 4-bit weights of {name} were repacked by a pass without gradient, and "
                    "gradients through them are now wrong: load the model again and adapt it first"
                )


class Engine:
    """Sits on the base model and sends each forward pass on its way with what the attention will need."""

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        bases.check(model)
        self.backbone: Any = halves.backbone_of(model)
        keep_unpacked(model)
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]  # what `forward` takes, in order
        self.wrappers: dict[int, Any] = {}
        self.last: ForwardContext | None = None
        self.said: set[str] = set()  # warnings, each of which is given once
        layers = getattr(self.backbone, halves.layers_name(self.backbone))
        self.layers = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
        for number, layer in enumerate(self.layers):
            attached.check(layer, number)
        for layer in self.layers:
            attached.attach(layer)
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        model.generate = self._generate
        for name in call.BATCHING_CALLS:
            setattr(model, name, functools.partial(call.refuse_batching, name))
        model.mops_engine = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None}  # a copy has read no text, and a graph cannot be copied

    @staticmethod
    def on(model: nn.Module) -> Engine:
        """The engine of a base model, made at the first call; under another adapter (LoRA) it sits on the model."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        return getattr(inner, "mops_engine", None) or Engine(inner)

    def remove(self) -> None:
        """Leave the base model as it was found (the wrappers are taken off by `unload`)."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            attached.detach(layer)
        for name in ("generate", *call.BATCHING_CALLS, "mops_engine"):
            delattr(self.model, name)

    @property
    def call(self) -> call.Call | None:
        """The `generate` call of this model that runs in this thread."""
        found = call.running.get()
        return found if found is not None and found.engine is self else None

    def active(self) -> Any:
        """The wrapper whose adapter acts, or None when all are switched off."""
        on = [wrapper for wrapper in self.wrappers.values() if wrapper.current is not None]
        if len(on) > 1:
            names = [wrapper.current for wrapper in on]
            raise AdapterError(f"adapters {names} are active at once: activate one with set_adapter({names[0]!r})")
        if on:
            attached.refuse_changed(self.layers[0])
        return on[0] if on else None

    def wrapper_of(self, adapter: str) -> Any:
        """The wrapper that holds an adapter's parameters; None: there is no such adapter."""
        return next((wrapper for wrapper in self.wrappers.values() if adapter in wrapper.configs), None)

    @property
    def latest(self) -> ForwardContext | None:
        """The latest pass of text, as long as an adapter is on."""
        return None if self.active() is None else self.last

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        told = Told.taken(kwargs)
        given = call.named(self.model, args, kwargs)
        if self.active() is not None:
            call.refuse(given, self.model)
            if getattr(given.get("past_key_values"), "mops", None) is not None:
                call.start_over(given, self._headers(given["past_key_values"]), told)
        token = call.running.set(call.Call.of(self, given, told))
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            call.running.reset(token)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        if "packed" in kwargs:
            raise AdapterError("a packed batch reached the base model: make the adapter with task_type='CAUSAL_LM'")
        told = Told.taken(kwargs)
        self.last = None
        if (wrapper := self.active()) is None:
            return (), kwargs
        if getattr(model, "_is_replica", False):
            raise AdapterError("nn.DataParallel copies a model without its adapters' parameters: start one process for "
                               "each GPU with torchrun, or let CUDA_VISIBLE_DEVICES name one")  # fmt: skip
        _refuse_reentrant(self.layers, model.training)
        call.refuse_unread(kwargs)
        inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            return (), kwargs  # the model says what it wants
        rows, length = inputs.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.call is not None and past == 0:
            self.call.begin(inputs)
        flat = self._flat(kwargs.get("attention_mask"), rows, length, past)
        packing.refuse_positions(kwargs.get("position_ids"), flat)
        names = mixed.names_of(self, rows) or [wrapper.current] * rows
        given, several = kwargs.get("input_ids"), past > 0 and length > 1 and self.call is None
        headers = self._headers(cache) if several else []  # one token may be the answer's own
        if given is not None and reading.opens_answer(given, headers):
            raise AdapterError(f"input_ids {call.FURTHER}")
        context = self._known(cache, past, names, given)
        text = None if context is None or headers or not several else context.text
        if text is not None and past >= text.shape[1]:  # not what a cropped cache gets back
            self._say(call.FOLLOWED)
        call.refuse_told(told, 0 if context is None else past)
        if flat is not None and kwargs.get("position_ids") is None and "position_ids" in self.names:
            kwargs["position_ids"] = text_positions(flat)[:, -length:]
        if new := context is None:
            real = torch.ones(rows, length, dtype=torch.bool, device=inputs.device) if flat is None else flat.bool()
            if self.call is not None:
                growing.make_room(cache)
                self.call.now.once = first_pass.once(self, names, kwargs, real)
            context = self._begun(names, kwargs, real, told)
        context.look(past, length)
        self.last = kwargs["mops"] = context
        if self.call is not None and new:
            self.call.now.context = context
            kwargs = first_pass.arranged(self, kwargs, real, context)
        return (), kwargs

    def _begun(self, names: list[str], kwargs: dict[str, Any], real: Tensor, told: Told) -> ForwardContext:
        """The context of a text that was not read before, by one adapter or by several."""
        if self.call is not None and self.call.now.own:  # what the pass is not told, `generate` may have been
            told = Told(*(before if now is None else now for now, before in zip(told, self.call.told, strict=True)))
        told = told.each(lambda given: _rows(given, len(real)))
        if len(set(names)) == 1 and names[0] != mixed.BASE:
            return self.fresh(names[0], kwargs, real, told)
        return mixed.begin(self, names, kwargs, real, told)

    def _flat(self, mask: Any, rows: int, length: int, past: int) -> Any:
        """[rows, past and new tokens]: which tokens are real, from a 2-D, 4-D or per-layer-type mask."""
        pairs = reading.each_pair(mask)
        if pairs is None:
            return mask
        given = self.call.attended if self.call is not None and self.call.now.own else None
        if given is not None and given.dim() == 2 and given.shape[1] == length:
            return _rows(given, rows)
        found = reading.shown(pairs, past).expand(rows, -1)
        return found if found.shape[1] == past + length else None  # a sliding cache tells of its window alone

    def _known(self, cache: Any, past: int, names: list[str], ids: Tensor | None) -> ForwardContext | None:
        """What is known of a text that goes on behind `past` tokens."""
        if past == 0:  # without a cache, a text comes whole again for each token
            return None if self.call is None or cache is not None else self.call.now.context
        found: ForwardContext | None = getattr(cache, "mops", None)  # it goes where the cache goes: copies, threads
        if found is None:
            raise AdapterError(f"past_key_values hold {past} tokens that were not read under this adapter: "
                               "start from an empty cache")  # fmt: skip
        if (filled := found.row_adapters or [found.adapter] * len(names)) != names:
            was, now = (" and ".join(sorted(set(each))) for each in (filled, names))
            raise AdapterError(f"past_key_values were filled by adapter {was}, and now {now} is to go on: use the "
                               "same, or an empty cache")  # fmt: skip
        if found.gate is not None and len(found.gate) != len(names):
            raise AdapterError(
                f"this cache was filled by {len(found.gate)} rows, but {len(names)} came: run the prompt again"
            )
        if found.text is not None and past < found.text.shape[1] and not reading.comes_again(found.text, ids, past):
            raise AdapterError(f"{'inputs_embeds' if ids is None else 'input_ids'} {call.CROPPED}")
        return found

    def _headers(self, cache: Any) -> list[list[int]]:
        """What opens an answer, by the adapters that filled a cache; of one that they did not fill, nothing."""
        found: ForwardContext | None = getattr(cache, "mops", None)
        names = set() if found is None else {*(found.row_adapters or [found.adapter])} - {mixed.BASE}
        configs = [wrapper.configs[name] for name in names if (wrapper := self.wrapper_of(name))]
        return [config.answer_header for config in configs if config.answer_header]

    def context(self, adapter: str, always: bool = False) -> ForwardContext:
        """Of an adapter, recovery prompts in front, where they belong to it or (where no gate is read) `always`."""
        wrapper = self.wrapper_of(adapter)
        config, found = wrapper.configs[adapter], ForwardContext(adapter, wrapper.index)
        if config.num_recovery_prompts and (always or config.null_threshold > 0):
            prompts = wrapper.mops_recovery[adapter]
            kv = HiddenStates(self.backbone, 0, prompts).columns()
            if not config.keep_recovery_prompts:
                kv = {layer: pair for layer, pair in kv.items() if layer < wrapper.index}
            found.put(kv, torch.zeros(1, len(prompts), device=prompts.device))
        return found

    def fresh(self, adapter: str, kwargs: dict[str, Any], real: Tensor, told: Told) -> ForwardContext:
        """What is known of a text before its first layer: what the gate may read, and who sees experts."""
        wrapper, chosen = self.wrapper_of(adapter), told.mask
        config = wrapper.configs[adapter]
        if wrapper.mops_gate_in[adapter].is_meta and not any(p.is_meta for p in wrapper.base_layer.parameters()):
            raise AdapterError(f"adapter {adapter!r} was made with low_cpu_mem_usage=True and its weights were not "
                               "loaded: load them, or leave that unset")  # fmt: skip
        context, ids = self.context(adapter), self._ids(kwargs, config, chosen)
        if told.weights is not None:
            context.gate_weights = gate.checked(told.weights, config.num_experts).to(real.device)
        labels = self._labels(kwargs, real)
        real = self._before_answer(real)
        if labels is not None:
            packing.refuse(real, ids, labels, wrapper.training)
        if config.visible_to == "answers":
            context.visible_from = reading.answer_starts(ids, real, labels, config.answer_header)
            if labels is None and not config.answer_header and self.call is None and real.shape[1] > 1:
                self._say("no labels came with this text, and this adapter knows nothing that opens an answer, so the "
                          "last token of each row alone sees experts, as where an answer is about to begin: give labels"
                          ", -100 on the instruction, to score one that is there")  # fmt: skip
        if config.embedding_size is not None:
            if self.call is not None and not self.call.now.own:
                raise AdapterError(f"guidance_scale compares with another text, whose embedding by {config.embedder!r} "
                                   "this adapter's gate would need: leave it unset")  # fmt: skip
            context.pooled = _embedding(told.embedding, config)
            return context
        context.gate_mask = real
        if config.gate_input == "instruction":
            if chosen is not None and self.call is not None and chosen.shape[1] == self.call.now.length:
                chosen = F.pad(chosen, (0, real.shape[1] - chosen.shape[1]))
            if chosen is None and not config.gate_is_idle and told.weights is None:
                self._warn_of(real, labels, config)
            frame = config.gate_frame if config.gate_reads == "own" else None
            context.gate_mask = reading.instruction(ids, real, labels, context.visible_from, frame, chosen)
            reading.refuse_sight(kwargs.get("attention_mask"), context.gate_mask, real, labels)
        if not config.gate_is_idle and (told.weights is None or bool(told.weights.isnan().any())):
            context.text = reading.rests_on(ids, real, context.gate_mask)
        once = self.call is not None and self.call.now.once
        if not once and (config.reads_ahead or config.visible_to == "answers"):
            context.pooled = self._read_ahead(context, kwargs, real, config)
        return context

    def _before_answer(self, real: Bool[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq"]:
        """Of a first pass, what was there before anything was generated or guessed."""
        if self.call is None or self.call.now.length is None:
            return real
        return real & (torch.arange(real.shape[1], device=real.device) < self.call.now.length)

    def _ids(self, kwargs: dict[str, Any], config: MoPsConfig, mask: Any) -> Tensor | None:
        """The token ids of a pass; of embeddings, where the caller of `generate` gave both.

        Raises:
            AdapterError: there are embeddings alone, and the adapter finds by ids where an answer or a turn begins.
        """
        ids: Tensor | None = kwargs.get("input_ids")
        if ids is None and self.call is not None:
            ids = self.call.ids_of(kwargs["inputs_embeds"])
        if ids is not None:
            return ids
        if config.visible_to == "answers" and config.answer_header:
            raise AdapterError("inputs_embeds hide the header of the answer, from which on this adapter acts: give "
                               "input_ids (generate takes both)")  # fmt: skip
        reads = config.gate_input == "instruction" and config.embedding_size is None and mask is None
        if reads and config.gate_reads == "own" and config.gate_frame is not None:
            raise AdapterError("inputs_embeds hide where the user's turns begin, which alone this adapter's gate "
                               "reads: give input_ids (generate takes both), or a gate_mask")  # fmt: skip
        return None

    def _labels(self, kwargs: dict[str, Any], real: Tensor) -> Tensor | None:
        """The labels of a batch, also where a trainer took them off before the model was called."""
        found: Tensor | None = kwargs.get("labels")
        return trainers.labels(real) if found is None and self.call is None else found

    def _warn_of(self, real: Bool[Tensor, "rows seq"], labels: Tensor | None, config: MoPsConfig) -> None:
        """Say once where labels leave the gate nothing of worth, may be those of several examples, or are not there.

        Raises:
            AdapterError: what the gate was to read was left behind by the trainer.
        """
        said = packing.doubt(real, labels, self.model.training)
        if config.gate_reads == "own" and config.gate_frame is None and said is None:
            said = ("this adapter's gate was taught what users wrote alone, and nothing says where that stands: give "
                    "gate_mask, as smartmops.render makes it, or it reads what a template adds too")  # fmt: skip
        if self.call is None:
            trainers.refuse_dropped()
        if said is not None:
            self._say(said)

    def _say(self, warning: str) -> None:
        if warning not in self.said:
            self.said.add(warning)
            warnings.warn(warning, stacklevel=2)

    @torch.no_grad()
    def _read_ahead(self, context: ForwardContext, kwargs: dict[str, Any], real: Tensor, config: MoPsConfig) -> Tensor:
        """What the gate reads, [rows, hidden], from a pass of the bare base up to the gate's layer."""
        assert context.gate_mask is not None
        given = {n: kwargs[n] for n in ("input_ids", "inputs_embeds", "position_ids") if kwargs.get(n) is not None}
        carried = ForwardContext(injection_layer=len(self.layers), prefix=dict(context.prefix))
        layer = context.injection_layer if config.gate_layer is None else config.gate_layer
        given["attention_mask"] = real.long()
        if self.call is None and reading.each_pair(kwargs.get("attention_mask")) is not None:
            given["attention_mask"] = kwargs["attention_mask"]
        # A context of its own: transformers collects the text's `output_hidden_states` through a context variable.
        out = contextvars.copy_context().run(halves.lower(self.backbone, layer), **given, use_cache=False, mops=carried)
        return gate.pool(out.last_hidden_state, context.gate_mask.to(out.last_hidden_state.device))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        context, cache = kwargs.get("mops"), kwargs.get("past_key_values")
        if cache is None:
            made = getattr(output, "past_key_values", None)
            among = output if isinstance(output, tuple) else ()
            cache = made if made is not None else next((each for each in among if isinstance(each, Cache)), None)
        if context is not None and not context.attended:
            raise AdapterError(f"no attention module of {type(model).__name__} saw the prompts: its layers do not hand "
                               "on what they carry; please report the architecture")  # fmt: skip
        if context is not None and cache is not None:
            following.put(cache, context)
        return output if context is None else first_pass.finished(self, context, cache, output)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """Repeat for beams: `generate` lays the copies of one row side by side."""
    if rows % len(tensor):
        raise AdapterError(
            f"gate_mask, gate_embedding or gate_weights has {len(tensor)} rows for a batch of {rows}: give one per row"
        )
    return tensor.repeat_interleave(rows // len(tensor), 0)


def _embedding(embedding: Tensor | None, config: MoPsConfig) -> Tensor:
    if embedding is None:
        raise AdapterError(f"this adapter's gate reads an instruction embedding of width {config.embedding_size} made "
                           f"by {config.embedder!r}: pass gate_embedding=[rows, {config.embedding_size}]")  # fmt: skip
    if embedding.shape[-1] != config.embedding_size:
        raise AdapterError(
            f"gate_embedding has width {embedding.shape[-1]}, but embedding_size={config.embedding_size}"
        )
    return embedding


def _refuse_reentrant(layers: list[nn.Module], training: bool) -> None:
    for layer in layers:
        if training and getattr(layer, "gradient_checkpointing", False):
            options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            if options.get("use_reentrant", False):
                raise AdapterError("use_reentrant=True loses the gradients of prompts: enable checkpointing with "
                                   'gradient_checkpointing_kwargs={"use_reentrant": False}')  # fmt: skip
        return
