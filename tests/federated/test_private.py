"""Noise of the right size from an unpredictable source, clipping, a fixed denominator, and an account that adds up.

Statistical tests fail by chance about once in a million runs: limits stand five standard errors away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import optimize, stats

from faulty import Faulty, magnified
from smartmops.checks.limits import check
from smartmops.federated import federate as module
from smartmops.federated.federate import FederateConfig, InProcess, federate
from smartmops.federated.privacy import Private, _normal
from smartmops.federated.rounds import State
from smartmops.options.federation import PrivacyConfig

pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: pip install 'smartmops[privacy]'")
LIKE = {"a": torch.zeros(40, 50), "b": torch.zeros(3)}


def private(noise: float = 1.0, clients: int = 100, rate: float = 0.1, **options: Any) -> Private:
    return Private(PrivacyConfig(noise_multiplier=noise, **{"delta": 1e-3} | options), clients, rate)


def test_the_noise_is_standard_normal_and_never_the_same() -> None:
    drawn = _normal(torch.Size([200_000]))
    assert abs(float(drawn.mean())) < 5 / math.sqrt(len(drawn))
    assert abs(float(drawn.std()) - 1) < 5 / math.sqrt(2 * len(drawn))
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    torch.manual_seed(0)
    first = _normal(torch.Size([10]))
    torch.manual_seed(0)
    assert not torch.equal(first, _normal(torch.Size([10])))


def test_nobody_but_noise_is_noise_over_the_fixed_denominator() -> None:
    found = private(noise=2.0, clip_norm=3.0).average([], LIKE)["a"].double() * 0.1 * 100
    assert found.shape == (40, 50)
    assert abs(float(found.std()) / 6 - 1) < 5 / math.sqrt(2 * found.numel())


def test_updates_are_clipped_together_and_small_ones_left_alone() -> None:
    small = {"a": torch.full((40, 50), 1e-3), "b": torch.zeros(3)}
    large = {name: 1e6 * value for name, value in small.items()}
    norm = 1e-3 * math.sqrt(2000)
    for given, expected in ((small, norm), (large, 1.0)):
        found = private(noise=1e-9, clients=10, rate=0.1).average([given], LIKE)
        assert math.sqrt(sum(float(v.square().sum()) for v in found.values())) == pytest.approx(expected, rel=1e-5)


def test_half_of_the_clients_give_half_of_the_average() -> None:
    one = {"a": torch.full((40, 50), 1e-3), "b": torch.zeros(3)}
    whole, half = (private(noise=1e-9).average([one] * count, LIKE)["a"] for count in (10, 5))
    torch.testing.assert_close(half, whole / 2, rtol=1e-5, atol=1e-9)


def test_every_client_joins_by_itself() -> None:
    source = private(clients=50, rate=0.2)
    counts = [len(source.sample()) for _ in range(2000)]
    error = math.sqrt(50 * 0.2 * 0.8 / 2000)
    assert abs(sum(counts) / 2000 - 10) < 5 * error
    assert abs(stats.tvar(counts) / 8 - 1) < 5 * math.sqrt(2 / 2000) * 1.1
    assert private(clients=10, rate=1.0).sample() == list(range(10))


def balle_wang(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        half, ratio = 1 / (2 * noise), epsilon * noise
        return float(stats.norm.cdf(half - ratio) - math.exp(epsilon) * stats.norm.cdf(-half - ratio) - delta)

    return float(optimize.brentq(excess, 0, 50))


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 20)])
def test_without_sampling_the_account_is_that_of_one_gaussian(noise: float, rounds: int) -> None:
    expected = balle_wang(noise / math.sqrt(rounds), 1e-3)  # rounds Gaussians are one with less noise
    assert private(noise, rate=1.0).epsilon(rounds) == pytest.approx(expected, rel=0.01)


def test_sampling_rounds_and_noise_move_epsilon_the_right_way() -> None:
    base = private().epsilon(20)
    assert private(rate=1.0).epsilon(20) > base > private(noise=4.0).epsilon(20) > 0
    assert private().epsilon(40) > base > private().epsilon(1) and private().epsilon(0) == 0
    assert base < 2.75  # by Renyi divergences 2.7 was found for this setting; the privacy loss distribution is tighter


def test_the_account_counts_resumes_and_stops_at_the_budget() -> None:
    one = private(epsilon_budget=1.0)
    while one.allows_another():
        one.average([], LIKE)
    assert one.epsilon() <= 1.0 < one.epsilon(one.rounds + 1)
    again = private(epsilon_budget=1.0)
    again.load(one.state())
    assert again.rounds == one.rounds and not again.allows_another()
    with pytest.raises(ValueError, match=r"noise_multiplier=1\.0, now it is 2\.0"):
        private(noise=2.0).load(one.state())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"noise_multiplier": 0.0}, "--noise-multiplier 0"), ({"clip_norm": -1.0}, "--clip-norm -1"), ({"delta": 1.5}, "--delta 1.5"),
     ({"epsilon_budget": 0.0}, "--epsilon-budget 0")],
)  # fmt: skip
def test_settings_outside_their_limits_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(PrivacyConfig(**options))


def test_a_budget_for_less_than_one_round_and_a_loose_delta_are_told() -> None:
    with pytest.raises(ValueError, match=r"epsilon_budget=0\.001, but one round costs"):
        private(epsilon_budget=0.001)
    with pytest.warns(UserWarning, match=r"not below 1 / 100"):
        private(delta=0.5)
    with pytest.raises(ValueError, match="not finite"):
        private().average([{"a": torch.full((40, 50), torch.nan), "b": torch.zeros(3)}], LIKE)


def test_a_private_federation_ends_at_its_budget_and_says_nothing_of_clients(
    config: Callable[..., FederateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(rounds=12, noise_multiplier=3.0, clip_norm=0.5, delta=1e-2, epsilon_budget=0.8)
    metrics = federate(settings)
    rounds = metrics["rounds"][1:]
    assert 1 <= len(rounds) < 12 and all(row["epsilon"] <= 0.8 for row in rounds)
    assert [row["epsilon"] for row in rounds] == sorted(row["epsilon"] for row in rounds)
    assert not {"loss", "drift", "mass"} & set().union(*rounds)
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"epsilon {row['epsilon']:.3f}" in told for row in rounds) and "privacy budget" in told
    kept = State.load(settings.out / "checkpoints" / "round.safetensors")
    assert kept is not None and kept.private is not None and kept.private["rounds"] == len(rounds)
    assert [row.get("epsilon") for row in kept.rows[1:]] == [row["epsilon"] for row in rounds]
    again = federate(replace(settings, resume=True))
    assert again == metrics


def test_under_privacy_no_update_is_judged_by_those_of_others(
    config: Callable[..., FederateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client more could throw another one out, and the sum would move by more than what is accounted for."""
    monkeypatch.setattr(module, "InProcess", lambda worker: Faulty(InProcess(worker), magnified, clients=[1]))
    options: dict[str, Any] = {"rounds": 1, "clients": 4, "clients_per_round": 4}
    assert federate(config(**options))["clients_failed"] == 1
    settings = config(**options, noise_multiplier=3.0, delta=1e-2)
    assert federate(replace(settings, out=settings.out.with_name("private")))["clients_failed"] == 0
