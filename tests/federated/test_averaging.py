"""What averaging must not do: depend on order, leave the clients' range, move an expert that nobody used."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smartmops.checks.limits import check
from smartmops.clients.messages import Reply, pack
from smartmops.federated import aggregation
from smartmops.federated.aggregation import BETAS, TAU, Aggregator, Layout, Update, admit, drift
from smartmops.options.federation import AggregationConfig

KINDS = ("fedavg", "uniform", "trimmed-mean", "median", "expert-weighted")
LAYOUT = Layout(2, frozenset({"prompts"}))
SENT = {"prompts": torch.arange(12.0).view(4, 3) / 7, "gate": torch.ones(2, 3)}
ASKED = dict.fromkeys(range(9), 1)


def reply(client: int, seed: int, examples: int = 3, mass: Any = (0.5, 0.5), **changes: Any) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    arrays = {name: value + torch.randn(value.shape, generator=generator) for name, value in SENT.items()}
    return replace(Reply(1, client, examples, 1.5, 0.1, list(mass), None, False, arrays), **changes)


def admitted(replies: list[Reply], config: AggregationConfig | None = None) -> list[Update]:
    good, failures = admit(
        [(each.client, pack(each)) for each in replies], SENT, ASKED, LAYOUT, config or AggregationConfig()
    )
    assert not failures
    return good


def averaged(kind: Any, replies: list[Reply], **options: Any) -> dict[str, Tensor]:
    config = AggregationConfig(aggregation=kind, **options)
    return Aggregator(config, LAYOUT).step(SENT, admitted(replies, config))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


clients = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50), st.floats(0.01, 0.99)), min_size=1, max_size=6)


def made(found: list[tuple[int, int, float]]) -> list[Reply]:
    return [reply(c, seed, n, (m, 1 - m)) for c, (seed, n, m) in enumerate(found)]


@given(clients, st.sampled_from(KINDS), st.randoms())
def test_the_order_of_arrival_changes_no_bit(found: list[tuple[int, int, float]], kind: str, draw: Any) -> None:
    replies = made(found)
    shuffled = draw.sample(replies, len(replies))
    assert same(averaged(kind, replies), averaged(kind, shuffled))


@given(clients, st.sampled_from(KINDS))
def test_an_average_stays_between_its_clients(found: list[tuple[int, int, float]], kind: str) -> None:
    replies = made(found)
    for name, value in averaged(kind, replies).items():
        stacked = torch.stack([each.arrays[name] for each in replies])
        assert (value >= stacked.amin(0) - 1e-6).all() and (value <= stacked.amax(0) + 1e-6).all()


@given(st.integers(0, 99), st.sampled_from(KINDS))
def test_one_client_alone_gives_exactly_its_own_arrays(seed: int, kind: str) -> None:
    only = reply(0, seed)
    assert same(averaged(kind, [only]), only.arrays)


@given(clients)
def test_fedavg_weighs_by_examples(found: list[tuple[int, int, float]]) -> None:
    replies = made(found)
    total = sum(each.examples for each in replies)
    for name, value in averaged("fedavg", replies).items():
        expected = sum(each.arrays[name].double() * each.examples for each in replies) / total
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@given(clients)
def test_equal_examples_make_fedavg_uniform_and_no_trim_makes_a_mean(found: list[tuple[int, int, float]]) -> None:
    replies = [replace(each, examples=4) for each in made(found)]
    uniform = averaged("uniform", replies)
    for other in (averaged("fedavg", replies), averaged("trimmed-mean", replies, trim=0.0)):
        for name in uniform:
            torch.testing.assert_close(other[name], uniform[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_one_client_among_few_is_trimmed_whatever_it_sends(count: int) -> None:
    replies = [reply(c, c) for c in range(count)]
    wild = replace(replies[0], arrays={name: value + 1e3 for name, value in replies[0].arrays.items()})
    found = averaged("trimmed-mean", [wild, *replies[1:]], norm_limit=1e9)
    for name, value in found.items():
        honest = torch.stack([each.arrays[name] for each in replies[1:]])
        assert (value <= honest.amax(0) + 1e-6).all() and (value >= honest.amin(0) - 1e-6).all()


@given(clients)
def test_equal_masses_make_expert_weighted_fedavg(found: list[tuple[int, int, float]]) -> None:
    replies = [replace(each, mass=[0.5, 0.5]) for each in made(found)]
    left, right = averaged("expert-weighted", replies), averaged("fedavg", replies)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-6)


def test_a_client_that_never_uses_an_expert_does_not_move_it() -> None:
    user, other = reply(0, 1, mass=(1.0, 0.0)), reply(1, 2, mass=(0.0, 1.0))
    found = averaged("expert-weighted", [user, other])
    torch.testing.assert_close(found["prompts"][:2], user.arrays["prompts"][:2])
    torch.testing.assert_close(found["prompts"][2:], other.arrays["prompts"][2:])
    torch.testing.assert_close(found["gate"], (user.arrays["gate"] + other.arrays["gate"]) / 2)


@pytest.mark.parametrize("kind", [*KINDS, "fedadam"])
def test_an_expert_that_nobody_sent_stays_as_it_is(kind: str) -> None:
    home = [replace(reply(c, c), experts=[1], arrays={"prompts": reply(c, c).arrays["prompts"][2:],
                                                    "gate": reply(c, c).arrays["gate"]}) for c in range(3)]  # fmt: skip
    found = averaged(kind, home)
    assert torch.equal(found["prompts"][:2], SENT["prompts"][:2])
    assert not torch.equal(found["prompts"][2:], SENT["prompts"][2:])


def test_an_expert_is_averaged_over_those_who_sent_it() -> None:
    whole = reply(0, 1)
    part = replace(reply(1, 2), experts=[0], arrays={"prompts": reply(1, 2).arrays["prompts"][:2],
                                                   "gate": reply(1, 2).arrays["gate"]})  # fmt: skip
    found = averaged("fedavg", [whole, part])
    torch.testing.assert_close(found["prompts"][2:], whole.arrays["prompts"][2:])
    torch.testing.assert_close(found["prompts"][:2], (whole.arrays["prompts"][:2] + part.arrays["prompts"]) / 2)


def test_differences_in_half_precision_are_added_to_what_was_sent() -> None:
    value = reply(0, 3)
    half = replace(value, difference=True, arrays={n: (v - SENT[n]).half() for n, v in value.arrays.items()})
    found = averaged("fedavg", [half])
    for name in found:
        torch.testing.assert_close(found[name], value.arrays[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["median", "trimmed-mean"])
def test_one_outlier_among_five_moves_robust_averages_little(kind: str) -> None:
    replies = [reply(c, c) for c in range(5)]
    wild = [*replies[:4], replace(replies[4], arrays={n: v + 8 for n, v in replies[4].arrays.items()})]
    robust = averaged(kind, wild, trim=0.2, norm_limit=100.0)
    plain = averaged("uniform", wild, norm_limit=100.0)
    clean = averaged("uniform", replies)
    assert all((robust[n] - clean[n]).abs().max() < 2 for n in clean)
    assert all((plain[n] - clean[n]).abs().max() > 1.5 for n in clean)


@pytest.mark.parametrize("kind", ["median", "trimmed-mean"])
def test_robust_averages_hold_few_numbers_of_all_clients_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven clients, two of which sent one expert: what a sort over all of them gives, at most ten numbers a time."""
    replies = [reply(c, c) for c in range(7)]
    for client, expert in ((2, 1), (5, 0)):
        rows = replies[client].arrays["prompts"].reshape(2, -1, 3)[expert]
        replies[client] = replace(replies[client], experts=[expert], arrays=replies[client].arrays | {"prompts": rows})
    sorted_at_once: list[int] = []
    middle = Aggregator._middle
    monkeypatch.setattr(aggregation, "AT_ONCE", 10)
    monkeypatch.setattr(Aggregator, "_middle", lambda self, x: (sorted_at_once.append(x.numel()), middle(self, x))[1])
    found = averaged(kind, replies, trim=0.2)
    assert max(sorted_at_once) <= 10

    def by_hand(start: Tensor, sent: list[Tensor]) -> Tensor:
        ordered = torch.stack([each.double() - start.double() for each in sent]).sort(0).values
        cut = (len(sent) - 1) // 2 if kind == "median" else 1
        return (start.double() + ordered[cut : len(sent) - cut].mean(0)).float()

    assert torch.equal(found["gate"], by_hand(SENT["gate"], [each.arrays["gate"] for each in replies]))
    for expert, start in enumerate(SENT["prompts"].view(2, 2, 3)):
        own = [each for each in replies if expert in (each.experts or [0, 1])]
        sent = [each.arrays["prompts"].view(-1, 2, 3)[expert if each.experts is None else 0] for each in own]
        assert torch.equal(found["prompts"].view(2, 2, 3)[expert], by_hand(start, sent)) and len(own) == 6


