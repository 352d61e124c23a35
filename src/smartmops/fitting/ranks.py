"""Several processes that train one model (`torchrun`, `accelerate launch`): who writes, who speaks, what they agree on.

Knows processes. Knows no loop and no files. In one process, each of these does what it says at once.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from smartmops.evaluation.perplexity import Evaluation, evaluate
from smartmops.tokens.batches import Collator, Encoded

PATIENCE = timedelta(hours=2)  # the others wait while one fills a cache or writes sample answers

T = TypeVar("T")


def launched() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """Processes that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether several processes are to talk over gloo: HF's `TrainingArguments` does not find that out by itself."""
    return launched() > 1 and not torch.cuda.is_available()


def join() -> None:
    """Meet the other processes, if there are any. From here on only the first one speaks; errors all do.

    A process that made the group itself leaves it as it ends, by an error too: one that just goes can abort others.
    """
    if launched() > 1 and not dist.is_initialized():
        PartialState(cpu=on_cpu(), timeout=PATIENCE)
        atexit.register(leave)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def leave() -> None:
    """Close the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Processes that have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_does(act: Callable[[], T]) -> T:
    """What `act` returns, or raises, in the first process; the others wait for it and return or raise the same."""
    if world() == 1:
        return act()
    sent: list[Any] = [None, None]
    if rank() == 0:
        try:
            sent[0] = act()
        except Exception as error:
            sent[1] = error
    dist.broadcast_object_list(sent, src=0)
    if sent[1] is not None:
        raise sent[1]
    found: T = sent[0]
    return found


def only_first(act: Callable[[Any], None]) -> Callable[[Any], None]:
    """`act` in the first process; nothing, and no waiting, in the others."""
    return act if rank() == 0 else lambda value: None


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over all processes; not a number as soon as one of them has none."""
    if world() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world()


def share(count: int, device: torch.device) -> float:
    """What a mean over `count` own tokens counts for, so that the mean over processes is the mean over all tokens."""
    if world() == 1:
        return 1.0
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return count * world() / max(int(total), 1)


def part(rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """The rows that this process evaluates."""
    return rows if world() == 1 else rows[rank() :: world()]


def together(own: Evaluation | None) -> Evaluation:
    """The evaluation of all rows, of each process's evaluation of its part; None: it has none."""
    found: list[Evaluation | None] = [own]
    if world() > 1:
        found = [None] * world()
        dist.all_gather_object(found, own)
    parts = [each for each in found if each is not None]
    return parts[0] if len(parts) == 1 else merged(parts)


def evaluate_together(
    model: Any, rows: Sequence[Encoded], collator: Collator, progress: bool = False
) -> Evaluation:  # fmt: skip
    """`evaluate`, each process on its part of the rows; all return the whole."""
    own = part(rows)
    return together(evaluate(model, own, collator, progress=progress) if own or not rows else None)


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several on disjoint examples."""
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for part in parts:
        for task, count in part.tokens.items():
            nats[task] += math.log(part.per_task[task]) * count
            tokens[task] += count
    return Evaluation.of(nats, tokens)
