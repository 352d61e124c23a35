"""Several processes that train one model (`torchrun`, `accelerate launch`): who writes, who speaks, what they agree on.

Knows processes. Knows no loop and no files. In one process, each of these does what it says at once.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

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


def part(rows: Sequence[T]) -> Sequence[T]:
    """The rows that are this process's own."""
    return rows if world() == 1 else rows[rank() :: world()]


def all_of(own: T) -> list[T]:
    """What every process has."""
    found = [own] * world()
    if world() > 1:
        dist.all_gather_object(found, own)
    return found
