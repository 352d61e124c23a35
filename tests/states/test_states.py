"""States of the frozen half: shared by all that they are the same for, and by nothing else; kept where there is room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import WIDTH, adapted, base, made_up, over

from smartmops.states import states as room
from smartmops.states.activations import ActivationCache
from smartmops.states.answer_states import AnswerStates
from smartmops.states.states import States
from smartmops.tokens.batches import Encoded

ANSWERS: dict[str, Any] = {"experts": "keys_values", "visible_to": "answers"}


def other_recovery(model: Any) -> Any:
    model.base_model.layer().mops_recovery["default"].data += 1
    return model


CHANGED: dict[str, Callable[[Any, list[Encoded]], tuple[Any, list[Encoded]]]] = {
    "a token": lambda model, rows: (model, [replace(rows[0], input_ids=[3, *rows[0].input_ids[1:]]), *rows[1:]]),
    "a label": lambda model, rows: (model, [replace(rows[0], labels=[-100, *rows[0].labels[1:-1], 3]), *rows[1:]]),
    "masks": lambda model, rows: (model, [replace(row, gate_mask=[1] * len(row.input_ids)) for row in rows]),
    "the order": lambda model, rows: (model, rows[::-1]),
    "the content of recovery prompts": lambda model, rows: (other_recovery(model), rows),
    "the base": lambda model, rows: (adapted(num_recovery_prompts=2), rows),
}


@pytest.mark.parametrize("what", CHANGED)
def test_whatever_states_depend_on_makes_others(what: str) -> None:
    states, rows, model = States("memory"), made_up(), adapted(num_recovery_prompts=2)
    first = states.of(model, rows)
    assert states.of(*CHANGED[what](model, rows)) is not first


@pytest.mark.parametrize("options", [{}, ANSWERS])
def test_rows_of_the_same_content_share_states_whoever_holds_them(options: dict[str, Any]) -> None:
    states, rows, model = States("memory"), made_up(), adapted(**options)
    first = states.of(model, rows)
    assert isinstance(first, AnswerStates if options else ActivationCache)
    assert states.of(model, list(rows)) is first
    states.clear()
    assert states.of(model, rows) is not first


def test_adapters_of_any_prompts_and_gate_share_states_of_one_base() -> None:
    states, rows, frozen = States("memory"), made_up(), base()
    found = []
    for options in ({"num_experts": 2}, {"num_experts": 1, "prompts_per_expert": 5}):
        model = over(frozen, **options)
        found.append(states.of(model, rows))
        model.base_model.unload()
    assert found[0] is found[1]


def test_an_adapter_whose_gate_reads_another_layer_reads_its_own() -> None:
    states, rows, frozen = States("memory"), made_up(), base()
    found = []
    for layer in (1, 3):
        model = over(frozen, gate_layer=layer, **ANSWERS)
        found.append((states.of(model, rows), states.read(model, rows)))
        model.base_model.unload()
    assert found[0][0] is found[1][0], "states of answers know any layer"
    assert not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("options", "read"), [({}, False), ({"gate_granularity": "prompt"}, True), ({"null_expert": True}, True)]
)
def test_a_single_expert_has_its_gate_read_where_anything_hangs_on_it(options: dict[str, Any], read: bool) -> None:
    model, rows = over(base(), num_experts=1, **ANSWERS, **options), made_up()
    kept = States("memory").of(model, rows)
    assert kept is not None
    want = room.instructions(model, rows) if read else torch.zeros(len(rows), WIDTH)
    assert torch.allclose(kept.gate_inputs([0, 3, 1]), want[[0, 3, 1]], atol=1e-6)


def test_states_are_kept_where_they_are_wanted_and_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = made_up(), adapted()
    assert States("off").of(model, rows) is None
    on_disk = States(str(tmp_path)).of(model, rows)
    assert isinstance(on_disk, ActivationCache) and on_disk.home is not None and on_disk.home.parent == tmp_path
    size = ActivationCache.size(model, rows)
    for free, kept in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(room, "free_memory", lambda free=free: free)
        assert (States("auto").of(model, rows) is not None) == kept


def test_what_the_gate_reads_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    states, rows, model, real, calls = States("memory"), made_up(), adapted(), room.instructions, []
    monkeypatch.setattr(room, "instructions", lambda *given: (calls.append(1), real(*given))[1])
    assert torch.equal(states.read(model, rows), states.read(model, list(rows))) and len(calls) == 1
    assert torch.allclose(states.pooled(model, rows), real(model, rows), atol=1e-6)
