"""A frozen base beside its data: what every method, seed and client compared in one sitting shares.

Knows how base, examples, cache and a fresh adapter belong together. Knows no loop and writes no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from smartmops.base import load_base, local
from smartmops.checks.errors import DataError
from smartmops.data.tasks import splits
from smartmops.evaluation.perplexity import Evaluation, evaluate
from smartmops.experts.gate import by_expert
from smartmops.fitting import ranks
from smartmops.fitting.validation import hold_out
from smartmops.methods.baselines import build
from smartmops.options.method import GatePretraining, MethodConfig
from smartmops.options.training import TaskConfig, ValidationConfig
from smartmops.preparing import gating
from smartmops.preparing.embedder import Embedder
from smartmops.preparing.initial import initialise
from smartmops.preparing.pretrain import assign, pretrain_gate, standardise, train_recovery
from smartmops.preparing.selection import level, told, wire
from smartmops.progress.bars import console
from smartmops.rows.example import Example
from smartmops.rows.stored import take
from smartmops.states.activations import ActivationCache, free_memory
from smartmops.states.answer_states import AnswerStates
from smartmops.states.instructions import instructions
from smartmops.tokens.batches import Collator, Encoded, Encoding, NoneFits, encode_all, packed
from smartmops.tokens.frames import gate_frame
from smartmops.tokens.template import Template, check_template
from smartmops.tokens.unfit import Limit
from smartmops.tuner import MoPsModel

from .early import check_base, check_hold_out, check_parts, check_split, warn_of_calibration


@dataclass
class Task:
    """A frozen base with the data it is to be adapted to: what every method compared in one sitting shares."""

    base: Any
    tokenizer: Any
    train: Sequence[Encoded]
    test: Sequence[Encoded]
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    collator: Collator
    template: Template  # that texts are rendered with
    recovery: torch.Tensor | None = None
    embedder: Embedder | None = None
    activations: str = "auto"
    validation: Sequence[Encoded] = ()  # of the training split, not trained on
    caches: dict[Any, ActivationCache | AnswerStates | None] = field(default_factory=dict)
    found: dict[Any, Any] = field(default_factory=dict)  # what was worked out about base and data, once for all
    limit: Limit = field(default_factory=lambda: Limit(0))  # of a row's length
    held_out: Mapping[str, int] = field(default_factory=dict)  # training examples left out by `hold_out`, by source
    too_long: Sequence[tuple[str, int]] = ()  # sources and tokens of the training examples left out for it

    @classmethod
    def load(cls, config: TaskConfig, base: Any = None, tokenizer: Any = None) -> Task:
        """Read, split and encode the data, load the base unless given, train recovery prompts; says what was cut.

        A base that is adapted already brings its own recovery prompts, or none.

        Raises:
            DataError: `hold_out` is no category of the training split, or the only one; the data do not fit.
        """
        train, test = splits(config.data, config.limit, config.test_share, config.data_seed, config.validation,
                             config.folder, config.columns)  # fmt: skip
        if config.hold_out is not None:
            check_hold_out(config.hold_out, {example.category for example in train})
        warn_of_calibration(config, local(config.model), console)
        check_template(config.template)
        check_parts(config.data, len(train), len(test))
        if base is None:
            check_base(config, local(config.model))
            check_split(config, len(train), len(test), ranks.world())
            base, tokenizer = load_base(config.model, config.dtype)
        task = cls.of(base, tokenizer, train, test, config)
        if config.recovered_by and config.traits.ours and not isinstance(base, PeftModel):
            size = config.batch_size * ranks.world()
            task.recovery = train_recovery(base, task.train, task.collator, config.recovered_by,
                                           config.recovery_steps, config.recovery_lr, size, config.seed)  # fmt: skip
        return task

    @classmethod
    def of(
        cls, base: Any, tokenizer: Any, train: Sequence[Example], test: Sequence[Example], config: TaskConfig
    ) -> Task:
        """Encode examples for a base; either part may be empty. What does not fit is left out, and said.

        Examples of the category `hold_out` are left out of the training part only.
        """
        held_out = Counter[str]()
        if config.hold_out is not None:
            held_out.update(example.source for example in train if example.category == config.hold_out)
            train = take(train, (i for i, example in enumerate(train) if example.category != config.hold_out))
        held: Sequence[Example] = []
        if isinstance(config, ValidationConfig):
            train, held = hold_out(train, config, config.data_seed)
        limit = Limit(config.max_length, getattr(base.config, "max_position_embeddings", None))
        if limit.tokens < config.max_length:
            console.print(f"--max-length {config.max_length}: this base has {limit.tokens} positions, so that is the "
                          "limit")  # fmt: skip
        template = Template.of(config.template, tokenizer)
        collator = Collator(tokenizer)
        embedder = Embedder(config.embedder) if config.embedder else None
        rows: list[Sequence[Encoded]] = []
        kept: list[Sequence[Example]] = []
        too_long: Sequence[tuple[str, int]] = ()
        for name, part in (("train", train), ("test", test), ("validation", held)):
            if not part:
                rows.append([])
                kept.append([])
                continue
            encoding = _encoded(name, part, tokenizer, limit, embedder, config.folder, template)
            kept.append(take(part, encoding.kept))
            rows.append(encoding.rows)
            if name == "train":
                too_long = [(part[index].source, tokens) for index, tokens in encoding.too_long.items()]
        return cls(base, tokenizer, rows[0], rows[1], kept[0], kept[1], collator, template, None, embedder,
                   config.activations, rows[2], limit=limit, held_out=held_out,
                   too_long=too_long)  # fmt: skip

    def adapt(self, method: MethodConfig, gate: GatePretraining, seed: int) -> tuple[Any, list[str], float | None]:
        """A fresh adapter, experts initialised and gate pretrained; also expert names and the gate's accuracy."""
        set_seed(seed)
        width = self.embedder.width if self.embedder and method.traits.reads else None
        method = self.placed(method, gate, width)
        words = self.words(method)
        model = build(self.base, method, self.recovery, method.experts if method.traits.told else width, words)
        return (model, [], None) if not method.traits.ours else (model, *self.start(model, method, gate, seed))

    def start(
        self, model: Any, method: MethodConfig, gate: GatePretraining, seed: int
    ) -> tuple[list[str], float | None]:
        """Fit the gate and initialise the experts of a fresh adapter; expert names and the gate's accuracy."""
        config = model.base_model.layer().configs["default"]
        names, accuracy, rows, expert_of = ["all"], None, self.train, [0] * len(self.train)
        if config.num_experts > 1 and config.experts == "keys_values" and not method.traits.told:
            rows, expert_of, names, accuracy = self._gate_of_some(model, method, gate, seed)
        elif config.num_experts > 1:
            expert_of, names, accuracy = self._gate(model, method, gate, seed)
        if method.init == "hidden_states":
            initialise(model, rows, self.collator, expert_of, seed)
        return names, accuracy

    def words(self, method: MethodConfig) -> dict[str, Any]:
        """What an adapter must know of the template; with a plain frame, hidden states are read as they always were."""
        own = method.expert_kind == "keys_values" or self.template.source is not None
        return {"answer_header": self.template.header_ids, "gate_frame": gate_frame(self.template),
                "gate_reads": "own" if own else "all"}  # fmt: skip

    def placed(self, method: MethodConfig, gate: GatePretraining, width: int | None) -> MethodConfig:
        """With the layer that the gate reads, where that is to be found out."""
        free = method.gate_layer is None and width is None and method.traits.reads and method.answers_alone
        if not free:
            return method
        layers = int(self.base.config.get_text_config().num_hidden_layers)
        tasks = sorted({row.category for row in self.train})
        if gate.gate_pretraining != "labels" or len(tasks) < 2:
            return replace(method, gate_layer=layers // 2)
        if "gate_layer" not in self.found:
            of = [tasks.index(row.category) for row in self.train]
            chosen = gating.draw(of, gating.PROBED, 0)
            means = gating.layer_means(self.base, [self.train[i] for i in chosen])
            layer = gating.best_layer(means, [of[i] for i in chosen], len(tasks), layers - 1)
            console.print(f"the gate reads layer {layer}, where instructions tell their tasks apart best")
            self.found["gate_layer"] = layer
        return replace(method, gate_layer=self.found["gate_layer"])

    def _meant_by(self, gate: GatePretraining) -> str:
        """What says which expert an instruction is meant for: its category, or else its cluster."""
        if gate.gate_pretraining == "labels" and gate.expert_names is None and not any(r.category for r in self.train):
            console.print("no example has a category, so each expert is meant for a cluster of instructions")
            return "clusters"
        return "clusters" if gate.gate_pretraining == "none" else gate.gate_pretraining

    def _gate_of_some(
        self, model: Any, method: MethodConfig, gate: GatePretraining, seed: int
    ) -> tuple[Sequence[Encoded], list[int], list[str], float | None]:
        """`_gate` from a sample of the instructions; also that sample, in whose order the experts are meant for."""
        config = model.base_model.layer().configs["default"]
        tasks = sorted({row.category for row in self.train})
        chosen = gating.draw([tasks.index(row.category) for row in self.train], gating.FITTED, 0)
        rows = [self.train[i] for i in chosen]
        pooled = self._read(model, "train", rows)
        standardise(model, pooled)
        how = self._meant_by(gate)
        expert_of, names = assign(rows, pooled, config.num_experts, how, seed, gate.expert_names)
        config.expert_names, accuracy = names, None
        if method.traits.gate == "even":
            level(model)
        elif gate.gate_pretraining != "none" and method.traits.learned:
            if gate.gate_start == "gradient" or not config.gate_bias:
                accuracy = pretrain_gate(model, pooled, torch.tensor(expert_of), gate)
            else:
                features = model.base_model.layer().standardised(pooled, "default")
                scores = gating.ridge(features, torch.tensor(expert_of), config.num_experts)
                gating.start_gate(model, scores)
                accuracy = scores.accuracy
        if config.null_expert:
            self._fit_null(model, method, pooled, expert_of)
        return rows, expert_of, names, accuracy

    def _fit_null(
        self, model: Any, method: MethodConfig, pooled: Float[Tensor, "n inputs"], expert_of: list[int]
    ) -> None:
        texts = gating.unrelated_texts(method.unrelated)
        examples = [Example(text, "", ".") for text in texts]
        rows = encode_all(examples, self.tokenizer, 512, self.embedder, template=self.template).rows
        fitted = gating.fit_null(model, pooled, expert_of, self._read(model, str(method.unrelated), rows))
        console.print(f"null expert: {fitted.caught:.0%} of {len(rows)} unrelated texts are left to the base, and "
                      f"{1 - fitted.kept:.0%} of held-out training instructions")  # fmt: skip

    def _read(self, model: Any, what: str, rows: Sequence[Encoded]) -> Float[Tensor, "n inputs"]:
        """What the gate reads of these rows; the same for all methods and seeds, so read once."""
        key = (what, *self._key(model), _read_at(model))
        if key not in self.found:
            self.found[key] = instructions(model, rows).cpu()
        return self.found[key].to(model.device)  # type: ignore[no-any-return]

    def _gate(
        self, model: Any, method: MethodConfig, gate: GatePretraining, seed: int
    ) -> tuple[list[int], list[str], float | None]:
        """Make the gate what the method wants; the expert each example is meant for, their names, the accuracy."""
        config, accuracy = model.base_model.layer().configs["default"], None
        cache = self.cache(model)
        pooled = instructions(model, self.train) if cache is None else cache.pooled.to(model.device)
        if method.traits.told:
            wire(model)
            expert_of, names = pooled.argmax(-1).tolist(), [f"cluster {i}" for i in range(config.num_experts)]
            if method.traits.by_task:
                _, names = assign(self.train, pooled, config.num_experts, "labels", seed)
        else:
            standardise(model, pooled)
            how = self._meant_by(gate)
            expert_of, names = assign(self.train, pooled, config.num_experts, how, seed, gate.expert_names)
            if method.traits.gate == "even":
                level(model)
            elif gate.gate_pretraining != "none" and method.traits.learned:
                accuracy = pretrain_gate(model, pooled, torch.tensor(expert_of), gate)
            if config.null_expert:
                self._fit_null(model, method, pooled, expert_of)
        config.expert_names = names
        return expert_of, names, accuracy

    def told(self, method: MethodConfig, seed: int) -> Task:
        """This task, or where the method's gate is told what to choose, one whose rows say it.

        Raises:
            DataError: more tasks than experts, or a test task that training never saw.
        """
        if not method.traits.told:
            return self
        train, rest = told(self.base, self.train, [*self.test, *self.validation], method, seed)
        count = len(self.test)
        return replace(self, train=train, test=rest[:count], validation=rest[count:], caches={}, found={})

    @staticmethod
    def _key(model: Any) -> tuple[Any, ...]:
        """What the frozen half's results depend on, beside the rows."""
        config = model.base_model.layer().configs["default"]
        return (config.injection_layer, config.num_recovery_prompts, config.gate_input, config.embedding_size,
                config.visible_to)  # fmt: skip

    def cache(self, model: Any, rows: Sequence[Encoded] | None = None) -> ActivationCache | AnswerStates | None:
        """The lower half's results on the training split, computed once for all methods and seeds that share it.

        Or on other rows of this task, such as the test split. None where it is off or does not fit the memory.
        """
        rows = self.train if rows is None else rows
        answers = model.base_model.layer().configs["default"].visible_to == "answers"
        key = (*self._key(model), None if answers else _read_at(model), id(rows))
        if key not in self.caches:
            self.caches[key] = self._fill(model, rows)
        found = self.caches[key]
        if isinstance(found, AnswerStates):
            found.model = model  # of several methods on this base, the one that asks
        return found

    def _fill(self, model: Any, rows: Sequence[Encoded]) -> ActivationCache | AnswerStates | None:
        if model.base_model.layer().configs["default"].visible_to == "answers":
            if self.activations not in ("auto", "memory", "off"):
                console.print(f"--activations {self.activations}: states of answers are kept in memory, not on disk")
            return AnswerStates(model, rows, 0 if self.activations == "off" else None)
        if self.activations == "off":
            return None
        if self.activations == "auto":
            need, free = ranks.on_this_machine() * ActivationCache.size(model, rows), free_memory()
            if free is not None and need > free / 4:
                console.print(
                    f"activations would take {need / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB of "
                    "free memory, so the lower half runs in every step; --activations DIR keeps them on disk"
                )
                return None
        folder = None if self.activations in ("auto", "memory") else Path(self.activations)
        return ActivationCache.fill(model, rows, folder)

    def evaluate(self, model: Any, progress: bool = False, rows: Sequence[Encoded] | None = None) -> Evaluation:
        """Perplexity on the test split, or on `rows`; a MoPs model runs its upper half only, from the second time on.

        `rows` must outlive this task's caches, which know them by their identity.
        """
        rows = self.test if rows is None else rows
        cache = self.cache(model, rows) if isinstance(model.base_model, MoPsModel) else None
        return evaluate(model, rows, self.collator, progress=progress, cache=cache)

    def feed(self, model: Any) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
        """A data set and its collator for `fit`: MoPs train on examples end to end, from the injection layer up."""
        if not isinstance(model.base_model, MoPsModel):
            return self.train, self.collator
        cache = self.cache(model)
        return (self.train, packed) if cache is None else (range(len(cache)), cache)

    def weights(self, model: Any) -> Float[Tensor, "test experts"]:
        """Gate weight of each expert for each test instruction."""
        model.eval()
        layer = model.base_model.layer()
        config = layer.configs["default"]
        pooled = self._read(model, "test", self.test)
        with torch.no_grad():
            return by_expert(layer.gate(pooled, "default"), config.num_experts)

    def gates(self, model: Any) -> dict[str, list[float]]:
        """Mean gate weight of each expert for the test instructions of each task (paper, Figures 5 to 11)."""
        return self.mean_weights(self.weights(model))

    def mean_weights(self, weights: Float[Tensor, "test experts"]) -> dict[str, list[float]]:
        """`gates`, of the weights that `weights` returned."""
        return {task: own.mean(0).tolist() for task, own in self._by_task(weights).items()}

    def choices(self, weights: Float[Tensor, "test experts"], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """How decided the gate is on each task's test instructions, and for whom, of what `weights` returned.

        `entropy`, in nats, is the mean over instructions of -sum(w log w), w being the weights of the experts made to
        sum to one: 0 for one expert alone, log(experts) for all alike. `nearest` is the expert with the highest mean
        weight (of equals the first), by its name in `names` [experts].
        """
        share = weights / weights.sum(-1, keepdim=True)
        entropy = self._by_task(torch.special.entr(share).sum(-1))
        return {
            task: {"entropy": entropy[task].mean().item(), "nearest": names[int(own.mean(0).argmax())]}
            for task, own in self._by_task(weights).items()
        }

    def _by_task(self, values: Float[Tensor, "test ..."]) -> dict[str, Float[Tensor, "some ..."]]:
        tasks = sorted({row.category for row in self.test})
        return {task: values[[row.category == task for row in self.test]] for task in tasks}


def _encoded(name: str, part: Sequence[Example], tokenizer: Any, limit: Limit, *how: Any) -> Encoding:
    """`encode_all` of one part of the data, called `name`; says what was cut.

    Raises:
        DataError: as `encode_all`; where nothing fits, with the option and what would help.
    """
    try:
        encoding = encode_all(part, tokenizer, limit.tokens, *how)
    except NoneFits as error:
        raise DataError(f"{name}: {limit.none_fits(error.lengths, len(part))}") from error
    console.print(f"{name}: {len(encoding.rows)} examples; {encoding.truncation}")
    return encoding


def _read_at(model: Any) -> int | None:
    """The layer that the gate reads."""
    layer: int | None = model.base_model.layer().configs["default"].gate_layer
    return layer
