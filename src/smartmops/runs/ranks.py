"""Several processes that train one model (`torchrun`, `accelerate launch`): who writes, who speaks, what they agree on.

Knows processes. Knows no loop and no files. In one process, each of these does what it says at once.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from smartmops.checks.errors import ConfigError

PATIENCE = timedelta(hours=2)  # the others wait while one fills a cache or writes sample answers

SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # what accelerate launch sets

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

    Raises:
        ConfigError: the launcher says that the base is to be sharded.
    """
    for name, kind in SHARDING.items():
        # In one process nothing is sharded, and a `TrainingArguments` made before may have left these set.
        if launched() > 1 and os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ConfigError(f"{name}={os.environ[name]}: {kind} is to shard the base, but this command measures and "
                              "prepares with all of it in every process: launch it with torchrun or accelerate launch "
                              "--multi_gpu, or shard it under your own Trainer (docs/scale.md)")  # fmt: skip
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


@contextmanager
def turn() -> Iterator[bool]:
    """Whether this process is the first; the others wait at the end of the block, and raise what it raised there."""
    error: Exception | None = None
    try:
        yield rank() == 0
    except Exception as raised:
        error = raised
    if (error := shared(error)) is not None:
        raise error


def shared(value: T) -> T:
    """What the first process has, in all of them."""
    sent = [value]
    if world() > 1:
        dist.broadcast_object_list(sent, src=0)
    return sent[0]


def first_does(act: Callable[..., T], *given: Any) -> T:
    """What `act` returns, or raises, in the first process; the others wait for it and return or raise the same."""
    found: Any = None
    with turn() as mine:
        if mine:
            found = act(*given)
    returned: T = shared(found)
    return returned


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
