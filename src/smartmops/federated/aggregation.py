"""Replies in, the next round's arrays out.

Knows named tensors and how much each expert was used. Knows no model and no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.checks.errors import ConfigError, FederationError
from smartmops.clients.messages import Failure, Reply, unpack
from smartmops.options.federation import AggregationConfig

from .spool import Spool

BETAS, TAU = (0.9, 0.99), 1e-3  # of FedAdam, as in Reddi et al. 2021
WORDS = 1 << 20  # bytes that an answer may have beyond its arrays
REASON = 1000  # characters of a reason that are kept: a client may send any
COMPARED = 100  # updates that are laid side by side to see how far they are apart
AT_ONCE = 2**21  # numbers of all clients together that are sorted at once, in float64
JUDGES = 3  # updates it takes before one of them can be called too large


@dataclass(frozen=True)
class Layout:
    """Which trained arrays belong to experts: the rows of one expert after those of another."""

    experts: int = 1
    by_expert: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Update:
    """One client's admitted update.

    Attributes:
        norm: L2 norm of all of `delta` together.
        read: Makes `delta`.
        data: Tells the client's data from any others; empty where it does not say.
    """

    client: int
    examples: int
    mass: list[float] | None
    loss: float
    seconds: float
    experts: list[int] | None
    norm: float
    read: Callable[[], dict[str, Tensor]] = field(repr=False)
    data: str = ""

    @property
    def delta(self) -> dict[str, Tensor]:
        """Float64 differences from what was sent, made anew each time; zero for experts that stayed at home."""
        return self.read()


def check(config: AggregationConfig, layout: Layout) -> None:
    """Whether the adapter can be averaged so.

    Raises:
        ConfigError: expert-weighted averaging of an adapter without several experts.
    """
    if config.aggregation == "expert-weighted" and layout.experts < 2:
        raise ConfigError("aggregation='expert-weighted' goes by how much each client uses which expert, and this "
                          "adapter has not several: choose method mops with 2 experts or more, or another "
                          "aggregation")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- admission
def admit(
    received: Iterable[tuple[int, bytes]],
    sent: Mapping[str, Tensor],
    asked: Mapping[int, int],
    layout: Layout,
    config: AggregationConfig,
) -> tuple[list[Update], list[Failure]]:
    """Good updates in the order of their clients, so that no sum depends on the order of arrival; and what was refused.

    Raises nothing, whatever a client sends. A second answer of one client is refused, and the first stands. Answers are
    looked at one by one and then lie in a `Spool`: memory does not grow with them.

    Args:
        received: Clients and their packed answers, as they came in.
        sent: The trained arrays as clients received them.
        asked: Clients that were asked, and the round each was asked for.
        layout: Of the adapter.
        config: `norm_limit`.
    """
    good: dict[int, Update] = {}
    spool = Spool()
    failures: list[Failure] = []
    answered: set[int] = set()
    limit = WORDS + sum(4 * value.numel() for value in sent.values())  # float32 is the most that comes back
    for client, blob in received:
        number = asked.get(client, 0)
        try:
            if client not in asked:
                raise FederationError("was not asked")
            if client in answered:
                raise FederationError("answered twice; the first answer counts")
            answered.add(client)
            if len(blob) > limit:
                raise FederationError(f"answered with {len(blob):,} bytes; the limit is {limit:,}")
            good[client] = _update(blob, client, number, sent, layout, spool)
        except (ValueError, TypeError, RuntimeError) as error:
            failures.append(Failure(number, client, str(error)[:REASON]))
    usual = median(update.norm for update in good.values()) if len(good) >= JUDGES else math.inf
    for client, update in list(good.items()):
        if update.norm > config.norm_limit * usual:
            reason = (f"update of norm {update.norm:.3g}, the round's median is {usual:.3g} and the limit "
                      f"{config.norm_limit:g} times that")  # fmt: skip
            failures.append(Failure(asked[client], client, reason))
            del good[client]
    return [good[client] for client in sorted(good)], sorted(failures, key=lambda failure: failure.client)


def _update(blob: bytes, client: int, number: int, sent: Mapping[str, Tensor], layout: Layout, spool: Spool) -> Update:
    reply = unpack(blob)
    if isinstance(reply, Failure):
        raise FederationError(reply.reason)
    if not isinstance(reply, Reply):
        raise FederationError(f"sent a {type(reply).__name__}, not a reply")
    if (reply.round, reply.client) != (number, client):
        raise FederationError(
            f"answered round {reply.round} as client {reply.client}, asked was round {number} of client {client}"
        )
    if not _whole(reply.examples) or reply.examples < 1:
        raise FederationError(f"examples={reply.examples!r}, not a number from 1")
    for name in ("loss", "seconds"):
        if not _real(getattr(reply, name)):
            raise FederationError(f"{name}={getattr(reply, name)!r}, not a finite number")
    _check_mass(reply.mass, layout)
    _check_experts(reply.experts, layout)
    if odd := sorted(sent.keys() ^ reply.arrays.keys()):
        raise FederationError(f"array {odd[0]!r} is " + ("missing" if odd[0] in sent else "unknown"))
    norm = math.sqrt(sum(float(value.square().sum()) for value in _deltas(reply, sent, layout).values()))
    at = spool.put(blob)

    def read() -> dict[str, Tensor]:
        again = unpack(spool.get(at))
        assert isinstance(again, Reply)
        return _deltas(again, sent, layout)

    return Update(client, reply.examples, reply.mass, reply.loss, reply.seconds, reply.experts, norm, read,
                  str(reply.data))  # fmt: skip


def _deltas(reply: Reply, sent: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    return {name: _delta(name, reply, sent[name], layout) for name in sorted(sent)}


def _bytes(delta: Mapping[str, Tensor], names: Iterable[str]) -> bytes:
    return b"".join(delta[name].numpy().tobytes() for name in names)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_mass(mass: object, layout: Layout) -> None:
    if mass is None and layout.experts == 1:
        return
    if not isinstance(mass, list) or len(mass) != layout.experts:
        raise FederationError(f"mass={mass!r}, not one gate weight for each of {layout.experts} experts")
    if not all(_real(each) and each >= 0 for each in mass):
        raise FederationError(f"mass={mass!r}, with a gate weight that is negative or not finite")


def _check_experts(experts: object, layout: Layout) -> None:
    if experts is None:
        return
    if not isinstance(experts, list) or not all(_whole(e) and 0 <= e < layout.experts for e in experts):
        raise FederationError(f"experts={experts!r}, not numbers from 0 to {layout.experts - 1}")
    if len(set(experts)) < len(experts):
        raise FederationError(f"experts={experts!r}, one of them twice")


def _delta(name: str, reply: Reply, sent: Tensor, layout: Layout) -> Tensor:
    value, shape = reply.arrays[name], list(sent.shape)
    split = name in layout.by_expert and reply.experts is not None
    if split:
        shape[0] = len(reply.experts or ()) * (shape[0] // layout.experts)
    if list(value.shape) != shape:
        raise FederationError(f"array {name!r} is of shape {list(value.shape)}, expected {shape}")
    if value.dtype not in (torch.float32, torch.float16):
        raise FederationError(f"array {name!r} is of {value.dtype}, expected float32 or float16")
    if not value.isfinite().all():
        raise FederationError(f"array {name!r} has {int((~value.isfinite()).sum())} numbers that are not finite")
    start = sent.double()
    if not split:
        return value.double() if reply.difference else value.double() - start
    found = _experts(torch.zeros_like(start), layout.experts)
    theirs = _experts(value.double(), len(reply.experts)) if reply.experts else value.double()
    for at, expert in enumerate(reply.experts or ()):
        own = _experts(start, layout.experts)[expert]
        found[expert] = theirs[at] if reply.difference else theirs[at] - own
    return found.flatten(0, 1)


def _experts(array: Tensor, experts: int) -> Tensor:
    """[experts, prompts of each, ...] of an array whose rows are those of one expert after another."""
    return array.reshape(experts, len(array) // experts, *array.shape[1:])


# ----------------------------------------------------------------------------------------------------------- averaging
class Aggregator:
    """Keeps what an aggregation remembers between rounds."""

    def __init__(self, config: AggregationConfig, layout: Layout) -> None:
        check(config, layout)
        self.config, self.layout = config, layout
        self.moments: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """FedAdam's moments by `first/NAME` and `second/NAME`; empty otherwise."""
        return {name: value.clone() for name, value in self.moments.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""
        self.moments = {name: value.clone() for name, value in state.items()}

    def step(self, arrays: Mapping[str, Tensor], updates: Sequence[Update]) -> dict[str, Tensor]:
        """Arrays of the next round; sums are made in float64 and rounded once.

        Every expert is combined over the clients that sent it; one that nobody sent stays as it is. One client alone
        gives exactly its own arrays under all but FedAdam.
        """
        if not updates:
            return dict(arrays)
        whole = self.config.aggregation in ("trimmed-mean", "median")
        moved = self._number_by_number(arrays, updates) if whole else self._by_weight(arrays, updates)
        return {
            name: (value.double() + self._through_adam(name, moved[name])).float() for name, value in arrays.items()
        }

    def _by_weight(self, arrays: Mapping[str, Tensor], updates: Sequence[Update]) -> dict[str, Tensor]:
        """Sums by weight that run over the updates, one in memory at a time.

        fedavg (McMahan et al. 2017): sum_k n_k delta_k / sum_k n_k.
        """
        plain = torch.tensor([self._weight(update) for update in updates], dtype=torch.float64)
        each = torch.stack([self._weights(update) for update in updates])
        shares = plain / math.fsum(plain.tolist())
        totals = torch.tensor([math.fsum(column) for column in each.T.tolist()], dtype=torch.float64)
        own = torch.where(totals > 0, each / totals, 0.0)
        found = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in arrays.items()}
        for update, share, by_expert in zip(updates, shares, own, strict=True):
            for name, delta in update.delta.items():
                if name in self.layout.by_expert:
                    rows = _experts(delta, self.layout.experts)
                    found[name] += (rows * by_expert.view(-1, *[1] * (rows.dim() - 1))).flatten(0, 1)
                else:
                    found[name] += delta * share
        return found

    def _weight(self, update: Update) -> float:
        return 1.0 if self.config.aggregation == "uniform" else float(update.examples)

    def _weights(self, update: Update) -> Float[Tensor, " experts"]:
        """Of the update's experts; 0 for those that it does not have."""
        weight, there = self._weight(update), update.experts
        mass = update.mass if self.config.aggregation == "expert-weighted" else None
        return torch.tensor([
            0.0 if there is not None and expert not in there else weight * (1.0 if mass is None else mass[expert])
            for expert in range(self.layout.experts)
        ], dtype=torch.float64)  # fmt: skip

    def _number_by_number(self, arrays: Mapping[str, Tensor], updates: Sequence[Update]) -> dict[str, Tensor]:
        """trimmed-mean, median (Yin et al. 2018): a number of all clients at once, and so many numbers as are few."""
        found, spool, at = {}, Spool(), 0
        starts = [spool.put(_bytes(update.delta, arrays))[0] for update in updates]
        for name, value in arrays.items():
            parts = self.layout.experts if name in self.layout.by_expert else 1
            size, moved = value.numel() // parts, []
            for part in range(parts):
                there = [start for start, each in zip(starts, updates, strict=True)
                         if parts == 1 or each.experts is None or part in each.experts]  # fmt: skip
                moved.append(self._middles(spool, [start + 8 * at for start in there], size))
                at += size
            found[name] = torch.cat(moved).reshape(value.shape)
        return found

    def _middles(self, spool: Spool, starts: Sequence[int], size: int) -> Float[Tensor, " size"]:
        """Of so many float64 numbers that lie from each of `starts` on; 0 where there are none."""
        found = torch.zeros(size, dtype=torch.float64)
        step = max(1, AT_ONCE // max(1, len(starts)))
        for first in range(0, size if starts else 0, step):
            own = found[first : first + step]
            rows = [bytearray(spool.get((start + 8 * first, 8 * len(own)))) for start in starts]
            own.copy_(self._middle(torch.stack([torch.frombuffer(row, dtype=torch.float64) for row in rows])))
        return found

    def _middle(self, deltas: Float[Tensor, "clients ..."]) -> Float[Tensor, ...]:
        count = len(deltas)
        most, share = (count - 1) // 2, self.config.trim
        # One at least, or one client among few would be averaged in whatever it sends; 0.29 of 100 are 29, not 28.999.
        asked = max(1, math.floor(share * count + 1e-9)) if share else 0
        cut = most if self.config.aggregation == "median" else min(asked, most)
        return deltas.sort(0).values[cut : count - cut].mean(0)

    def _through_adam(self, name: str, delta: Tensor) -> Tensor:
        """FedAdam (Reddi et al. 2021, algorithm 2): the averaged update is what Adam takes for a gradient."""
        if self.config.aggregation != "fedadam":
            return delta
        first = self.moments.get(f"first/{name}", torch.zeros_like(delta))
        second = self.moments.get(f"second/{name}", torch.full_like(delta, TAU**2))
        first = BETAS[0] * first + (1 - BETAS[0]) * delta
        second = BETAS[1] * second + (1 - BETAS[1]) * delta.square()
        self.moments |= {f"first/{name}": first, f"second/{name}": second}
        return self.config.server_lr * first / (second.sqrt() + TAU)


def drift(updates: Sequence[Update]) -> dict[str, float]:
    """How far the clients of a round go, and how far apart: means of norm, and over pairs of cosine and L2 distance.

    Of more than `COMPARED` clients, of so many of them, evenly spread over their numbers.
    """
    if not updates:
        return {}
    updates = [updates[len(updates) * i // COMPARED] for i in range(COMPARED)] if len(updates) > COMPARED else updates
    flat = torch.stack([torch.cat([value.flatten() for value in u.delta.values()]) for u in updates])
    gram = flat @ flat.T
    norms = gram.diagonal().clamp(min=0).sqrt()
    found = {"norm_mean": float(norms.mean())}
    if len(updates) > 1:
        above = torch.ones_like(gram, dtype=torch.bool).triu(1)
        scale = (norms[:, None] * norms[None, :]).clamp(min=1e-300)
        apart = (norms[:, None].square() + norms[None, :].square() - 2 * gram).clamp(min=0).sqrt()
        found["cosine_mean"] = float((gram / scale)[above].mean())
        found["distance_mean"] = float(apart[above].mean())
    return found
