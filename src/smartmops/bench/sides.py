"""What `smartmops bench` puts side by side: models of one shape, examples, clocks, memory, the arithmetic of a step.

Knows how each side is called. Knows no targets, and prints nothing.
"""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from smartmops.backbone.growing import make_room
from smartmops.checks.errors import ConfigError
from smartmops.data.tasks import splits
from smartmops.fitting.loop import fit
from smartmops.methods.baselines import build, peft_config
from smartmops.options.bench import POSITIONS, BenchConfig
from smartmops.options.method import Method, MethodConfig
from smartmops.options.training import Schedule
from smartmops.states.activations import ActivationCache
from smartmops.tiny import resolve
from smartmops.tokens.batches import Collator, encode_all, prompts

METHODS: dict[str, Method] = {
    "mops": "mops", "padded": "mops", "prompt_tuning": "input-prompt-tuning", "lora": "lora",
}  # fmt: skip


@dataclass
class Side:
    """A model in training: its method, and a collator of indices of the laboratory's rows."""

    model: Any
    method: MethodConfig
    collate: Callable[[Sequence[int]], dict[str, Any]]


class Lab:
    """Random models of one shape, and the examples that every side works on."""

    def __init__(self, config: BenchConfig) -> None:
        self.config, self.tokenizer = config, AutoTokenizer.from_pretrained(resolve("tiny"))
        self.examples = list(splits(config.data, columns=config.columns)[0])
        random.Random(0).shuffle(self.examples)
        count = config.batches * config.batch_size
        found = encode_all(self.examples[: 2 * count + 100], self.tokenizer, config.max_length).rows
        if len(found) < count:
            raise ConfigError(f"{config.data} has {len(found)} examples of at most {config.max_length} tokens, but "
                              f"{config.batches} batches take {count}: choose fewer --batches")  # fmt: skip
        self.rows, self.collator = found[:count], Collator(self.tokenizer)
        self.lengths = [len(row.input_ids) for row in self.rows]
        self.predicted = [sum(label >= 0 for label in row.labels[1:]) for row in self.rows]

    def inputs(self) -> dict[str, str]:
        """What tells the base from others; of a random one, its options do."""
        return {}

    def base(self) -> Any:
        """A frozen random Llama, the same every time."""
        c = self.config
        torch.manual_seed(0)
        shape = LlamaConfig(vocab_size=c.vocabulary, hidden_size=c.hidden, intermediate_size=c.intermediate,
                            num_hidden_layers=c.layers, num_attention_heads=c.heads,
                            max_position_embeddings=POSITIONS)  # fmt: skip
        return LlamaForCausalLM(shape).requires_grad_(False).eval()

    def method(self, name: str, experts: int | None = None, per_expert: int | None = None) -> MethodConfig:
        """Experts as in the paper; a small rate, so that no side runs away from a random model."""
        c = self.config
        return MethodConfig(method=METHODS[name], experts=experts or c.experts, prompt_lr=1e-3, gate_lr=1e-3,
                            prompts_per_expert=per_expert or c.prompts_per_expert,
                            injection_layer=c.injection_layer, expert_kind="hidden_states", init="random")  # fmt: skip

    def adapted(self, method: MethodConfig) -> Any:
        """The random base with a fresh adapter. LoRA goes without dropout, which would only slow it down."""
        if method.traits.adapter != "lora":
            return self._built(method)
        config: Any = peft_config(method)
        config.lora_dropout = 0.0
        return get_peft_model(self.base(), config)

    def _built(self, method: MethodConfig, words: dict[str, Any] | None = None) -> Any:
        return build(self.base(), method, words=words)

    def loras(self, names: Sequence[str]) -> Any:
        """The random base with a LoRA for each name."""
        method = self.method("lora")
        model = get_peft_model(self.base(), peft_config(method), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft_config(method))
        return model

    @cached_property
    def cache(self) -> ActivationCache:
        """Of all rows, in memory. It depends on the base alone, so it serves any number of experts."""
        return self.fill(self.adapted(self.method("mops")))

    def fill(self, model: Any) -> ActivationCache:
        """The lower half over all rows."""
        return ActivationCache.fill(model, self.rows, progress=False)

    def side(self, name: str, experts: int | None = None) -> Side:
        """A model in training; `padded` is MoPs without cache and packing."""
        method = self.method(name, experts)

        def padded(indices: Sequence[int]) -> dict[str, Any]:
            return dict(self.collator([self.rows[i] for i in indices]))

        return Side(self.adapted(method), method, self.cache if name == "mops" else padded)

    def groups(self) -> list[range]:
        """Numbers of the examples of each batch, in order."""
        size = self.config.batch_size
        return [range(start, start + size) for start in range(0, len(self.rows), size)]

    def train(self, side: Side) -> tuple[float, list[list[int]]]:
        """As many steps as there are batches, under HF's Trainer: seconds, and the examples of each step.

        One more step goes before them, uncounted. The order of the examples is the same for every side.
        """
        steps = self.config.batches + 1
        seen: list[list[int]] = []
        ticks: list[float] = []

        def collate(indices: Sequence[int]) -> dict[str, Any]:
            seen.append(list(indices))
            return side.collate(indices)

        schedule = Schedule(steps=steps, batch_size=self.config.batch_size, lr_schedule="linear",
                            warmup_steps=0, max_grad_norm=1.0, log_every=1, save_every=10**9)  # fmt: skip
        folder = self.config.out / "checkpoints"
        side.model.train()
        fit(side.model, side.method, schedule, range(len(self.rows)), collate, folder,
            lambda row: ticks.append(time.perf_counter()))  # fmt: skip
        return ticks[-1] - ticks[0], seen[1:steps]

    def instruction(self, rows: int) -> dict[str, Tensor]:
        """`rows` texts of `prompt_tokens` tokens each."""
        size = self.config.prompt_tokens
        tokens = [token for row in self.rows for token in row.input_ids]
        tokens = tokens * -(-rows * size // len(tokens))
        ids = torch.tensor(tokens[: rows * size]).view(rows, size)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def mixed(self) -> dict[str, Tensor]:
        """A left-padded batch of one instruction of each task (of as many tasks as experts)."""
        of_task = {example.category: example for example in reversed(self.examples)}
        chosen = [of_task[task] for task in sorted(of_task)] * self.config.experts
        batch = prompts(chosen[: self.config.experts], self.tokenizer, self.config.max_length)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


# -------------------------------------------------------------------------------------------------------------- clocks
def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each side returns, `repeats` times, taking turns (the order reversed every time) after one for warmth."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            found[name].append(sides[name]())
    return {name: values[1:] for name, values in found.items()}


def clocked(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def neighbour() -> Iterator[None]:
    """Meanwhile another process computes on one thread, on the last core that this one may use where one can choose."""
    code = ("import os\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
            "print(flush=True)\nwhile True: pass")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def slowed(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """`alternate` without and with a `neighbour`."""
    quiet = alternate(sides, repeats)
    with neighbour():
        return {"quiet": quiet, "busy": alternate(sides, repeats)}


class _Clock(StoppingCriteria):
    """Never stops anything; notes when each token was there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate(model: Any, batch: Mapping[str, Tensor], tokens: int, **options: Any) -> float:
    """Greedy generation of exactly so many tokens per row; the median seconds of one step after the first."""
    clock = _Clock()
    model.generate(**batch, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
                   stopping_criteria=StoppingCriteriaList([clock]), **options)  # fmt: skip
    return median(after - before for before, after in pairwise(clock.ticks))


def in_place(model: Any) -> dict[str, Any]:
    """For `generate`: a cache such as MoPs writes to, which transformers alone would copy at every step."""
    cache = DynamicCache(config=model.config)
    make_room(cache)
    return {"past_key_values": cache}


@torch.no_grad()
def prefill(model: Any, batch: Mapping[str, Tensor]) -> None:
    """One pass over the instruction, as `generate` begins: a cache, and logits of the last token only."""
    model(**batch, use_cache=True, logits_to_keep=1)


def matmul_rate(size: int) -> float:
    """Floating-point operations per second of one square float32 product."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    out = torch.empty(size, size)
    return 2 * size**3 / clocked(lambda: torch.matmul(left, right, out=out))


# -------------------------------------------------------------------------------------------------------------- memory
def _status(name: str) -> int | None:
    """Bytes, of VmRSS (now) or VmHWM (at most so far); None where there is no /proc."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def rise(call: Callable[[], object]) -> tuple[int, int] | None:
    """Resident bytes before the call, and at most during it; None where the system does not say."""
    if hasattr(library := ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim"):
        library.malloc_trim(0)  # type: ignore[union-attr]  # what is freed already must not hide what is taken
    before, reset = _status("VmRSS"), Path("/proc/self/clear_refs")
    if before is not None:
        reset.write_text("5")  # the highest mark falls to what is resident now
    call()
    peak = _status("VmHWM")
    return None if before is None or peak is None else (before, peak)


def train_apart(config: BenchConfig, name: str) -> tuple[int, int] | None:
    """`rise` of building and training one side, in a process of its own that has loaded libraries and data before."""
    code = "import sys; from smartmops.bench.sides import _train_here; _train_here(*sys.argv[1:])"
    arguments = json.dumps(asdict(config) | {"out": str(config.out)})
    done = subprocess.run([sys.executable, "-c", code, name, arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"training {name} in a process of its own failed: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else (found[0], found[1])


def _train_here(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    config = BenchConfig(
        **{field.name: given[field.name] for field in fields(BenchConfig)} | {"out": Path(given["out"])}
    )
    torch.set_num_threads(config.threads)
    lab = laboratory(config)
    print(json.dumps(rise(lambda: lab.train(lab.side(name)))))


def laboratory(config: BenchConfig) -> Lab:
    """Of the base that is named, or of random Llamas."""
    from .base import BaseLab  # which stands on this file

    return Lab(config) if config.model is None else BaseLab(config)


# ---------------------------------------------------------------------------------------------------------- arithmetic
def step_flops(config: BenchConfig, lengths: Sequence[int], predicted: int) -> dict[str, int]:
    """Floating-point operations of one training step from cached activations, all tokens through all upper layers.

    U = layers - injection layer, d = hidden, m = intermediate, V = vocabulary, K prompts of E experts with P each,
    n = sum of the lengths l of the segments, r = tokens that are predicted.

    - linear layers have W = 4 d^2 + 3 d m weights. Forward, 2 W U (n + K). The gradient with respect to their inputs
      (weights are frozen) costs the same again, but for the query, key and value of tokens in the first layer, whose
      inputs are given: - 2 n 3 d^2. Of the prompts' last layer only keys and values are read: - 2 * 2 K (W - 2 d^2).
    - attention costs 4 d for each pair of a token and what it sees (query times key, weight times value), and 8 d
      in the gradient. A segment has a = l (l + 1) / 2 pairs of text and b = l K with the prompts, the prompts c = E P
      (P + 1) / 2 among themselves: 12 d (U (a + b) + (U - 1) c), less what leads only to the given inputs of the first
      layer, 8 d a + 2 d b.
    - head, on predicted tokens only: forward and gradient, 4 r d V.

    Norms, activations, softmax, rotations and the gate (d_in * 64 weights per segment) are not counted.
    """
    d, layers, k, tokens = config.hidden, config.layers - config.injection_layer, config.width, sum(lengths)
    weights = 4 * d * d + 3 * d * config.intermediate
    given, unread = 2 * tokens * 3 * d * d, 4 * k * (weights - 2 * d * d)
    text, prefix = sum(n * (n + 1) // 2 for n in lengths), tokens * k
    among = config.experts * config.prompts_per_expert * (config.prompts_per_expert + 1) // 2
    pairs = 12 * d * (layers * (text + prefix) + (layers - 1) * among)
    return {
        "linear": 4 * weights * layers * (tokens + k) - given - unread,
        "attention": pairs - 8 * d * text - 2 * d * prefix,
        "head": 4 * predicted * d * config.vocabulary,
    }
