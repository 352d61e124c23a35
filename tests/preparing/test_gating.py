"""The gate in closed form, its layer, and the null expert: right on what can be known, unsure where it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartmops.base import load_base
from smartmops.evaluation.measure import measured
from smartmops.evaluation.perplexity import evaluate
from smartmops.experts import null
from smartmops.flow.trainer import TrainConfig
from smartmops.preparing import gating
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task
from smartmops.states.answer_states import AnswerStates


def clouds(tasks: int = 3, each: int = 40, width: int = 20, apart: float = 4.0, seed: int = 0) -> Any:
    """Points around a centre for each task, and the task of each point."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, width, generator=generator) * apart
    of = torch.arange(tasks).repeat(each)
    return centres[of] + torch.randn(len(of), width, generator=generator), of


def standard(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / x.std(0)


def test_scores_tell_separate_tasks_apart_and_are_not_certain() -> None:
    x, of = clouds()
    scores = gating.ridge(standard(x), of, 3)
    gate = (standard(x) @ scores.weight.T + scores.constant).softmax(-1)
    assert scores.accuracy == 1 and bool((gate.argmax(-1) == of).all())
    assert float(gate.max()) < 1 - 1e-5, "120 instructions that were never wrong do not prove certainty"


def test_scores_of_noise_are_no_surer_than_the_shares_of_the_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    x, of = torch.randn(200, 20, generator=generator), torch.randint(4, (200,), generator=generator)
    scores = gating.ridge(x, of, 4)
    gate = (x @ scores.weight.T + scores.constant).softmax(-1)
    assert scores.accuracy < 0.4 and float(gate.max()) < 0.6


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 99))
def test_a_draw_takes_from_every_expert_alike(experts: int, count: int, seed: int) -> None:
    of = [i % experts for i in range(50)]
    drawn = gating.draw(of, count, seed)
    assert drawn == sorted(set(drawn)) and len(drawn) == min(count, 50)
    taken = [sum(of[i] == e for i in drawn) for e in range(experts)]
    rest = [of.count(e) - t for e, t in enumerate(taken)]
    assert all(t >= max(taken) - 1 or r == 0 for t, r in zip(taken, rest, strict=True))


def test_the_lowest_layer_of_those_that_tell_tasks_apart_is_read() -> None:
    x, of = clouds(each=30)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    layers = torch.stack([noise, noise, noise, x, x, x, noise, noise])
    assert gating.best_layer(layers, of.tolist(), 3, 7) == 3


def null_weight(points: torch.Tensor, fitted: null.Fitted) -> torch.Tensor:
    return null.weight(points, fitted.basis, fitted.centres, fitted.direction, fitted.cut, 0.5)


def test_text_between_broad_tasks_is_left_to_the_base_where_it_lies_to_one_side() -> None:
    # As far from every centre as the tasks' own instructions are, so distance alone sees nothing.
    draw = torch.Generator().manual_seed(0)
    tasks, other = (torch.randn(n, 20, generator=draw) for n in (400, 160))
    other[:, 0] += 4
    fitted = null.fit(tasks, [i % 4 for i in range(400)], other, rank=10, centres=4)
    new, new_other = (torch.randn(200, 20, generator=draw) for _ in range(2))
    new_other[:, 0] += 4
    assert float((null_weight(new, fitted) == 1).float().mean()) <= 0.06
    assert float((null_weight(new_other, fitted) == 1).float().mean()) >= 0.85
    far = null.weight(new_other, fitted.basis, fitted.centres, torch.zeros(20), fitted.cut, 0.5)
    assert float((far == 1).float().mean()) < float((null_weight(new_other, fitted) == 1).float().mean())


def test_what_lies_far_from_every_task_is_left_to_the_base_and_what_lies_near_is_not() -> None:
    x, of = clouds(each=80)
    other = torch.randn(60, 20, generator=torch.Generator().manual_seed(2)) * 6
    mean, std = x.mean(0), x.std(0)
    fitted = null.fit((x - mean) / std, of.tolist(), (other - mean) / std, rank=10, centres=5)
    new, _ = clouds(each=50, seed=0)
    new = new + 0.1 * torch.randn(new.shape, generator=torch.Generator().manual_seed(3))
    for points, low, high in ((new, 0.0, 0.05), (torch.randn(50, 20) * 6, 0.9, 1.0)):
        lost = null_weight((points - mean) / std, fitted)
        assert low <= float((lost == 1).float().mean()) <= high
    assert fitted.kept > 0.9 and fitted.caught > 0.9


