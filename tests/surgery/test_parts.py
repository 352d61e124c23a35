"""Adapters taken apart: what is dropped, merged and moved, against the same worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import smartmops as sm
from smartmops.surgery.adapter import claims, parts


@pytest.fixture(scope="module")
def loaded(run: Path) -> sm.LoadedRun:
    return sm.load_run(run)


@pytest.fixture
def held(loaded: sm.LoadedRun) -> parts.Parts:
    return parts.taken(loaded.model)


@pytest.fixture
def gate(loaded: sm.LoadedRun, held: parts.Parts) -> Any:
    """Log weights of given inputs under an adapter; the run's own is put back afterwards."""
    pooled = held.tensors["mops_gate_mean"] + torch.randn(9, 32) * held.tensors["mops_gate_scale"]

    def ask(adapter: parts.Parts) -> torch.Tensor:
        parts.put(loaded.model, adapter)
        with torch.no_grad():
            return loaded.model.base_model.layer().log_gate(pooled, "default").detach()

    yield ask
    parts.put(loaded.model, held)


def test_what_is_put_is_what_was_taken(loaded: sm.LoadedRun, held: parts.Parts) -> None:
    parts.put(loaded.model, held)
    again = parts.taken(loaded.model)
    assert again.config == held.config and again.tensors.keys() == held.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in held.tensors.items())
    assert not any(each.requires_grad for each in loaded.model.parameters())


def test_a_dropped_expert_leaves_the_softmax_over_the_others(
    gate: Callable[..., torch.Tensor], held: parts.Parts
) -> None:
    less = parts.without(held, "banana")
    torch.testing.assert_close(gate(less), gate(held)[:, [0, 2]].log_softmax(-1))
    assert less.names == ["apple", "cherry"] and less.scale == [3.0, 3.0] and less.config.routes is None
    count = held.config.prompts_per_expert
    kept = torch.cat([held.tensors["mops_keys"][:count], held.tensors["mops_keys"][2 * count :]])
    assert torch.equal(less.tensors["mops_keys"], kept)
    with pytest.raises(ValueError, match="'apple' is the last expert of the gate"):
        parts.without(parts.without(less, "cherry"), "apple")
    with pytest.raises(ValueError, match="'fig' is no expert of this run: choose one of apple, banana, cherry"):
        parts.without(held, "fig")


def test_a_merged_expert_has_the_weights_of_both_and_the_others_theirs(
    gate: Callable[..., torch.Tensor], held: parts.Parts
) -> None:
    one = parts.merged(held, "cherry", "apple", "fruit", held.columns(0))
    before, after = gate(held).exp(), gate(one).exp()
    torch.testing.assert_close(after[:, 0], before[:, 0] + before[:, 2])
    assert torch.equal(after[:, 1], before[:, 1]) and one.names == ["fruit", "banana"]
    less = parts.without(one, "banana")
    torch.testing.assert_close(gate(less).exp(), torch.ones(9, 1))


def test_added_and_dropped_is_as_before(held: parts.Parts) -> None:
    more = parts.grown(held, "date", held.columns(1), 4.0, claims.never(32))
    back = parts.without(more, "date")
    assert back.config == replace(held.config, expert_names=held.names)
    assert all(torch.equal(back.tensors[name], value) for name, value in held.tensors.items())
    assert back.tensors.keys() == held.tensors.keys()
    with pytest.raises(ValueError, match="'apple' is an expert of this run already"):
        parts.grown(held, "apple", held.columns(1), 4.0, claims.never(32))


def test_an_adapter_that_left_all_to_the_base_does_so_when_one_is_added(
    gate: Callable[..., torch.Tensor], loaded: sm.LoadedRun, held: parts.Parts
) -> None:
    shut = replace(held, config=replace(held.config, null_threshold=0.0))
    gate(parts.grown(shut, "date", held.columns(1), 4.0, claims.never(32)))
    lost = loaded.model.base_model.layer().null_weight(torch.randn(5, 32), "default")
    assert lost.tolist() == [1.0] * 5


def test_frozen_columns_get_no_gradient(loaded: sm.LoadedRun, held: parts.Parts) -> None:
    parts.put(loaded.model, parts.frozen(held, ["banana"]), parts.COLUMNS)
    layer = loaded.model.base_model.layer()
    layer._trained("mops_keys", "default").sum().backward()
    gradient = layer.mops_keys["default"].grad.flatten(1).abs().sum(-1)
    assert (gradient > 0).tolist() == [True] * 3 + [False] * 3 + [True] * 3
    parts.put(loaded.model, held)


def test_a_rule_takes_its_own_and_spares_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    own, others, unrelated = (torch.randn(60, 16, generator=generator) * 0.3 + at for at in (1.0, -1.0, 4.0))
    fitted = claims.fit(own, others, unrelated)
    assert fitted.sent > 0.9 and fitted.taken == 0
    alike = torch.randn(60, 16, generator=generator) * 0.3 + 1.0
    overlapping = claims.fit(own, alike, unrelated)
    assert overlapping.taken <= 0.05 and overlapping.sent < 0.5
    with pytest.raises(ValueError, match="3 instructions of the new expert: give 8 or more"):
        claims.fit(own[:3], others, unrelated)


def test_a_threshold_loses_no_more_than_it_may() -> None:
    own, other = torch.linspace(0.1, 0.9, 36), torch.linspace(0.2, 0.8, 50)
    for lose, least in ((0.001, 36), (0.02, 36), (1 / 36, 35), (0.5, 18)):
        assert int((own < claims.threshold(own, other, lose)).sum()) >= least


def test_a_threshold_lies_between_the_two_kinds_of_text_or_loses_few() -> None:
    own, other = torch.linspace(0.01, 0.1, 50), torch.linspace(0.5, 0.9, 50)
    assert 0.1 < claims.threshold(own, other, 0.02) < 0.5
    mixed = claims.threshold(other, own, 0.02)
    assert float((other >= mixed).float().mean()) <= 0.04
