"""A finished run, measured again or asked: perplexity, scored answers, gate weights. Trains nothing."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from smartmops.checks.columns import BUILT_IN
from smartmops.checks.errors import DataError, FileTaken, RunError, SmartmopsError, UnknownOption
from smartmops.checks.folders import as_path, filled, unmade, whole
from smartmops.checks.limits import check_named
from smartmops.data.several import Names, held, names_of
from smartmops.data.tasks import of_clients, read, read_stored, split, splits
from smartmops.evaluation import harness
from smartmops.evaluation.answers import questions, score
from smartmops.evaluation.perplexity import answer, left_to_answer, room
from smartmops.evaluation.perplexity import evaluate as measured
from smartmops.experts.gate import by_expert
from smartmops.methods.baselines import base_of, load_run, template_of
from smartmops.options.finished.reading import Answered, EvaluateConfig, InspectConfig, Question
from smartmops.options.training import TrainConfig
from smartmops.progress.bars import console
from smartmops.reading.early import check_parts
from smartmops.reading.embedder import of_run
from smartmops.reading.task import Task, same_client_files, same_test_split
from smartmops.rows.example import Example, of_examples, opened
from smartmops.runs.card import save
from smartmops.runs.folder import Run
from smartmops.tokens.template import Template
from smartmops.traits import is_told
from smartmops.tuner import MoPsModel

log = logging.getLogger(__name__)
ASKING = threading.Lock()  # what a gate said stands on the model until the next text is read


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Perplexity of a run's adapter over response tokens, on what the run was tested on, or on all of other data.

    That is its test split, or with `--validation` the part of the training split that took its place.

    Returns:
        `perplexity` {`overall`, `per_task`: {task: value}}, and `answers` where `config.answers` asks for some; with
        `config.suite`, `suite` alone, as `evaluation.harness.measure` returns it. The same is written to
        RUN/evaluation.json, and what a suite measured also into `suites` of RUN/metrics.json, where these can be
        written; a line says so where not.

    Raises:
        RunNotFound: there is no finished run.
        RunError: its method is told which expert to use, or the data cannot be read.
        DataError: there is no such suite.
        MissingExtra: the harness of a suite is not installed.
    """
    if config.suite is not None:
        _check_free(Run.open(config.run))
        suite = harness.load(config.suite)
        return LoadedRun.open(config.run)._asked(config, suite)
    again = _again(config, Run.open(config.run))  # before the base, which may be large
    return LoadedRun.open(config.run)._measured(config, again, progress=True)


def _again(config: EvaluateConfig, run: Run) -> TrainConfig:
    """The data, and how they are read: those of the run, or others in the run's template."""
    _check_free(run)
    arguments = run.config["arguments"]
    for name in () if config.data else names_of(held(arguments["data"])):
        if run.lacks(name, Path(name)):
            raise DataError(f"{name}, on which {run.path} was measured, is not there: give --data, or call this in the "
                               "folder where it was trained")  # fmt: skip
    return TrainConfig(
        model=base_of(run), out=config.run, data=held(config.data or arguments["data"]),
        data_seed=arguments.get("data_seed", arguments["seed"]),
        limit=None if config.data else arguments["limit"], test_share=arguments["test_share"],
        max_length=config.max_length or arguments["max_length"], embedder=arguments.get("embedder"),
        validation_share=0.0, template=template_of(run),
        validation=not config.data and arguments.get("validation", False),
        columns=config.columns if config.data else tuple(arguments.get("columns", ())),
        rows=config.rows or arguments.get("rows", "memory"),
    )  # fmt: skip


def _seen(run: Run, given: Sequence[Example]) -> Iterator[str]:
    """How many examples are of what a run was trained on, which its own data say as long as they are what they were."""
    arguments = run.config["arguments"]
    asked = Counter(map(_said, given))  # numbers, for there may be more texts than memory holds
    try:
        known = {said for example in _trained_on(run) if example.category != arguments.get("hold_out")
                 and (said := _said(example)) in asked}  # fmt: skip
    except (SmartmopsError, OSError) as error:
        yield f"whether {run.path} was trained on some of these examples cannot be told ({error})"
        return
    if again := sum(asked[said] for said in known):
        yield (f"{again} of {len(given)} examples are of the data that {run.path} was trained on, so what is measured "
               "on them says little of others")  # fmt: skip
    yield from _untold(run)
    if "keys" in arguments:
        yield f"the data of {run.path}'s clients are not here, so whether some of these are theirs cannot be told"


