"""Weights from rows of a gate and rules of experts added later: unchanged bits where no rule holds."""

from __future__ import annotations

import torch

from smartmops.experts import routes


def test_without_rules_each_row_is_its_own_expert_bit_for_bit() -> None:
    rows = torch.randn(5, 3).log_softmax(-1)
    assert torch.equal(routes.log_weights(rows, None, [0, 1, 2], 3), rows)


def test_the_last_rule_that_holds_decides_and_the_others_change_nothing() -> None:
    rows = torch.randn(4, 2).log_softmax(-1)
    holds = torch.tensor([[False, False], [True, False], [True, True], [False, True]])
    found = routes.log_weights(rows, holds, [0, 1, 2, 3], 4)
    assert torch.equal(found[0, :2], rows[0]) and not found[0, 2:].exp().any()
    assert found[1].exp().tolist() == [0, 0, 1, 0]
    assert found[2].exp().tolist() == found[3].exp().tolist() == [0, 0, 0, 1]


def test_rows_that_lead_to_one_expert_add_up_and_leave_the_rest() -> None:
    rows = torch.randn(6, 4).log_softmax(-1)
    found = routes.log_weights(rows, None, [0, 1, 0, 2], 3)
    torch.testing.assert_close(found[:, 0].exp(), rows[:, [0, 2]].exp().sum(-1))
    assert torch.equal(found[:, 1:], rows[:, [1, 3]])


def test_a_rule_holds_near_its_centre_and_never_with_a_limit_of_minus_infinity() -> None:
    features = torch.tensor([[0.1, 0.0], [5.0, 0.0]])
    rule = [torch.eye(2)[None], torch.zeros(1, 2), torch.zeros(1, 2)]
    near, never = torch.tensor([[0.0, 1.0, torch.inf, 0.0]]), torch.tensor([[0.0, 1.0, torch.inf, -torch.inf]])
    assert routes.held(features, *rule, near)[:, 0].tolist() == [True, False]
    assert not routes.held(features, *rule, never).any()
