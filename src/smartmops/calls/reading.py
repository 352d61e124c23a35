"""Which tokens of a row the gate reads, and from which on experts are seen. Token ids and masks; no model, no text.

The gate must never read anything that does not exist yet when the answer is generated, nor what a template writes
around every text. `instruction` is that rule for every road: padded rows, packed ones, `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from smartmops.attention.packed import IGNORED
from smartmops.checks.errors import AdapterError

FREE, UNKNOWN = -1, -2  # beside token ids: what nothing rests on, and what came as an embedding


def places(ids: Int[Tensor, " seq"], pattern: Sequence[int]) -> Int[Tensor, " found"]:
    """Where a sequence of ids begins in a row."""
    if not pattern or len(pattern) > len(ids):
        return ids.new_zeros(0)
    wanted = torch.tensor(list(pattern), device=ids.device)
    return (ids.unfold(0, len(pattern), 1) == wanted).all(-1).nonzero()[:, 0]


def opens_answer(ids: Int[Tensor, "rows seq"], headers: Sequence[Sequence[int]], past: int = 0) -> bool:
    """Whether a header of an answer ends behind column `past` of a row."""
    return any(len(places(row[max(past - len(header) + 1, 0) :], header)) for header in headers for row in ids)


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


def before_answer(real: Bool[Tensor, "rows seq"], labels: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq"]:
    """The tokens of each row that exist before any of its labels is predicted.

    What stands behind a label, with a label of its own or without (a masked EOS, a later turn), does not exist then.
    Nothing predicts a label on a row's first token, so that one is always among them.
    """
    return real & (((labels != IGNORED) & real & ~_first(real)).cumsum(-1) == 0)


def instruction(
    ids: Int[Tensor, "rows seq"] | None,
    real: Bool[Tensor, "rows seq"],
    labels: Int[Tensor, "rows seq"] | None,
    start: Int[Tensor, " rows"] | None,
    frame: Mapping[str, Sequence[int]] | None,
    chosen: Tensor | None = None,
) -> Bool[Tensor, "rows seq"]:
    """The tokens that the gate reads: of those before the first answer, what stands before column `start`, in `frame`.

    One token at least in each row that has any. `chosen` (not 0 on what the gate is to read instead) is taken as it is.

    Raises:
        AdapterError: `chosen` is of another shape, reads no token of a row, or reads one that an answer is to give.
    """
    mask = real if labels is None else before_answer(real, labels)
    if chosen is not None:
        return _chosen(chosen, real, mask)
    if start is not None:
        before = mask & (torch.arange(mask.shape[1], device=mask.device) < start[:, None])
        mask = torch.where(before.any(-1, keepdim=True), before, _first(real))
    return mask if frame is None or ids is None else framed(ids, mask, frame)


def _first(real: Bool[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq"]:
    """The first token of each row."""
    return real & (real.cumsum(-1) == 1)


def _chosen(
    chosen: Tensor, real: Bool[Tensor, "rows seq"], before: Bool[Tensor, "rows seq"]
) -> Bool[Tensor, "rows seq"]:
    if chosen.shape != real.shape:
        raise AdapterError(f"gate_mask is of shape {list(chosen.shape)} for tokens of shape {list(real.shape)}: give "
                           "one entry per token")  # fmt: skip
    readable = chosen.to(real.device).bool() & real
    if not bool(readable.any(-1).all()):
        row = int((~readable.any(-1)).nonzero()[0])
        raise AdapterError(
            f"gate_mask lets the gate read no token of row {row}: set 1 on the tokens of its instruction"
        )
    if bool((readable & ~before).any()):
        row, column = (readable & ~before).nonzero()[0].tolist()
        raise AdapterError(
            f"gate_mask lets the gate read token {column} of row {row}, where labels say that the "
            f"answer begins at token {int(before[row].nonzero()[-1]) + 1}: set 0 from there on"
        )
    return readable


def each_pair(mask: Any) -> Bool[Tensor, "rows queries keys"] | None:
    """Of a mask that says for each token which others it sees, what it says; None of one entry per token, or none."""
    if isinstance(mask, Mapping):  # for each type of layer
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor) or mask.dim() < 4:
        return None
    return (mask if mask.dtype == torch.bool else mask > -1)[:, 0]


def rests_on(
    ids: Int[Tensor, "rows seq"] | None, real: Bool[Tensor, "rows seq"], read: Bool[Tensor, "rows seq"]
) -> Int[Tensor, "rows seq"]:
    """The tokens without which the gate would read otherwise: of each row, all up to the last one that it reads.

    `FREE` elsewhere; `UNKNOWN` where embeddings stand for tokens.
    """
    before = real & (read.flip(1).cumsum(1).flip(1) > 0)
    tokens = torch.full(real.shape, UNKNOWN, device=real.device) if ids is None else ids
    return torch.where(before, tokens, FREE)


def comes_again(text: Int[Tensor, "rows seq"], ids: Int[Tensor, "some more"] | None, past: int) -> bool:
    """Whether a cache that was cropped to `past` columns gets back all that the gate's reading rests on (`text`)."""
    due = text[:, past:]
    coming = due.new_full(due.shape, FREE)
    if ids is not None and len(due) % len(ids) == 0:  # `generate` repeats rows later
        columns = min(ids.shape[1], due.shape[1])
        coming[:, :columns] = ids[:, :columns].repeat_interleave(len(due) // len(ids), 0).to(due)
    return bool(((due == FREE) | (due == coming)).all())


def shown(pairs: Bool[Tensor, "rows queries keys"], past: int) -> Bool[Tensor, "rows tokens"]:
    """Which tokens are real, of a mask that says which others each of those behind column `past` sees.

    That a token sees itself tells nothing: padding does too where a mask leaves no row empty. Real is what a later
    token sees. The last one of a text is seen by none: it alone sees the one before it, where padding behind a text
    would all see that. A token of padding that sees later ones was given all columns, so what it sees tells nothing.
    """
    queries = pairs.shape[1]
    if past:
        return pairs[:, -1, : past + queries]
    pairs = pairs[:, :, :queries]
    own = pairs.diagonal(dim1=-2, dim2=-1)
    later = pairs.triu(1).any(-1, keepdim=True)
    sees = pairs.tril(-1) & ~later
    real = sees.any(1)
    only = sees.diagonal(-1, dim1=-2, dim2=-1) & (sees.sum(1)[:, :-1] == 1)
    real[:, 1:] |= own[:, 1:] & only
    last = own & (own.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(real.any(-1, keepdim=True), real, last)  # a text of one token sees itself alone


def refuse_sight(
    mask: Any, read: Bool[Tensor, "rows seq"], real: Bool[Tensor, "rows seq"], labels: Tensor | None
) -> None:
    """Refuse a mask under which what the gate reads has seen the answer.

    Raises:
        AdapterError: so it is.
    """
    pairs = each_pair(mask)
    if labels is None or pairs is None or pairs.shape[1:] != (real.shape[1], real.shape[1]):
        return
    seen = pairs & read[:, :, None] & (real & ~before_answer(real, labels))[:, None, :]
    if bool(seen.any()):
        row, token, later = seen.nonzero()[0].tolist()
        raise AdapterError(f"attention_mask lets token {token} of row {row}, which the gate reads, see token {later} "
                           "of the answer: hide answers from what stands before them")  # fmt: skip


def framed(
    ids: Int[Tensor, "rows seq"], real: Bool[Tensor, "rows seq"], frame: Mapping[str, Sequence[int]]
) -> Bool[Tensor, "rows seq"]:
    """The tokens inside the user's turns, and inside a system turn that is not the template's own default.

    `frame` holds ids: what opens a turn of `user` and of `system`, the `header` of an answer, any token of `close` that
    ends a turn, `default_system`, the words that a template adds by itself, and `blank`, with which that which opens a
    turn ends: where the turn begins with blanks, another token stands there, which is the turn's own.
    A row in which no turn is found (another template) is read whole.
    """
    read = torch.zeros_like(real)
    ids = torch.where(real, ids, -1)  # what may not be read may not decide what is read either
    close = torch.tensor(list(frame.get("close") or []), device=ids.device)
    names = ("user", "system", "header", "default_system", "blank")
    user, system, header, default, blank = (list(frame.get(name) or []) for name in names)
    for row in range(len(ids)):
        end = int(real[row].nonzero()[-1]) + 1 if bool(real[row].any()) else 0
        ends = torch.cat([torch.isin(ids[row], close).nonzero()[:, 0], places(ids[row], header)]).sort().values
        for opening in (user, system):
            whole = set(places(ids[row], opening).tolist())
            begun = opening[:-1] if blank and opening[-1:] == blank else opening
            for at in places(ids[row], begun).tolist():
                first = at + len(opening if at in whole else begun)
                later = ends[ends >= first]
                last = int(later[0]) if len(later) else end
                if opening == user or ids[row, first:last].tolist() != default:
                    read[row, first:last] = True
        if not bool((read[row] & real[row]).any()):
            read[row] = True
    return read & real
