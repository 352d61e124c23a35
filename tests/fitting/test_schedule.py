"""Rates over a run, and clipping that does not care how large the loss is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartmops.fitting.kept import WINDOW, Kept, state_of
from smartmops.fitting.loop import Schedule, fit
from smartmops.flow.trainer import TrainConfig, train
from smartmops.options.training import EMBEDDED_SETTING
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.runs.folder import Run

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps": 1000}, 60),
        ({"steps": 40}, 2),
        ({"steps": 3}, 0),
        ({"steps": 100, "warmup": 0.25}, 25),
        ({"steps": 1000, "warmup_steps": 50}, 50),
        ({"steps": 40, "warmup_steps": 50}, 8),
        ({"steps": 40, "warmup_steps": 0}, 0),
    ],
)
def test_warm_up_is_a_share_of_the_steps_unless_they_are_counted(options: dict[str, Any], steps: int) -> None:
    assert Schedule(**options).warm == steps


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
        ({"lr_schedule": "linear"}, [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_schedule": "constant", "warmup": 0.4}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup": 0.4}, [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_rate_of_each_step(config: Make, options: dict[str, Any], wanted: list[float]) -> None:
    chosen = config(steps=6, prompt_lr=0.01, save_every=100, **options)
    train(chosen)
    rates = [row["learning_rate"] for row in Run.open(chosen.out).read_curves()]
    assert rates == pytest.approx([0.01 * each for each in wanted], rel=1e-4)


def gradients(norms: list[float], scale: float = 1.0) -> tuple[list[float], Kept]:
    """Norms after clipping at twice the median."""
    kept, parameter, found = Kept(), torch.nn.Parameter(torch.zeros(4)), []
    for norm in norms:
        parameter.grad = torch.full((4,), scale * norm / 2)
        kept.clip([parameter], 2.0)
        found.append(float(parameter.grad.norm()))
    return found, kept


def test_a_gradient_is_cut_to_a_multiple_of_the_median_norm_of_earlier_ones() -> None:
    found, kept = gradients([1.0, 1.5, 100.0, 1.0, 3.0])
    assert found == pytest.approx([1.0, 1.5, 2.5, 1.0, 2.5]), "medians 1, 1.25, 1.5 and 1.25"
    assert kept.norms == pytest.approx([1.0, 1.5, 100.0, 1.0, 3.0]), "what is remembered was not clipped"
    assert len(gradients([1.0] * (WINDOW + 7))[1].norms) == WINDOW


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf")])
def test_a_norm_that_says_nothing_is_not_remembered(odd: float) -> None:
    found, kept = gradients([1.0, odd, 9.0])
    assert found[2] == pytest.approx(2.0) and kept.norms == pytest.approx([1.0, 9.0])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(-20, 20))
def test_clipping_is_the_same_at_every_scale(norms: list[float], power: int) -> None:
    one, other = gradients(norms)[0], gradients(norms, 2.0**power)[0]
    assert other == pytest.approx([each * 2.0**power for each in one], rel=1e-6)


def changes(task: Task, config: TrainConfig, factor: float, folder: Path) -> dict[str, torch.Tensor]:
    """What training does to each trained parameter where the loss is `factor` times itself."""
    model, _, _ = adapt(task, config, config, 0)
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.loss = out.loss * factor
        return out

    model.forward = scaled
    before = state_of(model)
    fit(model, config, config, *task.feed(model), folder)
    after = state_of(model)
    task.base = model.base_model.unload().requires_grad_(False).eval()
    return {name: after[name] - value for name, value in before.items()}


@pytest.mark.parametrize("method", ["mops", "lora"])
def test_a_loss_a_thousand_times_as_large_trains_the_same(config: Make, tmp_path: Path, method: str) -> None:
    chosen = config(method=method, steps=12, save_every=100, prompt_lr=0.01)
    task = Task.load(chosen)
    # Adam's epsilon (1e-8) is small against the gradients of either, those of the gate included.
    one, other = (changes(task, chosen, factor, tmp_path / str(factor)) for factor in (2.0**30, 2.0**40))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-2 * float(value.abs().max()))
    plain = config(method=method, steps=12, save_every=100, prompt_lr=0.01, **EMBEDDED_SETTING)
    assert sum(float(value.abs().sum()) for value in changes(task, plain, 1.0, tmp_path / "plain").values()) > 0


def test_what_is_kept_survives_its_file(tmp_path: Path) -> None:
    kept = Kept(7, 1.1, 2, [0.1, 1 / 3], [2.5], {"a.b": torch.randn(2, 3)})
    kept.save(tmp_path)
    again = Kept.load(tmp_path)
    assert torch.equal(again.best["a.b"], kept.best["a.b"])
    assert (again.step, again.perplexity, again.waited, again.norms) == (7, 1.1, 2, [0.1, 1 / 3])
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    Kept().save(fresh)
    assert Kept.load(fresh) == Kept() == Kept.load(tmp_path / "none")
