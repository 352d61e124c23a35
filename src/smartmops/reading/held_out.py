"""The validation part of the training split: who is in it. Knows examples and options; knows no tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from smartmops.options.training import ValidationConfig
from smartmops.progress.bars import console
from smartmops.rows.conversations import conversations
from smartmops.rows.example import Example
from smartmops.rows.stored import take

ENOUGH = 5  # examples of a task, from which on one is held out


def hold_out(
    train: Sequence[Example], config: ValidationConfig, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and validation examples, each in the order given; the latter by task, and one at least of each task.

    A task with fewer than five examples keeps them all; turns of one conversation stay together. Says so where that
    leaves none.
    """
    if not train or not config.validation_share:
        return train, []
    share = min(config.validation_share, config.validation_limit / len(train))
    talks: list[list[int]] = []
    for category, own in conversations(train).items():
        if len(own) >= ENOUGH:
            talks += random.Random(f"{seed} validation {category}").sample(own, max(1, round(len(own) * share)))
    if sum(map(len, talks)) > config.validation_limit:
        talks = random.Random(f"{seed} validation").sample(talks, min(len(talks), config.validation_limit))
    ends = accumulate(map(len, talks))  # whole conversations, as many as there is room for
    held = [i for talk, end in zip(talks, ends, strict=True) if end <= config.validation_limit for i in talk]
    if not held:
        console.print(f"validation: none held out, no task has {ENOUGH} training examples; the last state is kept")
        return train, []
    without = set(held)
    return take(train, (i for i in range(len(train)) if i not in without)), take(train, sorted(held))
