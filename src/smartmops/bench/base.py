"""The sides of `smartmops bench MODEL`: one frozen base of one's own under MoPs and under PEFT's adapters.

Knows how `train` reads data and builds its default adapter. Knows no targets, and prints nothing.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import PrefixTuningConfig, get_peft_model

from smartmops.base import load_base
from smartmops.checks.errors import ConfigError
from smartmops.data.tasks import splits
from smartmops.options.bench import BenchConfig
from smartmops.options.method import MethodConfig
from smartmops.options.training import TaskConfig
from smartmops.preparing.adapting import adapt, words
from smartmops.reading.task import Task
from smartmops.states.answer_states import AnswerStates
from smartmops.states.fingerprint import of_weights
from smartmops.tokens.batches import Encoded

from .sides import METHODS, Lab, Side

GROUPS = {"short": 0.1, "middle": 0.5, "long": 0.9}  # of rows sorted by length, where the rows of each group begin
DRAWN = 8  # rows that are drawn for each row of a group


class BaseLab(Lab):
    """A base and examples as `train` reads them. Every side has modules of its own, and all share the base's weights.

    Rows that would have to be shortened are left out, so that the lengths are those of the data.
    """

    def __init__(self, config: BenchConfig) -> None:
        assert config.model is not None
        self.config = config
        self.settings = TaskConfig(
            model=config.model, data=config.data, dtype=config.dtype, columns=config.columns, experts=config.experts,
            max_length=config.max_length, prompts_per_expert=config.prompts_per_expert, batch_size=config.batch_size,
        )  # fmt: skip
        examples = list(splits(config.data, columns=config.columns)[0])
        random.Random(0).shuffle(examples)
        count = config.batches * config.batch_size
        self.frozen, self.tokenizer = load_base(config.model, config.dtype)
        self.task = Task.of(self.frozen, self.tokenizer, examples[: DRAWN * count + 100], [], self.settings)
        kept = [i for i, row in enumerate(self.task.train) if not row.tokens_cut]
        self.task = replace(self.task, train=[self.task.train[i] for i in kept],
                            train_examples=[self.task.train_examples[i] for i in kept])  # fmt: skip
        self.examples, self.collator = list(self.task.train_examples), self.task.collator
        if len(kept) < 2 * count:
            raise ConfigError(f"{config.data} has {len(kept)} examples of at most {config.max_length} tokens, but "
                              f"{config.batches} batches and as many to validate by take {2 * count}: choose fewer "
                              "--batches")  # fmt: skip
        self._take(self.task.train[:count])

    def _take(self, rows: Sequence[Encoded]) -> None:
        self.rows = list(rows)
        self.lengths = [len(row.input_ids) for row in self.rows]
        self.predicted = [sum(label >= 0 for label in row.labels[1:]) for row in self.rows]

    def group(self, name: str) -> BaseLab:
        """The same laboratory on rows of similar length: of all that were drawn, the short, middle or long ones."""
        found, count = copy.copy(self), len(self.rows)
        ordered = sorted(self.task.train, key=lambda row: len(row.input_ids))
        start = round(GROUPS[name] * (len(ordered) - count))
        chosen = ordered[start : start + count]
        random.Random(0).shuffle(chosen)
        found._take(chosen)
        return found

    def held_out(self) -> list[Encoded]:
        """Rows that no side is trained on."""
        return list(self.task.train[len(self.rows) : 2 * len(self.rows)])

    def inputs(self) -> dict[str, str]:
        """As `Lab`."""
        return of_weights(self.frozen)

    def base(self) -> Any:
        """The base in modules of its own, without a copy of its weights."""
        shared = [*self.frozen.parameters(), *self.frozen.buffers()]
        made = copy.deepcopy(self.frozen, {id(each): each for each in shared})
        return made.requires_grad_(False).eval()

    def method(self, name: str, experts: int | None = None, per_expert: int | None = None) -> MethodConfig:
        """The defaults of `train`; where nothing is prepared, experts are random and the gate reads half-way up."""
        c = self.config
        layers = int(self.frozen.config.get_text_config().num_hidden_layers)
        return MethodConfig(method=METHODS[name], experts=experts or c.experts, init="random", gate_layer=layers // 2,
                            prompts_per_expert=per_expert or c.prompts_per_expert)  # fmt: skip

    def adapted(self, method: MethodConfig) -> Any:
        """As `Lab.adapted`; an adapter of ours is told how the template writes answers."""
        if method.traits.ours:
            return self._built(method, words(self.task, method))
        return super().adapted(method)

    def side(self, name: str, experts: int | None = None) -> Side:
        """A model in training; `prefix_tuning` is PEFT's, with as many virtual tokens as there are prompts."""
        if name == "prefix_tuning":
            adapter = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.config.width)
            return Side(get_peft_model(self.base(), adapter), self.method("lora"), self._padded)
        method = self.method(name, experts)
        model = self.adapted(method)
        return Side(model, method, AnswerStates(model, self.rows) if name == "mops" else self._padded)

    def _padded(self, indices: Sequence[int]) -> dict[str, Any]:
        return dict(self.collator([self.rows[i] for i in indices]))

    def prepared(self) -> tuple[Any, float]:
        """A model of ours with gate, null expert and experts started from the rows, and the seconds that took."""
        task = replace(self.task, base=self.base(), train=self.rows, train_examples=self.examples[: len(self.rows)])
        started = time.perf_counter()
        model, _, _ = adapt(task, self.settings, self.settings, 0)
        return model, time.perf_counter() - started

    def settled(self, name: str) -> Side:
        """One of PEFT's sides as `train` trains it by default, with its own rates."""
        method = MethodConfig(method=METHODS[name])
        return Side(self.adapted(method), method, self._padded)
