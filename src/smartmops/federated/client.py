"""A client's round: received arrays in, arrays after local training out. Any adapter that PEFT knows goes through.

Knows a frozen base, rows of tokens and named arrays. Knows no server, no other clients and no network.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftConfig
from torch import Tensor

from smartmops.checks.errors import DataError, Diverged, FederationError
from smartmops.clients.messages import VERSION, Failure, Hello, Job, Local, Reply, pack, unpack
from smartmops.experts.gate import by_expert
from smartmops.methods.baselines import parameter_groups
from smartmops.options.method import MethodConfig
from smartmops.reading.task import Task
from smartmops.rows.example import of_examples
from smartmops.runs.adapters import adapter_on
from smartmops.settings.writing import versions
from smartmops.states.instructions import instructions
from smartmops.tuner import MoPsModel

ADAPTER = "default"
PROMPTS = ("mops_prompts", "mops_keys", "mops_values")  # in the names of arrays that are split by expert
GATE = "mops_gate"  # in the names of the gate's, which need not travel where nothing hangs on it


# ------------------------------------------------------------------------------------------------------------- arrays
def arrays_of(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's own tensors by name, not copied: those trained, and constants (the gate's mean, ...)."""
    idle = isinstance(model.base_model, MoPsModel) and model.base_model.layer().configs[ADAPTER].gate_is_idle
    own = {
        name.replace(f".{ADAPTER}", ""): value
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if f".{ADAPTER}" in name and not (idle and GATE in name)
    }
    trained = {name: value for name, value in own.items() if value.requires_grad}
    return trained, {name: value for name, value in own.items() if not value.requires_grad}


@torch.no_grad()
def load_arrays(model: Any, arrays: Mapping[str, Tensor]) -> None:
    """Write arrays into the adapter.

    Raises:
        FederationError: a name is none of the adapter's, one is missing, or a shape differs.
    """
    trained, constants = arrays_of(model)
    own = trained | constants
    if odd := sorted(own.keys() ^ arrays.keys()):
        where = "is none of this adapter's" if odd[0] in arrays else "is missing from what was received"
        raise FederationError(f"array {odd[0]!r} {where}: server and client must build the same adapter")
    for name, value in arrays.items():
        if own[name].shape != value.shape:
            raise FederationError(f"array {name!r} is of shape {list(value.shape)}, here of {list(own[name].shape)}: "
                                  "server and client must build the same adapter on the same base")  # fmt: skip
        own[name].copy_(value)


def split_by_expert(model: Any) -> tuple[int, frozenset[str]]:
    """Number of experts, and the names of trained arrays whose rows belong to one expert after another."""
    if not isinstance(model.base_model, MoPsModel):
        return 1, frozenset()
    experts = model.base_model.layer().configs[ADAPTER].num_experts
    names = frozenset(name for name in arrays_of(model)[0] if any(part in name for part in PROMPTS))
    return (experts, names) if experts > 1 else (1, frozenset())


def adapter_words(model: Any) -> dict[str, Any]:
    """PEFT's config of the adapter, as JSON carries it."""
    found: dict[str, Any] = json.loads(json.dumps(model.peft_config[ADAPTER].to_dict(), default=list))
    return found


# ----------------------------------------------------------------------------------------------------------- training
def order(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Batches of numbers below `count`: every epoch shuffled anew, in the order of Hugging Face's `Trainer`."""
    done, epoch = 0, 0
    while done < steps:
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, count, batch_size):
            yield shuffled[start : start + batch_size]
            done += 1
            if done == steps:
                return
        epoch += 1