def test_the_texts_that_come_with_the_package_are_many_and_different() -> None:
    texts = gating.unrelated_texts()
    assert len(set(texts)) == len(texts) >= 150


def test_a_file_of_too_few_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("One.\n\nTwo.")
    with pytest.raises(ValueError, match="holds 2 texts: give 20 or more"):
        gating.unrelated_texts(tmp_path / "few.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        gating.unrelated_texts(tmp_path / "none.txt")


@pytest.fixture
def prepared(config: Callable[..., TrainConfig]) -> tuple[Task, Any]:
    settings = config(expert_kind="keys_values", prompt_lr=None, gate_lr=None, shared_prompts=2)
    task = Task.load(settings)
    return task, adapt(task, settings, settings, 0)[0]


def test_the_gate_is_exactly_the_scores(prepared: tuple[Task, Any]) -> None:
    _, model = prepared
    layer = model.base_model.layer()
    inputs = layer.configs["default"].base_hidden_size
    scores = gating.Scores(torch.randn(2, inputs), torch.randn(2), 0.0, 1.0)
    gating.start_gate(model, scores)
    pooled = torch.randn(5, inputs)
    standardised = layer.standardised(pooled, "default")
    want = (standardised @ scores.weight.T + scores.constant).log_softmax(-1)
    assert torch.allclose(layer.log_gate(pooled, "default"), want, atol=1e-5)


def test_experts_start_from_the_keys_and_values_of_consecutive_tokens(prepared: tuple[Task, Any]) -> None:
    task, model = prepared
    layer = model.base_model.layer()
    keys = layer.mops_keys["default"] * layer.mops_key_size["default"][None, :, None, None]
    values = layer.mops_values["default"] * layer.mops_value_size["default"][None, :, None, None]
    own = [row for row in task.train if row.category == "a"]
    seen = False
    for row in own:
        with torch.no_grad():
            cache = task.base.base_model(torch.tensor([row.input_ids]), use_cache=True).past_key_values
        first = torch.stack([cache.layers[i].values[0].transpose(0, 1) for i in range(layer.index, 4)], 1)
        for start in range(len(first) - 2):
            seen = seen or bool(torch.allclose(first[start : start + 3], values[:3], atol=1e-4))
    assert seen, "the values of expert a are those of three tokens in a row of an instruction of a"
    sizes = torch.cat([keys, layer.mops_shared_keys["default"]]).abs().mean()
    assert float(layer.mops_keys["default"].pow(2).mean()) == pytest.approx(1, rel=0.5) and sizes > 0


def test_a_closed_adapter_is_the_base(prepared: tuple[Task, Any]) -> None:
    task, model = prepared
    with model.disable_adapter():
        frozen = evaluate(model, task.test, task.collator)
    opened = measured(task, model)
    gating.close(model)
    assert measured(task, model).overall == pytest.approx(frozen.overall, rel=1e-6)
    assert opened.overall != pytest.approx(frozen.overall, rel=1e-4)


def test_a_single_expert_leaves_unlike_texts_to_the_base_as_several_do(config: Callable[..., TrainConfig]) -> None:
    settings = config(expert_kind="keys_values", prompt_lr=None, gate_lr=None, experts=1)
    task = Task.load(settings)
    model, names, accuracy = adapt(task, settings, settings, 0)
    cut = model.base_model.layer().mops_null_cut["default"]
    assert names == ["all"] and accuracy is None and cut.isfinite().all(), "its null expert has been fitted"


def test_states_of_answers_are_made_when_asked_for_and_kept_while_there_is_room(prepared: tuple[Task, Any]) -> None:
    task, model = prepared
    cache = task.states.of(model, task.train)
    assert cache is not None
    with torch.no_grad():
        first = model(**cache([0, 3, 1])).loss
        assert len(cache._found) == 3  # type: ignore[union-attr]
        again = model(**cache([0, 3, 1])).loss
        cache.room, cache._found, cache.kept = 0, {}, 0  # type: ignore[union-attr]
        without = model(**cache([0, 3, 1])).loss
        assert not cache._found  # type: ignore[union-attr]
    assert torch.equal(first, again) and torch.equal(first, without)
    with pytest.raises(IndexError, match="choose 0 to"):
        cache.batch([len(cache)])


def test_a_step_moves_keys_and_values_by_their_relative_rate(config: Callable[..., TrainConfig]) -> None:
    """The norm of an update relative to its parameter does not depend on the size of the base's own states."""
    from smartmops.methods.baselines import parameter_groups

    moved = {}
    for factor in (1.0, 30.0):
        settings = config(expert_kind="keys_values", prompt_lr=None, gate_lr=None)
        base, tokenizer = load_base(settings.model, "float32")
        with torch.no_grad():  # a base with larger keys and values
            for name, parameter in base.named_parameters():
                if "k_proj" in name or "v_proj" in name:
                    parameter.mul_(factor)
        task = Task.load(settings, base, tokenizer)
        model = adapt(task, settings, settings, 0)[0]
        layer = model.base_model.layer()
        before = layer.mops_values["default"] * layer.mops_value_size["default"][None, :, None, None]
        before = before.detach().clone()
        rows, collate = task.feed(model)
        optimiser = torch.optim.AdamW(parameter_groups(model, settings), weight_decay=0.0)
        model(**collate([rows[i] for i in range(4)])).loss.backward()
        optimiser.step()
        after = layer.mops_values["default"] * layer.mops_value_size["default"][None, :, None, None]
        moved[factor] = float((after - before).norm() / before.norm())
    assert moved[1.0] == pytest.approx(settings.relative_lr, rel=0.2)
    assert moved[30.0] == pytest.approx(moved[1.0], rel=0.2)


def test_a_step_moves_every_part_of_the_gate_by_the_same_share_of_itself(
    prepared: tuple[Task, Any], config: Callable[..., TrainConfig]
) -> None:
    """Weights of a closed-form start are tiny: a rate with a floor of its own would undo it in a few steps."""
    from smartmops.methods.baselines import parameter_groups

    _, model = prepared
    layer = model.base_model.layer()
    gate = {name: getattr(layer, name)["default"] for name in ("mops_gate_in", "mops_gate_out")}
    gate["mops_gate_in"].data.mul_(1e-3)  # a larger base has more inputs, whose weights are as small
    before = {name: parameter.detach().clone() for name, parameter in gate.items()}
    settings = config(expert_kind="keys_values", prompt_lr=None, gate_lr=None)
    optimiser = torch.optim.AdamW(parameter_groups(model, settings), weight_decay=0.0)
    torch.manual_seed(0)
    for parameter in gate.values():
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    for name, parameter in gate.items():
        moved = (parameter.detach() - before[name]).pow(2).mean().sqrt() / before[name].pow(2).mean().sqrt()
        assert float(moved) == pytest.approx(settings.relative_gate_lr, rel=0.01)


def test_methods_and_gates_on_one_base_share_states_and_each_reads_its_own_layer(
    config: Callable[..., TrainConfig],
) -> None:
    settings = config(expert_kind="keys_values", prompt_lr=None, gate_lr=None)
    task = Task.load(settings)
    wanted, caches = {}, []
    changes = ({"method": "prompt-tuning"}, {"gate_layer": 3}, {"gate_layer": 2}, {"method": "prompt-tuning"})
    for change in changes:
        method = dataclasses.replace(settings, **change)
        model = adapt(task, method, method, 0)[0]
        cache = task.states.of(model, task.train)
        assert isinstance(cache, AnswerStates)
        caches.append(cache)
        with torch.no_grad():
            found = model(**cache([0, 5, 2])).loss
            fresh = model(**AnswerStates(model, task.train)([0, 5, 2])).loss
        assert torch.allclose(found, fresh, rtol=1e-6)
        wanted[str(change)] = float(found)
        task.base = model.base_model.unload().requires_grad_(False).eval()
    assert all(cache is caches[0] for cache in caches) and len(set(wanted.values())) == 3


def test_states_kept_on_the_gpu_and_in_memory_are_the_same(
    prepared: tuple[Task, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU has room, nothing is counted as taken of main memory; where it has not, all is."""
    from smartmops.states import answer_states

    task, model = prepared
    rows = [4, 1, 3]
    inside = AnswerStates(model, task.train)
    wanted = inside.batch(rows)
    assert inside.kept > 0
    asked: list[int] = []
    monkeypatch.setattr(answer_states, "_has_room", lambda device, size: not asked.append(size) and len(asked) < every)
    beside = AnswerStates(model, task.train)
    every = len({number for row in rows if (number := beside.shared.of[row]) is not None}) + len(rows)
    assert every > len(rows), "what rows begin with is kept too"
    for _ in range(2):  # computed, then kept
        found = beside.batch(rows)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(asked) == every and beside.kept == asked[-1], "the last had to go to main memory"
    assert not AnswerStates(model, task.train, 0).batch(rows).keys() ^ wanted.keys() and len(asked) == every