def test_fedadam_is_adam_on_the_averaged_update_and_goes_on_from_its_state() -> None:
    config = AggregationConfig(aggregation="fedadam", server_lr=0.1)
    aggregator, value = Aggregator(config, LAYOUT), SENT["gate"].double()
    first, second = torch.zeros_like(value), torch.full_like(value, TAU**2)
    arrays = SENT
    for number in range(3):
        replies = [reply(c, 10 * number + c, n) for c, n in enumerate((1, 5))]
        good, _ = admit([(r.client, pack(r)) for r in replies], arrays, ASKED, LAYOUT, config)
        delta = sum(r.examples * (r.arrays["gate"].double() - arrays["gate"].double()) for r in replies) / 6
        first, second = BETAS[0] * first + (1 - BETAS[0]) * delta, BETAS[1] * second + (1 - BETAS[1]) * delta**2
        value = arrays["gate"].double() + 0.1 * first / (second.sqrt() + TAU)
        resumed = Aggregator(config, LAYOUT)
        resumed.load(aggregator.state())
        arrays, again = aggregator.step(arrays, good), resumed.step(arrays, good)
        assert same(arrays, again)
        torch.testing.assert_close(arrays["gate"].double(), value, rtol=1e-6, atol=1e-6)


def test_drift_tells_agreement_from_disagreement() -> None:
    together = admitted([replace(reply(c, 1)) for c in range(3)])
    assert drift(together)["cosine_mean"] == pytest.approx(1) and drift(together)["distance_mean"] == pytest.approx(
        0, abs=1e-5
    )
    left = reply(0, 1)
    right = replace(left, client=1, arrays={n: 2 * SENT[n] - v for n, v in left.arrays.items()})
    apart = drift(admitted([left, right]))
    assert apart["cosine_mean"] == pytest.approx(-1, abs=1e-6)
    assert apart["distance_mean"] == pytest.approx(2 * apart["norm_mean"], rel=1e-6)
    assert drift([]) == {} and drift(together[:1]).keys() == {"norm_mean"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"round": 2}, "answered round 2 as client 0, asked was round 1"),
    ({"client": 5}, "as client 5"),
    ({"examples": 0}, "examples=0"),
    ({"examples": True}, "examples=True"),
    ({"loss": float("nan")}, "loss=nan"),
    ({"mass": None}, "mass=None, not one gate weight for each of 2"),
    ({"mass": [0.5]}, "not one gate weight for each of 2 experts"),
    ({"mass": [1.5, -0.5]}, "negative or not finite"),
    ({"experts": [2]}, "not numbers from 0 to 1"),
    ({"experts": [0, 0]}, "one of them twice"),
    ({"experts": [0]}, r"of shape \[4, 3\], expected \[2, 3\]"),
    ({"arrays": {"gate": SENT["gate"]}}, "'prompts' is missing"),
    ({"arrays": {**SENT, "extra": torch.zeros(1)}}, "'extra' is unknown"),
    ({"arrays": SENT | {"gate": torch.zeros(3, 2)}}, r"of shape \[3, 2\], expected \[2, 3\]"),
    ({"arrays": SENT | {"gate": torch.full((2, 3), torch.inf)}}, "6 numbers that are not finite"),
    ({"arrays": SENT | {"gate": torch.zeros(2, 3, dtype=torch.int64)}}, "of torch.int64"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_bad_reply_is_refused_with_its_reason_and_the_others_stay(change: dict[str, Any], said: str) -> None:
    bad = pack(replace(reply(0, 0), **change))
    good, (failure,) = admit([(0, bad), (1, pack(reply(1, 1)))], SENT, ASKED, LAYOUT, AggregationConfig())
    assert [update.client for update in good] == [1]
    assert failure.client == 0
    assert re.search(said, failure.reason), failure.reason


def test_an_update_far_above_the_median_norm_is_refused_where_there_are_enough_to_judge() -> None:
    huge = reply(0, 0, arrays={n: v + 1000 for n, v in SENT.items()})
    good, (failure,) = admit(
        [(r.client, pack(r)) for r in (huge, reply(1, 1), reply(2, 2))], SENT, ASKED, LAYOUT, AggregationConfig()
    )
    assert [u.client for u in good] == [1, 2] and "limit 10 times" in failure.reason
    good, failures = admit([(0, pack(huge)), (1, pack(reply(1, 1)))], SENT, ASKED, LAYOUT, AggregationConfig())
    assert len(good) == 2 and not failures


def test_strangers_and_second_answers_are_refused() -> None:
    first, second = reply(0, 0), reply(0, 1)
    answers = [(0, pack(first)), (0, pack(second)), (77, pack(reply(77, 1)))]
    (update,), failures = admit(answers, SENT, ASKED, LAYOUT, AggregationConfig())
    torch.testing.assert_close((SENT["gate"] + update.delta["gate"]).float(), first.arrays["gate"])
    assert [(f.client, f.reason) for f in failures] == [
        (0, "answered twice; the first answer counts"),
        (77, "was not asked"),
    ]


@given(st.binary(max_size=200))
def test_no_bytes_can_stop_the_server(blob: bytes) -> None:
    good, failures = admit([(0, blob)], SENT, ASKED, LAYOUT, AggregationConfig())
    assert not good and len(failures) == 1


@pytest.mark.parametrize(("options", "said"), [({"trim": 0.5}, "--trim 0.5"), ({"server_lr": 0.0}, "--server-lr 0.0"),
                                               ({"norm_limit": -1.0}, "--norm-limit -1.0")])  # fmt: skip
def test_settings_outside_their_limits_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(AggregationConfig(**options))
