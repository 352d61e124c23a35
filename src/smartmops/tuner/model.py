"""The method as a PEFT tuner: adapters come, take turns and go, each in the wrapper of its injection layer.

Knows PEFT and its life cycle. Knows no text, no tasks, no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from smartmops.adapter import registry, stored
from smartmops.adapter.config import MoPsConfig
from smartmops.attention import attached
from smartmops.attention.packed import Packed, each_nats, mean_loss
from smartmops.backbone import halves, head
from smartmops.backbone.bases import refuse_changed_embeddings
from smartmops.calls import mixed
from smartmops.checks.errors import AdapterError
from smartmops.experts import gate, keys_values

from . import states
from .engine import Engine
from .layer import MoPsLayer

NO_MERGE = "gated prompts depend on the input and cannot be merged into weights: keep the adapter, or call unload()"
NO_SUM = ("adapters of gated prompts cannot be added up, since each has a gate of its own: train one on all tasks, or "
          "give adapter_names= row by row")  # fmt: skip


def _refused(why: str) -> Callable[..., NoReturn]:
    """A method of PEFT's that has no meaning here."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AdapterError(why)

    return refuse


class MoPsModel(BaseTuner):
    """Mixture of Prompts over a frozen causal language model; made by `peft.get_peft_model(model, MoPsConfig(...))`."""

    prefix: str = "mops_"
    tuner_layer_cls = MoPsLayer
    peft_config: dict[str, MoPsConfig]
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
        attached.refuse_changed(engine.layers[0])
        peft_config.resolve(len(engine.layers), halves.hidden_size(engine.backbone))
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if peft_config.experts == "hidden_states" and not keys_values.learned_positions(engine.backbone):
            room = 2**31  # rotary positions go on
        for name in ("prompts_per_expert", "shared_prompts"):
            if (count := getattr(peft_config, name)) > room:
                raise AdapterError(f"{name}={count}, but this model has {room} positions: choose {room} at most")
        self._refuse_frozen(peft_config, engine)
        runs = peft_config.experts == "hidden_states" or peft_config.num_recovery_prompts > 0
        refuse_changed_embeddings(self.model, engine.backbone, engine.layers[0], runs)
        wrapped = {id(layer.get_base_layer()) for layer in engine.wrappers.values()}
        layer = engine.layers[peft_config.injection_layer]  # type: ignore[index]
        if id(layer) in wrapped:
            layer = engine.wrappers[peft_config.injection_layer]  # type: ignore[index]
        peft_config.target_modules = {next(name for name, module in self.model.named_modules() if module is layer)}
        return peft_config

    def _refuse_frozen(self, config: MoPsConfig, engine: Engine) -> None:
        """Whatever lies where no gradient goes would be saved as trained, and never be."""
        names = [re.sub(r"\.base_layer\b", "", name) for name, _ in self.model.named_modules()]
        saved = [name for name in names if any(name.endswith(each) for each in config.modules_to_save or [])]
        first = config.injection_layer if config.visible_to == "all" and not config.reads_ahead else len(engine.layers)
        assert first is not None
        layers = re.escape(halves.layers_name(engine.backbone))
        for name in saved:
            inside = re.search(rf"\b{layers}\.(\d+)(\.|$)", name)
            behind = name.rpartition(".")[2] in (*halves.FINAL_NORMS, "lm_head", "embed_out")
            if int(inside[1]) < first if inside else not behind:
                raise AdapterError(f"modules_to_save={config.modules_to_save} holds {name}, which stands where this "
                                   f"method trains nothing: choose the output head, the final norm or parts of layers "
                                   f"{first} and up (there are {len(engine.layers)})")  # fmt: skip

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's road for the arguments that it takes off before the base model is called."""
        if kwargs.get("alora_offsets") is not None:
            raise AdapterError("alora_offsets belong to aLoRA adapters, and this is a MoPs adapter: leave them out")
        if (names := kwargs.get("adapter_names")) is None:
            yield
            return
        engine = Engine.on(self.model)
        names = mixed.checked(names, list(self.peft_config), self.model.training)
        with mixed.asked(engine, names), mixed.saved_modules(engine, self.model):
            yield

    @staticmethod
    def _check_target_module_exists(peft_config: MoPsConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self, peft_config: MoPsConfig, adapter_name: str, target: Any, target_name: str, parent: Any, **_: Any
    ) -> None:
        engine = Engine.on(self.model)
        for wrapper in engine.wrappers.values():  # of an earlier adapter of that name, at whatever layer
            wrapper.drop(adapter_name)
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

    _check_merge_allowed = merge_adapter = unmerge_adapter = _refused(NO_MERGE)
    add_weighted_adapter = _refused(NO_SUM)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, MoPsLayer):
                module.requires_grad_(False)  # another method's adapter underneath is part of the frozen base

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: value for name, value in found.items() if f".{cls.prefix}" in name}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        known = model.state_dict()
        own = {n: v for n, v in known.items() if f".{cls.prefix}" in n and n.endswith(f".{adapter_name}")}
        stored.check(own, found, known)
        model.peft_config[adapter_name].initialised = True
        return found

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, MoPsLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was the active one, the first that is left acts, and with none the bare base.

        Raises:
            AdapterError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise AdapterError(f"no adapter {adapter_name!r}: there are {sorted(self.peft_config)}")
        active = [name for name in self.active_adapters if name != adapter_name]
        gone = self.peft_config.pop(adapter_name)
        left = active or list(self.peft_config)[:1]
        engine = Engine.on(self.model)
        engine.last = None
        for wrapper in engine.wrappers.values():
            wrapper.drop(adapter_name)
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=left or None)
        if left != self.active_adapters:
            self.set_adapter(left, inference_mode=any(self.peft_config[name].inference_mode for name in left))
        if not left:
            self.peft_config = self.model.peft_config = registry.Emptied(adapter_name, gone)

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
            AdapterError: there is no such adapter.
        """
        name = adapter or self.active_adapters[0]
        wrapper: MoPsLayer | None = Engine.on(self.model).wrapper_of(name)
        if wrapper is not None:
            return wrapper
        raise AdapterError(f"no adapter {name!r}: there are {sorted(self.peft_config)}")

    def forward(self, *args: Any, packed: Packed | Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """The base model's `forward`; with `packed`, the mean loss of examples laid end to end (`packed.Packed`).

        Raises:
            AdapterError: a packed batch comes with what goes with padded rows alone.
        """
        if packed is None:
            return self.model(*args, **kwargs)
        known = {"num_items_in_batch", "use_cache", "return_dict"}
        other = ["input_ids"] * bool(args) + [name for name, value in kwargs.items() if name not in known
                                              and value is not None and value is not False]  # fmt: skip
        if other:
            raise AdapterError(f"{other[0]} would go unread beside a packed batch: leave it out, or give padded rows")
        if mixed.names_of(Engine.on(self.model)) is not None:
            raise AdapterError("adapter_names with a packed batch: give padded rows, or one adapter at a time")
        hidden, targets = self.predicting(packed)
        loss = mean_loss(self.logits, hidden, targets, self._vocabulary, self._saved)
        if (items := kwargs.get("num_items_in_batch")) is not None:  # as transformers' own losses take it
            loss = loss * len(targets) / items
        return CausalLMOutputWithPast(loss=loss)

    @torch.no_grad()
    def nats(self, packed: Packed | Mapping[str, Tensor]) -> Float[Tensor, " tokens"]:
        """Nats of each labelled token of a packed batch, 0 elsewhere (on the position that predicts it)."""
        batch = Packed.of(packed)
        at, targets = batch.targets()
        found = torch.zeros(len(batch.labels), device=targets.device)
        found[at] = each_nats(self.logits, self.predicting(batch)[0], targets, self._vocabulary)
        return found

    def predicting(
        self, packed: Packed | Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "predicted hidden"], Int[Tensor, " predicted"]]:
        """Of a packed batch, the normed last hidden states that predict labelled tokens, and these; `logits` of them.

        With adapters off, those of the bare base.
        """
        batch, wrapper = Packed.of(packed), Engine.on(self.model).active()
        if wrapper is not None and wrapper.configs[wrapper.current].visible_to == "answers" and batch.past_keys is None:
            batch = self.answers(batch)
        at, targets = batch.targets()
        return self._through(batch)[at], targets

    def logits(self, hidden: Float[Tensor, "some hidden"]) -> Float[Tensor, "some vocabulary"]:
        """Logits of normed last hidden states."""
        return head.logits(self.model, hidden)

    @property
    def _saved(self) -> list[Tensor]:
        """What is trained of the output head."""
        saved = [part for part in self.model.children() if isinstance(part, AuxiliaryTrainingWrapper)]
        return [p for part in saved for p in part.parameters() if p.requires_grad]

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def lower(
        self, batch: Packed | Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "segments inputs"] | None]:
        """Of packed tokens, what enters the injection layer, and what the gate reads (before standardisation).

        Neither changes while experts and gate are trained. With adapters off: what enters the final norm, and None.
        """
        return states.below(Engine.on(self.model), Packed.of(batch))

    @torch.no_grad()
    def answers(self, batch: Packed | Mapping[str, Tensor], openings: Sequence[states.Opening | None] = ()) -> Packed:
        """Of packed tokens, all that training needs where answers alone see experts; none of it ever changes.

        Of segments that begin with one of `openings`, what came before is what follows those.
        """
        return states.answers(Engine.on(self.model), Packed.of(batch), openings)

    @torch.no_grad()
    def opening(self, tokens: Int[Tensor, " tokens"], whole: bool = True) -> states.Opening:
        """What many texts begin with, computed once; for `answers`, or (not `whole`) for `gate_inputs` alone."""
        engine = Engine.on(self.model)
        layer = states.reads(engine.active())
        return states.opening(engine, tokens, [layer], len(engine.layers) if whole else max(layer, 1))

    @torch.no_grad()
    def gate_inputs(
        self, batch: Packed | Mapping[str, Tensor], openings: Sequence[states.Opening | None] = ()
    ) -> Float[Tensor, "segments inputs"]:
        """What the gate reads of each segment of packed tokens, before standardisation."""
        return states.gate_inputs(Engine.on(self.model), Packed.of(batch), openings)

    def _through(self, batch: Packed) -> Float[Tensor, "tokens hidden"]:
        """Normed last hidden states, from tokens or from hidden states at the injection layer."""
        engine = Engine.on(self.model)
        context = states.context(engine, batch)
        hidden, context.pooled = states.below(engine, batch)
        engine.last = None if engine.active() is None else context
        above = halves.upper(engine.backbone, context.injection_layer)
        dtype = next(p.dtype for p in engine.backbone.parameters() if p.is_floating_point())
        out: Tensor = above(inputs_embeds=hidden[None].to(dtype), **states.carrying(context)).last_hidden_state
        return out[0]

    @property
    def last_gate(self) -> Float[Tensor, "batch groups"] | None:
        """Gate weights of the latest pass of text; None where no adapter acted on it, or none is on."""
        last = Engine.on(self.model).latest
        return None if last is None or last.gate is None else last.gate.detach()

    @property
    def last_null(self) -> Float[Tensor, " batch"] | None:
        """What the latest pass of text left to the base; None where there is no null expert, or no adapter is on."""
        last = Engine.on(self.model).latest
        return None if last is None or last.null_weight is None else last.null_weight.detach()

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
