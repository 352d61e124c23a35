"""Examples of different lengths laid end to end, without padding. Knows lengths, labels and nats; knows no prompts.

Linear layers see real tokens only; attention alone works on padded rows, one for each segment, so no token ever sees
another segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from smartmops.checks.errors import AdapterError

IGNORED = -100  # label of a token without loss
CHUNK = 2**24  # logits that exist at once


def text_positions(real: Shaped[Tensor, "rows seq"]) -> Int[Tensor, "rows seq"]:
    """Positions in padded rows, counted over real tokens (where `real` is not 0); on leading padding 0."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)


def side_by_side(
    rows: Sequence[Sequence[Float[Tensor, "layers kv_heads _ width"]]],
) -> Float[Tensor, "layers rows kv_heads longest width"]:
    """Columns of each row, given in pieces one after the other, padded on the right; one row at least has a piece."""
    some = next(piece for pieces in rows for piece in pieces)
    longest = max(sum(piece.shape[2] for piece in pieces) for pieces in rows)
    table = some.new_zeros(len(some), len(rows), some.shape[1], max(longest, 1), some.shape[3])
    for row, pieces in enumerate(rows):
        ends = accumulate(piece.shape[2] for piece in pieces)
        for piece, end in zip(pieces, ends, strict=True):
            table[:, row, :, end - piece.shape[2] : end] = piece
    return table


