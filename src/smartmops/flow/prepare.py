"""Experts and gate of an adapter that someone else put on a model, started as `train` starts its own.

Knows a PEFT model of our method and examples. Trains nothing but the gate, and writes no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from peft import PeftModel

from smartmops.checks.errors import AdapterError, ConfigError, DataError
from smartmops.checks.folders import as_path
from smartmops.checks.limits import check_given, named_in_python
from smartmops.options.method import GatePretraining, MethodConfig, Teaching
from smartmops.options.training import TaskConfig
from smartmops.preparing.adapting import placed, start, words
from smartmops.reading.task import Task
from smartmops.rows.example import Example
from smartmops.tokens.batches import Collator, Encoded
from smartmops.tokens.parts import a_tokenizer
from smartmops.tuner import MoPsConfig, MoPsModel


@dataclass
class Prepared:
    """What came of it.

    Attributes:
        expert_names: What each expert is meant for, in order.
        gate_accuracy: Share of instructions sent to their own expert (held-out ones where the gate starts in closed
            form); None: the gate was left alone.
        rows: The examples in tokens, in order, without those that do not fit; a data set for HF's `Trainer`.
        collator: Makes padded batches of them.
    """

    expert_names: list[str]
    gate_accuracy: float | None
    rows: Sequence[Encoded]
    collator: Collator


def prepare(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    gate: GatePretraining | Teaching | None = None,
    template: str = "auto",
    max_length: int = 512,
    unrelated: Path | None = None,
    seed: int = 0,
) -> Prepared:
    """Start experts from real text of their tasks and fit the gate, in place (see `docs/python.md`).

    Afterwards the model trains with HF's `Trainer`, TRL's `SFTTrainer` or a loop of one's own.

    Args:
        model: `get_peft_model(base, MoPsConfig(...))`, not trained yet.
        tokenizer: Of the base.
        examples: Training examples, as `read` returns them; their categories say which expert each is meant for.
        gate: How the gate learns that: from `labels` (the categories), from `clusters` of the instructions, or `none`:
            not at all. None: from labels. In closed form where the adapter can carry it.
        template: `auto`, `chat`, `plain` or a Jinja file, as `train --template`.
        max_length: Tokens; longer examples lose the end of their context.
        unrelated: Texts of no task, a paragraph each, to fit a null expert by; None: those that come with it.
        seed: Of the drawn text.

    Raises:
        DataError: there are no examples, or they are something else.
        AdapterError: the model has no adapter `default` of ours or one that asks for recovery prompts or an embedder;
            no example fits; more tasks than experts; the message names value and way out.
    """
    config, pretraining = _config(model), _teaching(gate)
    a_tokenizer(tokenizer)
    check_given(TaskConfig, template=template, max_length=max_length, seed=seed)
    unrelated = None if unrelated is None else as_path("unrelated", unrelated, "a file of texts")
    _check_examples(examples, config, pretraining)
    ungated = config.num_experts == 1
    method = MethodConfig(
        method="prompt-tuning" if ungated else "mops", experts=config.num_experts, unrelated=unrelated,
        expert_kind=config.experts, visible_to=config.visible_to, init=config.init,  # type: ignore[arg-type]
        gate_layer=config.gate_layer,
    )  # fmt: skip
    settings = TaskConfig(model="", data="", template=template, max_length=max_length, seed=seed)
    task = Task.of(model.get_base_model(), tokenizer, examples, [], settings)
    with model.disable_adapter():
        config.gate_layer = placed(task, method, pretraining, None).gate_layer
    for name, value in words(task, method).items():
        setattr(config, name, value)
    with named_in_python(settings):
        names, accuracy = start(task, model, method, pretraining, seed)
    return Prepared(names, accuracy, task.train, replace(task.collator, gate_mask=True))


def _teaching(gate: Any) -> GatePretraining:
    if isinstance(gate, GatePretraining):
        return gate
    if gate is not None and gate not in get_args(Teaching):
        raise ConfigError(f"gate={gate!r}: choose {', '.join(get_args(Teaching))}, or None")
    return GatePretraining() if gate is None else GatePretraining(gate_pretraining=gate)


def _check_examples(examples: Any, config: MoPsConfig, gate: GatePretraining) -> None:
    """Whether there are examples, and an expert for each of their tasks where the gate learns these."""
    if not isinstance(examples, Sequence) or not examples or not all(isinstance(each, Example) for each in examples):
        raise DataError(f"examples={str(examples)[:40]}: give a list of one smartmops.Example or more, as "
                        "smartmops.read returns it")  # fmt: skip
    tasks, count = {example.category for example in examples}, config.num_experts
    if 1 < count < len(tasks) and gate.gate_pretraining == "labels":
        raise AdapterError(f"num_experts={count}, but the examples are of {len(tasks)} tasks: choose "
                           f"{len(tasks)}, or gate='clusters'")  # fmt: skip


def _config(model: Any) -> MoPsConfig:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, MoPsModel):
        raise AdapterError(f"a {type(model).__name__} has no experts to prepare: give get_peft_model(base, "
                           "MoPsConfig(...))")  # fmt: skip
    config = model.peft_config.get("default")
    if not isinstance(config, MoPsConfig):
        raise AdapterError(f"the adapters {sorted(model.peft_config)} are none called 'default', which alone is "
                           "prepared: give the adapter that name")  # fmt: skip
    if model.active_adapters != ["default"]:
        raise AdapterError(f"the active adapters are {model.active_adapters}, and the one called 'default' alone is "
                           "prepared: activate it with set_adapter('default') first")  # fmt: skip
    if config.num_recovery_prompts:
        raise AdapterError(f"num_recovery_prompts={config.num_recovery_prompts}: they are trained on the bare base, as "
                           "`smartmops.train` does; choose 0 of them")  # fmt: skip
    if config.embedding_size is not None:
        raise AdapterError(f"embedding_size={config.embedding_size}: an embedder is asked by `smartmops.train` alone; "
                           "choose None")  # fmt: skip
    return config