def _trained_on(run: Run) -> Iterator[Example]:
    """The examples that experts were trained on, as far as they are here, from where the run kept them.

    A federation's own data beside its clients' are among them only where the server took steps on them.

    Raises:
        DataError: the data are no file or folder here; the hub is not asked for what nobody named.
        RunError: they have changed.
    """
    for change in run.config.get("changed", []):
        if "data" in (seen := change.get("trained_on") or {}):
            yield from _trained_later(run, change["command"], seen)
    arguments = run.config["arguments"]
    columns, clients = tuple(arguments.get("columns", ())), arguments.get("clients_data")
    if arguments.get("server_steps") or (clients is None and "keys" not in arguments):
        data, rows = held(arguments["data"]), arguments.get("rows", "memory")
        _check_here(data)
        train, test = splits(
            data, arguments["limit"], arguments["test_share"], arguments.get("data_seed", arguments["seed"]),
            arguments.get("validation", False), None if rows == "memory" else Path(rows), columns,
        )  # fmt: skip
        same_test_split(run, of_examples(test))
        yield from train
    if clients is not None:
        held_there = of_clients(Path(clients), columns)
        same_client_files(run, of_examples(held_there))
        yield from held_there


def _trained_later(run: Run, command: str, seen: Mapping[str, Any]) -> Sequence[Example]:
    """The examples that an expert was trained on which came, or changed, after the others."""
    _check_here(seen["data"])
    train, test = split(read(seen["data"], columns=tuple(seen["columns"])), seen["test_share"], seen["seed"])
    if of_examples(test) != seen["test"]:
        raise RunError(f"the data of `{command}` have changed since {run.path} was made by it")
    return train


def _check_here(data: Names) -> None:
    for name in names_of(data):
        if name != "office" and (name in BUILT_IN or not Path(name).exists()):
            raise DataError(f"its data, {name}, are no file or folder here")


def _untold(run: Run) -> Iterator[str]:
    """Of which changes nothing tells what an expert was trained on: it came from another run, or an older version."""
    for change in run.config.get("changed", []):
        kept = change["command"].startswith(("experts add", "experts merge")) and "trained_on" not in change
        if kept or "run" in (change.get("trained_on") or {}):
            yield f"what `{change['command']}` brought into {run.path} may have been trained on some of these examples"


def _said(example: Example) -> int:
    """Tells what it says from what any other says, whatever task and source it goes under."""
    return hash(replace(example, category="", source=""))


