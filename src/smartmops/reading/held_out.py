"""The validation part of the training split: who is in it. Knows examples and options; knows no tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from smartmops.options.training import TaskConfig, ValidationConfig
from smartmops.progress.bars import console
from smartmops.rows.conversations import conversations
from smartmops.rows.example import Example
from smartmops.rows.stored import take

ENOUGH = 5  # examples of a task, from which on one is held out


def left_to_train(train: Sequence[Example], config: TaskConfig) -> int:
    """How many examples of the training split are trained on: none of `hold_out`, none held out for validation."""
    if config.hold_out is not None:
        train = take(train, (i for i, example in enumerate(train) if example.category != config.hold_out))
    return len(train) - (len(_drawn(train, config, config.data_seed)) if isinstance(config, ValidationConfig) else 0)


def hold_out(
    train: Sequence[Example], config: ValidationConfig, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and validation examples, each in the order given; the latter by task, and one at least of each task.

    A task with fewer than five examples keeps them all; turns of one conversation stay together. Says so where that
    leaves none.
    """
    held = _drawn(train, config, seed)
    if not held:
        if train and config.validation_share:
            console.print(f"validation: none held out, no task has {ENOUGH} training examples; the last state is kept")
        return train, []
    without = set(held)
    return take(train, (i for i in range(len(train)) if i not in without)), take(train, sorted(held))


def _drawn(train: Sequence[Example], config: ValidationConfig, seed: int) -> list[int]:
    """Numbers of the examples that are held out."""
    if not train or not config.validation_share:
        return []
    share = min(config.validation_share, config.validation_limit / len(train))
    talks: list[list[int]] = []
    for category, own in conversations(train).items():
        if len(own) >= ENOUGH:
            talks += random.Random(f"{seed} validation {category}").sample(own, max(1, round(len(own) * share)))
    if sum(map(len, talks)) > config.validation_limit:
        talks = random.Random(f"{seed} validation").sample(talks, min(len(talks), config.validation_limit))
    ends = accumulate(map(len, talks))  # whole conversations, as many as there is room for
    return [i for talk, end in zip(talks, ends, strict=True) if end <= config.validation_limit for i in talk]