def train_locally(
    model: Any,
    batch: Callable[[Sequence[int]], dict[str, Any]],
    holding: Sequence[int],
    local: Local,
) -> float:
    """Adam for `local.steps` steps on the examples in `holding`, at a constant rate; the mean loss in nats a token.

    A fresh optimiser each round, as in FedAvg (McMahan et al. 2017): a client keeps nothing between rounds. FedProx (Li
    et al. 2020) pulls back to what was received.

    Raises:
        DataError, Diverged: the loss is not finite, or there are no examples.
    """
    if not holding:
        raise DataError("0 examples to train on")
    torch.manual_seed(local.seed)  # for dropout, where the adapter has some
    rates = MethodConfig(prompt_lr=local.prompt_lr, gate_lr=local.gate_lr, head_lr=local.head_lr)
    groups = parameter_groups(model, rates)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    trained = [p for group in groups for p in group["params"]]
    received = [p.detach().clone() for p in trained] if local.proximal else []
    losses = []
    model.train()
    for chosen in order(len(holding), local.batch_size, local.steps, local.seed):
        inputs = send_to_device(batch([holding[i] for i in chosen]), model.device)
        loss = model(**inputs).loss
        loss.backward()
        for parameter, start in zip(trained, received, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=local.proximal)
        torch.nn.utils.clip_grad_norm_(trained, local.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    model.eval()
    found = torch.stack(losses)
    if not found.isfinite().all():
        step = int((~found.isfinite()).nonzero()[0])
        raise Diverged(f"loss became {float(found[step])} at local step {step + 1} with prompt_lr={local.prompt_lr}: "
                       "choose a smaller one")  # fmt: skip
    return float(found.double().mean())


# ------------------------------------------------------------------------------------------------------------- worker
@dataclass
class Held:
    """A model ready for jobs: what it was built from, and its batches."""

    key: str
    model: Any
    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The keyword arguments of the model's forward pass."""
        return self.collate([self.rows[i] for i in indices])


class Worker:
    """Answers the jobs of every client whose data it holds, with one frozen base and one activation cache for all.

    Args:
        task: The base and all rows.
        holdings: Numbers of each client's rows in `task.train`.
        names: Of the clients.
        base: Fingerprint of the base (`fingerprint.of_base`).
        model: An adapted model to share with the server, where both live in one process.
        secret: Under which the server is told whether a client's data are what they were, and can tell no more of them.
    """

    def __init__(
        self, task: Task, holdings: Sequence[Sequence[int]], names: Sequence[str], base: str, model: Any = None,
        secret: bytes = b"",
    ) -> None:  # fmt: skip
        self.task, self.holdings, self.names, self.base, self.secret = task, holdings, names, base, secret
        self._held: Held | None = None
        self._told = dict[int, str]()
        self._shared = model

    def hello(self, client: int) -> bytes:
        """Who the client is and what it holds, without any of it."""
        rows = [self.task.train[i] for i in self.holdings[client]]
        categories = sorted({row.category for row in rows})
        spoken = versions() | {"messages": str(VERSION)}
        return pack(Hello(self.names[client], len(rows), categories, self.base, spoken, self._data(client)))

    def _data(self, client: int) -> str:
        """What tells a client's data from any others, once computed, and says nothing else of them."""
        if client not in self._told:
            held = of_examples([self.task.train_examples[i] for i in self.holdings[client]])
            self._told[client] = blake2b(held.encode(), key=blake2b(self.secret).digest(), digest_size=16).hexdigest()
        return self._told[client]

    def answer(self, blob: bytes, client: int | None = None) -> bytes:
        """A packed `Reply` or `Failure` to a packed `Job`; raises nothing that a job can cause.

        `client` says whose data are meant where the numbers of the server are not this worker's.
        """
        number, job = -1, None
        try:
            job = unpack(blob)
            if not isinstance(job, Job):
                raise FederationError(f"a {type(job).__name__} came where a Job was expected")
            number = job.client if client is None else client
            return pack(self._reply(job, number))
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            where = (job.round, job.client) if isinstance(job, Job) else (0, number)
            return pack(Failure(*where, f"{type(error).__name__}: {error}"))

    def _reply(self, job: Job, number: int) -> Reply:
        if job.base != self.base:
            raise FederationError(f"the server's base model is {job.base}, this client's is {self.base}: load the same "
                                  "model and tokenizer")  # fmt: skip
        held = self._hold(job)
        load_arrays(held.model, job.arrays)
        started = time.perf_counter()
        holding = self.holdings[number]
        loss = train_locally(held.model, held.batch, holding, job.local)
        seconds = time.perf_counter() - started
        mass = self._mass(held.model, holding)
        arrays, experts = _outgoing(held.model, job, mass)
        return Reply(job.round, job.client, len(holding), loss, seconds, mass, experts, job.local.half, arrays,
                     self._data(number))  # fmt: skip

    def _hold(self, job: Job) -> Held:
        """The model of this adapter; a new one where adapter or constants are others than in the last job."""
        trained = self._held and arrays_of(self._held.model)[0].keys()
        key = json.dumps(job.adapter, sort_keys=True)
        if self._held is not None and self._held.key == key and self._same_constants(job, trained or ()):
            return self._held
        if self._shared is not None and adapter_words(self._shared) == job.adapter:
            model = self._shared
        else:
            if self._held is not None:
                self._held.model.base_model.unload()
                self.task.base.requires_grad_(False)
            model = adapter_on(self.task.base, PeftConfig.from_peft_type(**copy.deepcopy(job.adapter)))
            self.task.states.clear()
        load_arrays(model, job.arrays)
        rows, collate = self.task.feed(model)
        self._held = Held(key, model, rows, collate)
        return self._held

    def _same_constants(self, job: Job, trained: Any) -> bool:
        assert self._held is not None
        own = arrays_of(self._held.model)[1]
        return all(torch.equal(own[name].cpu(), value) for name, value in job.arrays.items() if name not in trained)

    @torch.no_grad()
    def _mass(self, model: Any, holding: Sequence[int]) -> list[float] | None:
        """Mean gate weight of each expert over the client's instructions."""
        experts, _ = split_by_expert(model)
        if experts == 1:
            return None
        cache = self.task.states.of(model, self.task.train)
        if cache is None:
            pooled = instructions(model, [self.task.train[i] for i in holding])
        else:
            pooled = cache.gate_inputs(holding).to(model.device)
        gate = model.base_model.layer().gate(pooled, ADAPTER)
        found: list[float] = by_expert(gate, experts).double().mean(0).tolist()
        return found


def _outgoing(model: Any, job: Job, mass: Sequence[float] | None) -> tuple[dict[str, Tensor], list[int] | None]:
    """What goes back: trained arrays, of which only the experts in use where a threshold is set."""
    trained = {name: value.detach().cpu() for name, value in arrays_of(model)[0].items()}
    if job.local.half:
        trained = {name: (value.float() - job.arrays[name].float()).half() for name, value in trained.items()}
    if mass is None or job.local.share_above <= 0:
        return {name: value.clone() for name, value in trained.items()}, None
    experts, split = split_by_expert(model)
    used = [e for e in range(experts) if mass[e] > job.local.share_above]
    arrays = {
        name: value.reshape(experts, -1, *value.shape[1:])[used].flatten(0, 1) if name in split else value.clone()
        for name, value in trained.items()
    }
    return arrays, used
