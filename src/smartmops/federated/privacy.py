"""DP-FedAvg with honest accounting (experimental): sampling, clipping, noise, and what they have cost.

Knows updates as named tensors. Protects whether a client took part at all, against whoever sees the adapters that the
server gives out; the server itself is trusted (central model).
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smartmops.checks.errors import ConfigError, FederationError, MissingExtra, RunError
from smartmops.options.federation import PrivacyConfig

DRAWS = 4  # normals summed for one number of noise


class Private:
    """Samples clients, averages their updates under noise, and counts what that costs.

    Every client joins a round with probability `rate`, by itself (Poisson sampling); updates weigh the same, are
    clipped to `clip_norm`, and their sum with noise is divided by the expected number of clients, never by the actual
    one. So one client more or less moves the sum by at most `clip_norm`, which is what the accountant is told.

    The noise comes from the operating system's secure generator, never from a seed: a run under privacy cannot be
    repeated. Each number is the sum of several normals (Holohan and Braghin 2021), which hides the pattern that
    floating point leaves in a single one (Mironov 2012). That is no formal proof, and side channels such as timing are
    not covered.

    Args:
        config: `noise_multiplier` is set.
        clients: Number of clients that may be asked.
        rate: Probability with which each joins a round.

    Raises:
        ImportError: dp-accounting is missing.
        ConfigError, FederationError, RunError: the budget does not allow a single round.
    """

    def __init__(self, config: PrivacyConfig, clients: int, rate: float) -> None:
        assert config.noise_multiplier is not None
        self.noise, self.clip, self.budget = config.noise_multiplier, config.clip_norm, config.epsilon_budget
        self.clients, self.rate, self.rounds = clients, min(rate, 1.0), 0
        self.delta = clients**-1.1 if config.delta is None else config.delta
        if self.delta >= 1 / clients:
            warnings.warn(f"delta={self.delta:g} is not below 1 / {clients} clients: it allows giving one of them away",
                          stacklevel=2)  # fmt: skip
        if not self.allows_another():
            raise ConfigError(f"epsilon_budget={self.budget}, but one round costs {self.epsilon(1):.3g} at "
                              f"noise_multiplier={self.noise}: choose a larger budget or more noise")  # fmt: skip

    def sample(self) -> list[int]:
        """Clients of a round, each drawn by itself; there may be none."""
        draw = secrets.SystemRandom()
        return [client for client in range(self.clients) if draw.random() < self.rate]

    def average(self, deltas: Iterable[Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(sum_k clip(delta_k) + N(0, (noise_multiplier clip_norm)^2)) / (rate clients), and one round on the account.

        Args:
            deltas: Updates of the clients that answered; there may be none.
            like: Names and shapes.

        Raises:
            FederationError: an update is not finite.
        """
        self.rounds += 1  # before anything is given out: a crash can only count too much
        total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in like.items()}
        for delta in deltas:
            norm = math.sqrt(sum(float(value.double().square().sum()) for value in delta.values()))
            if not math.isfinite(norm):
                raise FederationError("an update with numbers that are not finite cannot be clipped: leave it out")
            scale = 1.0 if norm <= self.clip else self.clip / norm
            for name in total:
                total[name] += delta[name].double() * scale
        spread, expected = self.noise * self.clip, self.rate * self.clients
        return {name: ((value + spread * _normal(value.shape)) / expected).float() for name, value in total.items()}

    def epsilon(self, rounds: int | None = None) -> float:
        """Spent after so many rounds (those done, if None), at `delta`."""
        return _epsilon(self.noise, self.rate, self.rounds if rounds is None else rounds, self.delta)

    def allows_another(self) -> bool:
        """Whether one round more stays within the budget."""
        return self.budget is None or self.epsilon(self.rounds + 1) <= self.budget

    def state(self) -> dict[str, Any]:
        """The account, for a checkpoint."""
        return {"rounds": self.rounds} | self._terms()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with an account.

        Raises:
            RunError: it was kept on other terms.
        """
        for name, value in self._terms().items():
            if state.get(name) != value:
                raise RunError(f"the checkpoint's privacy account was kept with {name}={state.get(name)}, now it "
                               f"is {value}: ask for the same again")  # fmt: skip
        self.rounds = int(state["rounds"])

    def _terms(self) -> dict[str, Any]:
        return {"noise_multiplier": self.noise, "clip_norm": self.clip, "clients": self.clients, "rate": self.rate,
                "delta": self.delta}  # fmt: skip


def _normal(shape: torch.Size) -> Tensor:
    """Standard normals, float64, by Box and Muller from secure uniforms of 53 bits; each the sum of four, halved."""
    count = math.prod(shape) * DRAWS
    bits = np.frombuffer(secrets.token_bytes(16 * count), np.uint64).reshape(2, count)
    first, second = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    drawn = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    return torch.from_numpy(drawn.reshape(DRAWS, -1).sum(0) / math.sqrt(DRAWS)).reshape(shape)


@cache
def _epsilon(noise: float, rate: float, rounds: int, delta: float) -> float:
    """Of so many rounds of the Poisson-sampled Gaussian mechanism, by its privacy loss distribution."""
    if rounds == 0:
        return 0.0
    try:
        from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise MissingExtra("privacy accounting needs dp-accounting: pip install 'smartmops[privacy]'") from error
    event: DpEvent = PoissonSampledDpEvent(rate, GaussianDpEvent(noise)) if rate < 1 else GaussianDpEvent(noise)
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(event, rounds).get_epsilon(delta))
