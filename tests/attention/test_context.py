"""Which tokens of a pass see prompts: worked out once for all layers, and anew as soon as it may have changed."""

from __future__ import annotations

import torch

from smartmops.attention.context import ForwardContext

HERE = torch.device("cpu")


def test_it_is_worked_out_once_for_all_layers_and_anew_when_rows_are_left_to_the_base() -> None:
    context = ForwardContext(visible_from=torch.tensor([3, 2]))
    context.look(0, 5)
    visible, first = context.seeing(2, 5, HERE)
    assert first == 2 and visible.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert context.seeing(2, 5, HERE)[0] is visible
    context.leave_to_base(torch.tensor([False, True]))
    later, first = context.seeing(2, 5, HERE)
    assert first == 3 and later.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


def test_a_later_pass_of_another_length_sees_its_own_tokens() -> None:
    context = ForwardContext(base_rows=torch.tensor([True, False]))
    assert context.seeing(2, 3, HERE)[0].int().tolist() == [[0, 0, 0], [1, 1, 1]]
    assert context.seeing(2, 1, HERE)[0].int().tolist() == [[0], [1]]
    context.base_rows = torch.tensor([True, True])
    assert context.seeing(2, 1, HERE)[1] == 1  # nobody sees any
