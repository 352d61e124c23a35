"""What travels with a cache and follows its rows. Knows transformers' cache; no prompts, no gate.

Rows of a cache are reordered, repeated and left out by methods of its own, of which nobody else is told. So a cache
that carries something is given a class that tells it. A method of the instance would do so too, but it holds on to the
cache it was made for: a shallow copy would reorder another's rows, and keys and values would wait for the collector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers.cache_utils import Cache

Change = Callable[[Tensor], Tensor]  # of a tensor with a row for each of the cache's


@runtime_checkable
class Carried(Protocol):
    """What has something for each row of a cache."""

    def of_rows(self, change: Change) -> Any:
        """The same for the rows that are there now."""


def put(cache: Any, carried: Carried) -> None:
    """Let a cache carry this, and hand it over to its copies."""
    cache.mops = carried
    if isinstance(cache, Cache) and not hasattr(cache, "mops_kind"):
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]


@functools.cache
def _following(kind: type[Any]) -> type[Any]:
    """The class of a cache, whose rows take what they carry along."""

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        kind.reorder_cache(self, beam_idx)
        _follow(self, lambda each: each.index_select(0, beam_idx.to(each.device)))

    def batch_select_indices(self: Any, indices: Any) -> None:
        kind.batch_select_indices(self, indices)
        _follow(self, lambda each: each[indices.to(each.device) if isinstance(indices, Tensor) else indices])

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        kind.batch_repeat_interleave(self, repeats)
        _follow(self, lambda each: each.repeat_interleave(repeats, 0))

    def reduced(self: Any, protocol: Any) -> Any:
        return _again, (kind,), self.__dict__.copy()

    own = (reorder_cache, batch_select_indices, batch_repeat_interleave)
    names = {"mops_kind": kind, "__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": reduced}
    return type(kind.__name__, (kind,), names | {each.__name__: each for each in own})


def _follow(cache: Any, change: Change) -> None:
    carried: Carried | None = getattr(cache, "mops", None)
    if carried is not None:
        cache.mops = carried.of_rows(change)


def _again(kind: type[Any]) -> Any:
    """An empty cache to be filled by pickle or copy, which find a class by its name and so find the plain one."""
    made = _following(kind)  # type: ignore[arg-type]
    return made.__new__(made)  # type: ignore[call-overload]
