"""A finished run, measured again or asked: perplexity, scored answers, gate weights. Trains nothing, prints nothing."""

from __future__ import annotations

from typing import Any

import torch

from smartmops.data.example import Example
from smartmops.data.template import Template
from smartmops.options.method import TOLD
from smartmops.options.reading import EvaluateConfig, InspectConfig
from smartmops.options.training import TrainConfig
from smartmops.training.answers import questions, score
from smartmops.training.baselines import base_of, load_run, template_of
from smartmops.training.evaluate import answer
from smartmops.training.evaluate import evaluate as measured
from smartmops.training.pretrain import Embedder
from smartmops.training.runs import Run
from smartmops.training.task import Task
from smartmops.tuner.gate import by_expert


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Perplexity of a run's adapter over response tokens, on its test split or on other data.

    Returns:
        `perplexity` {`overall`, `per_task`: {task: value}}, and `answers` where `config.answers` asks for some; the
        same is written to RUN/evaluation.json.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: its method is told which expert to use, or the data cannot be read.
    """
    run = Run.open(config.run)
    again = _again(config, run)  # before the base, which may be large
    model, tokenizer, _ = load_run(config.run)
    task = Task.load(again, model, tokenizer)
    rows = [*task.train, *task.test] if config.data else task.test
    examples = [*task.train_examples, *task.test_examples] if config.data else task.test_examples
    metrics = measured(model, rows, task.collator, config.batch_size, progress=True).metrics()
    if config.answers:
        asked = questions(model, tokenizer, examples, config.answers, config.answer_tokens, task.template)
        metrics["answers"] = score(model, tokenizer, [examples[i] for i in asked], [rows[i] for i in asked],
                                   config.answer_tokens, task.template)  # fmt: skip
    run.write_evaluation(metrics | {"data": again.data})
    return metrics


def _again(config: EvaluateConfig, run: Run) -> TrainConfig:
    """The data, and how they are read: those of the run, or others in the run's template."""
    arguments = run.config["arguments"]
    if arguments.get("method") in TOLD:
        raise ValueError(f"method {arguments['method']!r} is told which expert to use: it is a mark for tables, "
                         f"and its perplexity is in {config.run / 'metrics.json'}")  # fmt: skip
    return TrainConfig(
        model=base_of(run), out=config.run, data=config.data or arguments["data"],
        data_seed=arguments.get("data_seed", arguments["seed"]),
        limit=None if config.data else arguments["limit"], test_share=arguments["test_share"],
        max_length=config.max_length or arguments["max_length"], embedder=arguments.get("embedder"),
        validation_share=0.0, template=template_of(run),
        columns=config.columns if config.data else tuple(arguments.get("columns", ())),
    )  # fmt: skip


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Gate weights, and the frozen and the adapted answer, for one instruction.

    Returns:
        `gate` {expert: weight}, `left_to_base` (the null expert's weight; None without one), `frozen` and `adapted`.
        Weights sum to one, together with what is left to the base.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: the run's method has no gate.
    """
    model, tokenizer, run = load_run(config.run)
    if not hasattr(model.base_model, "last_gate"):
        raise ValueError(f"{config.run} was trained with method {run.config.get('method')!r}, which has no gate: "
                         "inspect a run of --method mops")  # fmt: skip
    mops = model.peft_config["default"]
    example = Example(config.text, config.context, "")
    template = Template.of(template_of(run), tokenizer)
    inputs = {}
    if mops.embedder:
        inputs["gate_embedding"] = torch.tensor(Embedder(mops.embedder)([config.text]))
    adapted = answer(model, tokenizer, [example], config.max_new_tokens, template, **inputs)[0]
    weights = by_expert(model.base_model.last_gate, mops.num_experts)[0].tolist()
    lost = model.base_model.last_null
    with model.disable_adapter():
        frozen = answer(model, tokenizer, [example], config.max_new_tokens, template)[0]
    names = mops.expert_names or [f"expert {i}" for i in range(mops.num_experts)]
    return {"gate": dict(zip(names, weights, strict=True)), "left_to_base": None if lost is None else float(lost[0]),
            "frozen": frozen, "adapted": adapted}  # fmt: skip