class _Spread(torch.autograd.Function):
    """Rows to their places in a larger, zero-filled table; its backward is `_Gather`'s forward, and the reverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.index = index
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Gather.apply(grads[0], ctx.index), None, None  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.size = index, len(table)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Spread.apply(grads[0], ctx.index, ctx.size), None  # type: ignore[no-untyped-call]


@dataclass
class Segments:
    """Where each example lies in a row of `sum(lengths)` tokens."""

    lengths: list[int]
    device: torch.device
    offsets: Int[Tensor, " segments"] | None = None  # position of each segment's first token; None: 0
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.longest = max(self.lengths)
        sizes = torch.tensor(self.lengths)
        self.of = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.device)  # segment of each token
        within = torch.cat([torch.arange(n) for n in self.lengths]).to(self.device)
        self.index = self.of * self.longest + within  # of each token in the padded table
        self.positions = within if self.offsets is None else within + self.offsets[self.of]

    def inputs(self) -> dict[str, Tensor]:
        """Positions for a backbone, and a mask: 4-D, so that none is made, and never read."""
        return {"attention_mask": torch.zeros(1, 1, 1, 1, device=self.device), "position_ids": self.positions[None]}

    def slices(self) -> list[slice]:
        """Each segment's tokens in the row."""
        ends = list(accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def pad(self, x: Float[Tensor, "1 heads tokens head"]) -> Float[Tensor, "segments heads longest head"]:
        """Padded on the right, where causality hides it."""
        count = len(self.lengths)
        table: Tensor = _Spread.apply(x[0].transpose(0, 1), self.index, count * self.longest)  # type: ignore[no-untyped-call]
        return table.view(count, self.longest, *table.shape[1:]).transpose(1, 2)

    def unpad(self, x: Float[Tensor, "segments longest heads head"]) -> Float[Tensor, "1 tokens heads head"]:
        """Real tokens only, end to end again."""
        found: Tensor = _Gather.apply(x.flatten(0, 1), self.index)  # type: ignore[no-untyped-call]
        return found[None]

    def causal(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "1 1 longest longest"]:
        """Added to logits: each token sees itself and what came before, in a sliding window where there is one."""
        key = ("causal", window, dtype)
        if key not in self.masks:
            at = torch.arange(self.longest, device=self.device)
            gone = at[None, :] > at[:, None]
            if window is not None:
                gone |= at[:, None] - at[None, :] >= window
            full = torch.zeros(gone.shape, dtype=dtype, device=self.device)
            self.masks[key] = full.masked_fill(gone, torch.finfo(dtype).min)[None, None]
        return self.masks[key]

    def later(self, own: int, before: int) -> Float[Tensor, "own keys"]:
        """Added to the logits of `own` tokens over themselves and `before` earlier ones: -inf on what comes later."""
        key = ("later", own, before)
        if key not in self.masks:
            full = torch.full((own, own), -torch.inf, device=self.device).triu(1)
            self.masks[key] = F.pad(full, (before, 0))
        return self.masks[key]

    def before(
        self, lengths: Int[Tensor, " segments"], longest: int, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "segments 1 queries before"]:
        """Added to logits over the `lengths` tokens before each segment, padded on the right to `longest`."""
        key = ("before", window, dtype)
        if key not in self.masks:
            at = torch.arange(longest, device=self.device)
            gone = (at >= lengths[:, None])[:, None, :].expand(-1, self.longest, -1)
            if window is not None:
                own = lengths[:, None] + torch.arange(self.longest, device=self.device)
                gone = gone | (own[:, :, None] - at >= window)
            full = torch.zeros(gone.shape, dtype=dtype, device=self.device)
            self.masks[key] = full.masked_fill(gone, torch.finfo(dtype).min)[:, None]
        return self.masks[key]

    def mean(
        self, hidden: Float[Tensor, "tokens hidden"], where: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "segments hidden"]:
        """The mean over the tokens `where` of each segment, in float32; over all of a segment that has none there."""
        counts = torch.zeros(len(self.lengths), device=self.device).index_add_(0, self.of, where.float())
        weight = torch.where((counts == 0)[self.of], 1.0, where.float())
        total = torch.zeros(len(self.lengths), hidden.shape[-1], device=self.device)
        total.index_add_(0, self.of, hidden.float() * weight[:, None])
        return total / torch.zeros_like(counts).index_add_(0, self.of, weight)[:, None]


@dataclass
class Packed:
    """A batch laid end to end: tokens, or the hidden states that enter the injection layer for them.

    With `past_keys` and `past_values` the tokens are headers and answers alone, and these are what the bare base made
    of the text before them, in the layers from the injection layer up.
    """

    lengths: Int[Tensor, " segments"]
    labels: Int[Tensor, " tokens"]  # IGNORED but on responses
    input_ids: Int[Tensor, " tokens"] | None = None
    hidden: Float[Tensor, "tokens hidden"] | None = None
    pooled: Float[Tensor, "segments inputs"] | None = None  # what the gate reads, before standardisation
    gate_mask: Bool[Tensor, " tokens"] | None = None  # what the gate may read of the text before the answer; None: all
    headers: Int[Tensor, " segments"] | None = None  # tokens right before the answer that open it; None: 1
    past_keys: Float[Tensor, "layers segments kv_heads longest key"] | None = None
    past_values: Float[Tensor, "layers segments kv_heads longest value"] | None = None
    past_lengths: Int[Tensor, " segments"] | None = None

    @classmethod
    def of(cls, batch: Packed | Mapping[str, Tensor]) -> Packed:
        """From itself or from what a collator made.

        Raises:
            AdapterError: lengths and tokens do not match, or there are neither tokens nor hidden states.
        """
        packed = batch if isinstance(batch, cls) else cls(**batch)  # type: ignore[arg-type]
        tokens = packed.input_ids if packed.hidden is None else packed.hidden
        if tokens is None:
            raise AdapterError("a packed batch holds neither input_ids nor hidden: give one of them")
        if len(packed.labels) != len(tokens) or int(packed.lengths.sum()) != len(tokens):
            raise AdapterError(
                f"a packed batch of {len(tokens)} tokens has {len(packed.labels)} labels and lengths that add up to "
                f"{int(packed.lengths.sum())}: all three must agree"
            )
        return packed

    def rows(self, values: Shaped[Tensor, " tokens"], fill: int) -> Shaped[Tensor, "segments longest"]:
        """Something of each token, a row for each segment, with `fill` behind it."""
        parts = list(torch.split(values, self.lengths.tolist()))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    def starts(self) -> Int[Tensor, " segments"]:
        """Of each segment, the number of tokens before the answer's header.

        Raises:
            AdapterError: a segment has no label, or one on its first token.
        """
        firsts = []
        for labels in torch.split(self.labels, self.lengths.tolist()):
            at = (labels != IGNORED).nonzero()[:, 0]
            if not len(at) or int(at[0]) == 0:
                raise AdapterError("an example has no answer (no label), or nothing before it: experts that answers "
                                   "alone see need both")  # fmt: skip
            firsts.append(int(at[0]))
        first = torch.tensor(firsts, device=self.labels.device)
        headers = torch.ones_like(first) if self.headers is None else self.headers.to(first.device).clamp(min=1)
        return (first - headers).clamp(min=0)

    def targets(self) -> tuple[Int[Tensor, " predicted"], Int[Tensor, " predicted"]]:
        """Positions whose next token has a label, and that label; a segment never predicts the next one's first."""
        following = torch.full_like(self.labels, IGNORED)
        following[:-1] = self.labels[1:]
        following[self.lengths.cumsum(0) - 1] = IGNORED
        at = (following != IGNORED).nonzero()[:, 0]
        return at, following[at]


class _Given(torch.autograd.Function):
    """A loss whose gradients were worked out together with it: first those of the inputs, then the inputs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given[: len(given) // 2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = [grads[0] * gradient for gradient in ctx.saved_tensors]
        return None, *[None] * len(found), *found


def mean_loss(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "predicted hidden"], targets: Int[Tensor, " predicted"],
    vocabulary: int, trained: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:  # fmt: skip
    """Mean nats, a chunk of logits at a time: each chunk's gradient is taken at once.

    `trained` are the head's own parameters that want a gradient.
    """
    wanted = [each for each in (hidden, *trained) if each.requires_grad and torch.is_grad_enabled()]
    gradients, total = [torch.zeros_like(each) for each in wanted], torch.zeros((), device=hidden.device)
    for rows in _chunks(len(hidden), vocabulary):
        part = hidden[rows].detach().requires_grad_(True)
        with torch.enable_grad():
            nats = F.cross_entropy(head(part).float(), targets[rows], reduction="sum")
        of = [part if each is hidden else each for each in wanted]
        for each, whole, gradient in zip(wanted, gradients, torch.autograd.grad(nats, of) if of else (), strict=True):
            if each is hidden:
                whole[rows] = gradient
            else:
                whole += gradient
        total += nats.detach()
    count = max(len(targets), 1)
    if not wanted:
        return total / count
    loss: Tensor = _Given.apply(total / count, *(each / count for each in gradients), *wanted)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def each_nats(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "predicted hidden"], targets: Int[Tensor, " predicted"],
    vocabulary: int,
) -> Float[Tensor, " predicted"]:  # fmt: skip
    """Nats of each target token."""
    chunks = _chunks(len(hidden), vocabulary)
    return torch.cat([F.cross_entropy(head(hidden[r]).float(), targets[r], reduction="none") for r in chunks])


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK // vocabulary)
    return [slice(start, start + size) for start in range(0, count, size)] or [slice(0, 0)]
