"""Tasks of EleutherAI's evaluation harness (`lm_eval`), asked of a base and of its adapter, side by side.

Every question is put in the run's own template, few-shot examples as earlier turns, so that a gate reads what it reads
when the run answers. Knows the harness's tasks and requests, a model and its template. Knows no run folders.
"""

from __future__ import annotations

import io
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.attention.packed import IGNORED
from smartmops.checks.errors import DataError, MissingExtra
from smartmops.rows.example import Example, opened
from smartmops.tokens.batches import Collator, Encoded
from smartmops.tokens.parts import shared
from smartmops.tokens.template import Template
from smartmops.tuner import MoPsModel

from .answers import batches
from .perplexity import answer, batch_for, in_order, padded_batches, room

MISSING = "tasks are asked by EleutherAI's harness, and {} is not installed: pip install 'smartmops[lm-eval]'"
LONGEST = 256  # tokens of an answer where its task sets no limit
DRAWS = 100  # of the bootstrap, for standard errors that have no formula
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Suite:
    """Tasks that are there and can be asked.

    Attributes:
        name: As it was given: a folder, a file, or a task's or group's own name.
        tasks: Names by which the harness knows them.
        manager: Of the harness, which finds them.
    """

    name: str
    tasks: list[str]
    manager: Any


def load(suite: str) -> Suite:
    """The tasks of a folder of YAML files, of one such file, or those that the harness has under a name.

    Raises:
        MissingExtra: the harness is not installed; the message has its `pip install` line.
        DataError: there is no such task, it or its data cannot be read, or it asks for what is no answer.
    """
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:  # of the harness, or of what it needs
            raise MissingExtra(MISSING.format((error.name or "lm_eval").split(".")[0])) from error
        path = Path(suite)
        if path.is_dir():
            manager = TaskManager(include_path=str(path), include_defaults=False)
            names = sorted(manager.all_subtasks)
            if not names:
                raise DataError(f"--suite {suite} holds no task of the harness: give a folder of its YAML files")
        else:
            manager = TaskManager(include_defaults=not path.is_file())
            names = [suite]
            if not path.is_file() and suite not in manager.all_tasks:
                raise DataError(f"--suite {suite} is no folder or file here and no task of the harness: give a folder "
                                "of its YAML files, or a name that `lm-eval ls tasks` shows")  # fmt: skip
        try:
            found = manager.load(names)["tasks"]
        except Exception as error:  # of a task's own code, its YAML, or its data: whatever these raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"--suite {suite} cannot be loaded ({reason}): mend its files, or check where its data "
                            "are") from error  # fmt: skip
    for name, task in found.items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise DataError(f"--suite {suite}: task {name} measures running text, which answers no instruction: give "
                            "tasks with questions, or use `evaluate --data`")  # fmt: skip
    return Suite(suite, names, manager)