def _check_free(run: Run) -> None:
    """Whether a run decides by itself which expert answers.

    Raises:
        RunError: it is told.
    """
    method = run.config["arguments"].get("method")
    if is_told(method):
        raise RunError(f"method {method!r} is told which expert to use: it is a mark for tables, and its perplexity is "
                       f"in {run.path / 'metrics.json'}")  # fmt: skip


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Gate weights, and the frozen and the adapted answer, for one instruction.

    Returns:
        `gate` {expert: weight}, `left_to_base` (the null expert's weight; None without one), `frozen` and `adapted`.
        Weights sum to one, together with what is left to the base.

    Raises:
        RunNotFound: there is no finished run.
        RunError: the run's method has no gate.
    """
    run = LoadedRun.open(config.run)
    run.check_gated()
    adapted = run.generate(config.text, config.context, max_new_tokens=config.max_new_tokens)
    gate, left = run.latest()
    with run.model.disable_adapter():
        frozen = run.generate(config.text, config.context, max_new_tokens=config.max_new_tokens)
    return {"gate": gate, "left_to_base": left, "frozen": frozen, "adapted": adapted}


class LoadedRun:
    """A finished run in memory, made by `load_run`: it answers, says which experts fire, and is measured.

    Attributes:
        model: The adapted model, a `PeftModel` in eval mode.
        tokenizer: Its own, with the chat template that the run was trained with, or none.
        path: The run folder.
        experts: What each expert is meant for, in order; empty where the method has none.
    """

    def __init__(self, model: Any, tokenizer: Any, run: Run) -> None:
        self.model, self.tokenizer, self.path, self._run = model, tokenizer, run.path, run
        self._template = Template.of(template_of(run), tokenizer)
        config = model.peft_config["default"]
        self._embedder = of_run(run, config.embedder) if getattr(config, "embedder", None) else None
        self.experts: list[str] = []
        if isinstance(model.base_model, MoPsModel):
            self.experts = config.named_experts

    @classmethod
    def open(cls, path: Path) -> LoadedRun:
        """The run in a folder; errors as `load_run`."""
        return cls(*load_run(path))

    def generate(self, text: str, context: str = "", *, expert: str | None = None, max_new_tokens: int = 48) -> str:
        """The greedy answer to one instruction.

        Args:
            text: The instruction.
            context: Text that it is about.
            expert: Who answers alone, by its name in `experts`; None: the gate decides.
            max_new_tokens: At which the answer ends that has not ended itself.

        Raises:
            ConfigError: an argument is outside its limits; a `WrongType`: of another type.
            DataError: the text leaves no position for an answer.
            RunError: there is no such expert, or none is named and the method is told which one to use.
        """
        check_named(Question(text=text, context=context, max_new_tokens=max_new_tokens))
        return self._answer(Example(text, context, ""), expert, max_new_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, expert: str | None = None, max_new_tokens: int = 48
    ) -> str:
        """The greedy answer to the user's last message, `role` and `content` of each as chat templates take them.

        Raises:
            DataError: turns are out of order, the last is not the user's, or they leave no position for an answer.
            RunError: as `generate`.
        """
        check_named(Answered(max_new_tokens=max_new_tokens))
        system, history, question = opened(messages)
        if question is None:
            raise DataError(f"the conversation of {len(messages)} messages ends with the assistant: add what the "
                            "user says next")  # fmt: skip
        return self._answer(Example(question, "", "", system=system, history=history), expert, max_new_tokens)

    def gate(self, text: str, context: str = "") -> dict[str, float]:
        """Weight of each expert for one instruction; they sum to one, less what a null expert leaves to the base.

        Raises:
            RunError: the run's method has no gate.
        """
        self.check_gated()
        with ASKING:
            self.generate(text, context, max_new_tokens=1)
            return self.latest()[0]

    def latest(self) -> tuple[dict[str, float], float | None]:
        """Of the latest answer, the weight of each expert, and of the null expert (None: there is none).

        Of several threads that ask at once, the latest answer is any of theirs; `gate` is each one's own.

        Raises:
            RunError: the run's method has no gate, or nothing was answered yet.
        """
        self.check_gated()
        weights, lost = self.model.base_model.last_gate, self.model.base_model.last_null
        if weights is None:
            raise RunError(f"{self.path} has answered nothing yet: ask it first")
        named = zip(self.experts, by_expert(weights, len(self.experts))[0].tolist(), strict=True)
        return dict(named), None if lost is None else float(lost[0])

    def evaluate(self, data: str | Sequence[str] | None = None, **options: Any) -> dict[str, Any]:
        """Perplexity over response tokens, with the options of `smartmops.evaluate`; nothing is loaded again.

        Raises:
            UnknownOption: an option is unknown.
            RunError: an option is outside its limits, or the data cannot be read.
        """
        known = [each.name for each in fields(EvaluateConfig) if each.name not in ("run", "data")]
        if unknown := [name for name in options if name not in known]:
            raise UnknownOption(f"{unknown[0]!r} is no option of evaluate: choose from {', '.join(known)}")
        config = EvaluateConfig(run=self.path, data=data if data is None else held(data), **options)
        check_named(config)
        if config.suite is not None:
            _check_free(self._run)
            return self._asked(config, harness.load(config.suite))
        return self._measured(config, _again(config, self._run))

    def save(self, folder: str | Path) -> None:
        """Write adapter, card and tokenizer into a new folder that `PeftModel.from_pretrained` loads on the same base.

        The tokenizer there has the template of the run, or none, so that `smartmops.render` writes as the run does.

        Raises:
            RunExists: the folder holds something, such as a run or what was saved before.
            FileTaken: it is a file, or cannot be written.
        """
        path = as_path("folder", folder, "a folder")
        if (said := unmade(path)) is not None:
            raise FileTaken(f"folder {path}{said}")
        if (error := filled(path, "folder")) is not None:
            raise error
        with whole(path) as beside:
            self.tokenizer.save_pretrained(str(beside))
            save(self.model, beside, self._template, self._run.config, self._run.read_metrics() or None)

    def check_gated(self) -> None:
        """Whether there are experts to weigh.

        Raises:
            RunError: there are none.
        """
        told = is_told(self._run.config["arguments"].get("method"))
        if not self.experts or told:
            why = "is told which expert to use" if told else "has no gate"
            raise RunError(f"{self.path} was trained with method {self._run.config.get('method')!r}, which {why}: "
                           "inspect a run of method mops")  # fmt: skip

    def _answer(self, example: Example, expert: str | None, max_new_tokens: int) -> str:
        inputs, config = {}, self.model.peft_config["default"]
        (prompt,) = self._template.prompts([example.turns()])
        left = left_to_answer(self.model, len(prompt.input_ids))
        if is_told(method := self._run.config["arguments"].get("method")):
            if expert is None:
                raise RunError(f"{self.path} was trained with method {method!r}, which is told which expert to use: "
                               f"name one of {', '.join(self.experts)}, or give a run of --method mops")  # fmt: skip
            inputs["gate_embedding"] = torch.zeros(1, config.embedding_size)  # of a gate that is told its weights
        if self._embedder is not None:
            inputs["gate_embedding"] = torch.tensor(self._embedder([example.instruction]))
        if expert is not None:
            if expert not in self.experts:
                raise RunError(f"{expert!r} is no expert of this run: choose one of {', '.join(self.experts)}")
            inputs["gate_weights"] = torch.tensor([[float(name == expert) for name in self.experts]])
        most = max_new_tokens if room(self.model, max_new_tokens) < 1 else min(max_new_tokens, left)
        return answer(self.model, self.tokenizer, [example], most, self._template, **inputs)[0]

    def _asked(self, config: EvaluateConfig, suite: harness.Suite) -> dict[str, Any]:
        found = harness.measure(self.model, self.tokenizer, self._template, suite, config.batch_size,
                                config.suite_limit, self._embedder)  # fmt: skip
        kept = self._run.read_metrics()
        self._keep({"suite": found}, kept | {"suites": kept.get("suites", {}) | {suite.name: found}})
        return {"suite": found}

    def _task(self, config: EvaluateConfig, again: TrainConfig) -> Task:
        """What is measured as the test part of a task: all of other data, or what the run was measured on."""
        if config.data:
            given: Sequence[Example] = (
                read(again.data, columns=again.columns) if again.folder is None
                else read_stored(again.data, again.folder, columns=again.columns)
            )  # fmt: skip
            for said in _seen(self._run, given):
                console.print(said)
            return Task.of(self.model, self.tokenizer, [], given, again, "measured")
        train, examples = splits(again.data, again.limit, again.test_share, again.data_seed, again.validation,
                                 again.folder, again.columns)  # fmt: skip
        same_test_split(self._run, of_examples(examples))
        check_parts(again.data, len(train), len(examples))
        return Task.of(self.model, self.tokenizer, [], examples, again, "validation" if again.validation else "test")

    def _measured(self, config: EvaluateConfig, again: TrainConfig, progress: bool = False) -> dict[str, Any]:
        task = self._task(config, again)
        rows, examples = task.test, task.test_examples
        metrics = measured(self.model, rows, task.collator, config.batch_size, progress=progress).metrics()
        if config.answers:
            size = config.answer_tokens
            asked = questions(self.model, self.tokenizer, examples, config.answers, size, task.template)
            metrics["answers"] = score(self.model, self.tokenizer, [examples[i] for i in asked],
                                       [rows[i] for i in asked], size, task.template)  # fmt: skip
        self._keep(metrics | {"data": again.data, "examples": len(rows)})
        return metrics

    def _keep(self, evaluation: dict[str, Any], metrics: dict[str, Any] | None = None) -> None:
        """Write what was measured into the run; where that cannot be written, it is told all the same."""
        try:
            self._run.write_evaluation(evaluation)
            if metrics is not None:
                self._run.write_metrics(metrics)
        except OSError as error:
            log.warning("%s cannot be written (%s): the numbers are told here alone", error.filename, error.strerror)
