"""Validation: how often the examples that are held out for it are asked, and what they say in the end.

Knows perplexities. Knows no loop and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smartmops.options.training import Schedule
from smartmops.preparing.gating import close
from smartmops.tuner import MoPsModel

from .kept import Kept, put_state

MOST = 10  # evaluations of a run, where `eval_every` says nothing
LEAST = 3
COST = 0.6  # evaluated examples for each trained one: with three passes a trained one, a fifth of training's time
SAVED = {
    "trained": "",
    "closed": " The saved adapter answers as the base does.",
    "untrained": " The saved adapter is in its state before training.",
}


def spacing(schedule: Schedule, count: int, world: int) -> int:
    """Optimiser steps between evaluations on `count` examples.

    Ten times a run, or less often where that would take more than about a fifth of the training's time.
    """
    if schedule.eval_every is not None or not count:
        return schedule.eval_every or max(1, schedule.steps)
    times = round(COST * schedule.steps * schedule.batch_size * world / count)
    return max(1, schedule.steps // min(MOST, max(LEAST, times)))


def settle(model: Any, kept: Kept, start: Mapping[str, Tensor], frozen: float, count: int) -> dict[str, Any]:
    """What validation says, as `metrics.json` holds it; where the frozen base is best, the model becomes it again.

    Args:
        model: Holding the best trained state.
        kept: What training returned.
        start: The adapter's state before training.
        frozen: Perplexity of the frozen base on the validation examples.
        count: Of these.
    """
    gained = kept.perplexity < frozen
    best = {"step": kept.step if gained else 0, "last_step": kept.last, "validation_perplexity": kept.perplexity,
            "frozen_validation_perplexity": frozen, "validation_examples": count,
            "adapter": "trained" if gained else _shut(model, start)}  # fmt: skip
    return {"best": best, "gained": gained}


def _shut(model: Any, start: Mapping[str, Tensor]) -> str:
    """Make the model answer as its base does; "untrained" where its method can only go back to where it began."""
    if isinstance(model.base_model, MoPsModel):
        close(model)
        return "closed"
    put_state(model, dict(start))
    begins_at_base = model.peft_config["default"].peft_type in ("LORA", "IA3")
    return "closed" if begins_at_base else "untrained"


def verdict(metrics: Mapping[str, Any], longer: str = "--steps") -> str | None:
    """What a table must not hide: that nothing was gained, by which numbers, and what to try; None where something was.

    Args:
        metrics: Of a run, as `metrics.json` holds them.
        longer: The option by which the command trains longer.
    """
    found, frozen = metrics["perplexity"]["overall"], metrics["perplexity_frozen"]["overall"]
    if metrics.get("gained", True) and found < frozen:
        return None
    what = metrics.get("measured_on", "the test split")
    best, said = metrics.get("best"), f"on {what} {found:.3f} against {frozen:.3f} frozen."
    if best:
        said = (f"on {best['validation_examples']} validation examples the frozen base has perplexity "
                f"{best['frozen_validation_perplexity']:.3f}, the best trained state "
                f"{best['validation_perplexity']:.3f}; {said}")  # fmt: skip
        said += SAVED[best["adapter"]]
    return (f"Nothing was gained: {said} Try more or cleaner data, another rate (--prompt-lr), fewer --experts, or "
            f"more {longer}.")  # fmt: skip
