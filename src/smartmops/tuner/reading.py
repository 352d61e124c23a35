"""Which tokens of a row the gate reads, and from which on experts are seen. Token ids and masks; no model, no text.

The gate must never read anything that does not exist yet when the answer is generated, nor what a template writes
around every text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100


def places(ids: Int[Tensor, " seq"], pattern: Sequence[int]) -> Int[Tensor, " found"]:
    """Where a sequence of ids begins in a row."""
    if not pattern or len(pattern) > len(ids):
        return ids.new_zeros(0)
    wanted = torch.tensor(list(pattern), device=ids.device)
    return (ids.unfold(0, len(pattern), 1) == wanted).all(-1).nonzero()[:, 0]


def answer_starts(
    ids: Int[Tensor, "rows seq"] | None,
    real: Bool[Tensor, "rows seq"],
    labels: Int[Tensor, "rows seq"] | None,
    header: Sequence[int] | None,
) -> Int[Tensor, " rows"]:
    """Column from which on each row's tokens are header and answer.

    With labels, `header` tokens before the first label (one at least, since it predicts that label); without, the last
    place where the header stands, or the last token: what is about to be answered.
    """
    starts = []
    opening = list(header or [])
    for row in range(len(real)):
        end = int(real[row].nonzero()[-1]) + 1 if bool(real[row].any()) else real.shape[1]
        start = end - 1
        if labels is not None and bool((labels[row] != IGNORED).any()):
            first = int((labels[row] != IGNORED).nonzero()[0])
            before = first - len(opening)
            given = ids is not None and before >= 0 and ids[row, before:first].tolist() == opening
            start = before if given and opening else first - 1
        elif ids is not None and len(found := places(ids[row, :end], opening)):
            start = int(found[-1])
        starts.append(max(start, 0))
    return torch.tensor(starts, device=real.device)


def framed(
    ids: Int[Tensor, "rows seq"], real: Bool[Tensor, "rows seq"], frame: Mapping[str, Sequence[int]]
) -> Bool[Tensor, "rows seq"]:
    """The tokens inside the user's turns, and inside a system turn that is not the template's own default.

    `frame` holds ids: what opens a turn of `user` and of `system`, the `header` of an answer, any token of `close` that
    ends a turn, and `default_system`, the words that a template adds by itself.
    A row in which no turn is found (another template) is read whole.
    """
    read = torch.zeros_like(real)
    close = torch.tensor(list(frame.get("close") or []), device=ids.device)
    user, system, header, default = (list(frame.get(n) or []) for n in ("user", "system", "header", "default_system"))
    for row in range(len(ids)):
        ends = torch.cat([torch.isin(ids[row], close).nonzero()[:, 0], places(ids[row], header)]).sort().values
        for opening in (user, system):
            for at in places(ids[row], opening).tolist():
                first = at + len(opening)
                later = ends[ends >= first]
                last = int(later[0]) if len(later) else ids.shape[1]
                if opening == user or ids[row, first:last].tolist() != default:
                    read[row, first:last] = True
        if not bool((read[row] & real[row]).any()):
            read[row] = True
    return read & real