def measure(
    model: Any, tokenizer: Any, template: Template, suite: Suite, batch_size: int = 32, limit: int | None = None,
    embed: Embed | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Ask all tasks of the base alone and of the adapted model.

    Args:
        model: Adapted, a `PeftModel`.
        tokenizer: Its own.
        template: Of the run.
        suite: From `load`.
        batch_size: Texts that are scored at once.
        limit: Examples of each task, the first ones; None: all.
        embed: Where the gate reads an embedding of the question.

    Returns:
        `frozen` and `adapted`, each {task: {metric: value}} with standard errors as `METRIC_stderr`; `questions` {task:
        how many there were}; `shortened`, how many texts lost their beginning to fit the model's positions.

    Raises:
        DataError: a task asks for what the template cannot write.
    """
    from lm_eval import simple_evaluate

    found: dict[str, Any] = {"suite": suite.name}
    asked = Asked(model, tokenizer, template, batch_size, embed)
    was_training = model.training
    model.eval()
    for side in ("frozen", "adapted"):
        with model.disable_adapter() if side == "frozen" else nullcontext(), _quiet(), _without_git():
            results = simple_evaluate(
                _language_model(asked), tasks=suite.tasks, task_manager=suite.manager, limit=limit,
                apply_chat_template=True, fewshot_as_multiturn=True, log_samples=False, bootstrap_iters=DRAWS,
                random_seed=None, numpy_random_seed=None, torch_random_seed=None,
            )  # fmt: skip
        found[side] = {task: _plain(own) for task, own in results["results"].items()}
        found["questions"] = {task: counts["effective"] for task, counts in results["n-samples"].items()}
    model.train(was_training)
    return found | {"shortened": len(asked.shortened)}


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers by metric; the name of a filter stays only where there is one."""
    return {key.removesuffix(",none").replace("_stderr,none", "_stderr"): float(value) for key, value in metrics.items()
            if isinstance(value, int | float) and key not in ("sample_len", "alias")}  # fmt: skip


class Asked:
    """A model that is asked the harness's requests, whose contexts are messages as JSON."""

    def __init__(self, model: Any, tokenizer: Any, template: Template, batch_size: int, embed: Embed | None) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.batch_size, self.embed = batch_size, embed
        self.shortened: set[str] = set()  # contexts
        self.collator = Collator(tokenizer, gate_mask=isinstance(getattr(model, "base_model", None), MoPsModel))

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log probability of each continuation behind its context, and whether it is the greedy one."""
        rows = [self._row(context, text) for context, text in pairs]
        groups = padded_batches([len(row.input_ids) for row in rows], self.batch_size)
        return in_order(groups, lambda group: self._scored([rows[i] for i in group]))

    @torch.no_grad()
    def _scored(self, rows: Sequence[Encoded]) -> list[tuple[float, bool]]:
        batch = batch_for(self.model, rows, self.collator)
        logits = self.model(**batch, use_cache=False).logits[:, -batch["input_ids"].shape[1] :]
        return [_of_labels(own[: len(row.labels)], torch.tensor(row.labels, device=own.device))
                for row, own in zip(rows, logits, strict=True)]  # fmt: skip

    def _row(self, context: str, text: str) -> Encoded:
        """A continuation behind its question; blanks in front of it, where a template has none, are left out."""
        example, begun = _example(context)
        spoken = begun + text if begun else text.lstrip()
        (prompt, ids), *rest = self.template.rows(
            [_turns(example, said) for said in (spoken, *([begun] if begun else []))]
        )
        ends = len(self.template.end_ids)
        ids = ids[: len(ids) - ends]
        given = shared(ids, rest[0][1][: len(rest[0][1]) - ends]) if rest else 0
        whole, mask = prompt.input_ids + ids, None if prompt.gate_mask is None else prompt.gate_mask + [0] * len(ids)
        first = len(prompt.input_ids) + given
        labels = [IGNORED] * first + whole[first:]
        over = max(0, len(whole) - room(self.model, 0))
        if over:
            self.shortened.add(context)
        mask = None if mask is None or not any(mask[over:]) else mask[over:]
        vector = torch.tensor(self.embed([example.instruction]))[0] if self.embed else None
        return Encoded(whole[over:], labels[over:], gate_embedding=vector, gate_mask=mask, header=prompt.header)

    def answered(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The greedy answer to each context, up to the first of its stops.

        Raises:
            DataError: an answer is begun for the model, which it cannot go on with.
        """
        examples: list[Example] = []
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, (context, how) in enumerate(requests):
            example, begun = _example(context)
            if begun:
                raise DataError(f"--suite: a task begins the answer with {begun[:40]!r} and lets the model go on, "
                                "which is not done here: leave gen_prefix away")  # fmt: skip
            examples.append(example)
            by_length[int(how.get("max_gen_toks", LONGEST))].append(number)
        found = {
            i: text
            for tokens, numbers in by_length.items()
            for i, text in zip(numbers, self._greedy([examples[i] for i in numbers], tokens), strict=True)
        }
        return [_cut(found[i], how.get("until") or []) for i, (_, how) in enumerate(requests)]

    def _greedy(self, examples: Sequence[Example], tokens: int) -> list[str]:
        """The greedy answer of at most so many tokens to each example."""

        def given(group: Sequence[int]) -> list[str]:
            some = [examples[i] for i in group]
            told = torch.tensor(self.embed([each.instruction for each in some])) if self.embed else None
            inputs = {} if told is None else {"gate_embedding": told}
            return answer(self.model, self.tokenizer, some, tokens, self.template, **inputs)

        return in_order(batches(self.model, self.tokenizer, examples, tokens, self.template), given)


def _cut(text: str, until: str | Sequence[str]) -> str:
    """Up to the first of the stops."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text


def _turns(example: Example, response: str) -> list[Example]:
    """The turns of a question with an answer to it."""
    return replace(example, response=response).turns()


def _example(context: str) -> tuple[Example, str]:
    """The question of a context, with the turns before it, and what of its answer is begun already."""
    messages = json.loads(context) if context else [{"role": "user", "content": ""}]
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    system, history, question = opened(messages)
    return Example(question or "", "", "", system=system, history=history), begun


def _of_labels(logits: Float[Tensor, "tokens vocabulary"], labels: Any) -> tuple[float, bool]:
    """Sum of the labels' log probabilities, and whether each is the most likely token."""
    wanted = labels[1:] != IGNORED
    logs = logits[:-1][wanted].float().log_softmax(-1)
    chosen = labels[1:][wanted]
    return float(logs.gather(1, chosen[:, None]).sum()), bool((logs.argmax(-1) == chosen).all())


def _language_model(asked: Asked) -> Any:
    """The harness's view of a model."""
    from lm_eval.api.model import LM

    class Model(LM):
        tokenizer_name = "smartmops"  # names a cache of requests, which is not used

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return asked.scores([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise DataError("running text answers no instruction: give tasks with questions")

        def generate_until(self, requests: Any) -> list[str]:
            return asked.answered([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return json.dumps([{"role": each["role"], "content": each["content"]} for each in chat_history])

    return Model()


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness reports its steps, and libraries it brings theirs; what counts is in the results."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _without_git() -> Iterator[None]:
    """The harness asks git for the folder's commit; where there is none, git says so itself, whoever is quiet."""
    from lm_eval import evaluator

    asking = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asking
