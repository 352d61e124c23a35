"""One `generate` call: what its caller gave, and the texts it goes on from, each with a gate of its own.

Knows the arguments of `generate`, and refuses those under which no adapter can answer. Knows no layers.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from smartmops.attention.context import ForwardContext
from smartmops.checks.errors import AdapterError

from . import packing, reading

# Of the thread that generates, so that calls at once do not meet.
running: contextvars.ContextVar[Call | None] = contextvars.ContextVar("mops_call", default=None)


class Told(NamedTuple):
    """What a caller tells the gate; None: nothing."""

    mask: Any = None  # what it reads
    embedding: Any = None  # read instead
    weights: Any = None  # of each expert, instead of its own

    @classmethod
    def taken(cls, kwargs: dict[str, Any]) -> Told:
        """Off the keywords of a call."""
        return cls(*(kwargs.pop(f"gate_{name}", None) for name in cls._fields))

    def each(self, change: Callable[[Tensor], Tensor]) -> Told:
        """What there is, changed."""
        return Told(*(None if given is None else change(given) for given in self))


@dataclass
class Text:
    """A prompt that a call goes on from: its gate is read from the first pass over it and kept, cache or no cache."""

    prompt: Tensor | None  # ids or embeddings; what a first pass holds beyond them was guessed, by lookup or a helper
    own: bool  # False: what guidance compares the caller's prompt with
    context: ForwardContext | None = None
    once: bool = False  # the first pass is the bare base's own, and gates read it as it goes by

    @property
    def length(self) -> int | None:
        """Tokens of a row."""
        return None if self.prompt is None else int(self.prompt.shape[1])

    def begins(self, inputs: Tensor) -> bool:
        """Whether a pass is over this text: its rows may be repeated, those of one beside each other, and go on."""
        if self.prompt is None or inputs.dim() != self.prompt.dim() or len(inputs) % len(self.prompt):
            return False
        rows = self.prompt.repeat_interleave(len(inputs) // len(self.prompt), 0).to(inputs.device)
        return torch.equal(inputs[:, : rows.shape[1]], rows)


@dataclass
class Call:
    """What the caller of `generate` gave for the gate, and the texts of the call, the caller's own first."""

    engine: Any
    told: Told
    attended: Tensor | None  # as the caller gave it: `generate` may turn it into a 4-D mask before we see it
    ids: Tensor | None  # the same, also where embeddings stand for them
    texts: list[Text] = field(default_factory=list)
    now: Text = field(init=False)  # the text of the pass that runs

    def __post_init__(self) -> None:
        self.now = self.texts[0]

    @classmethod
    def of(cls, engine: Any, given: Mapping[str, Any], told: Told) -> Call:
        """By what `generate` was called with, by name, and what the gate is told."""
        ids = next((each for each in (given.get("inputs"), given.get("input_ids")) if isinstance(each, Tensor)), None)
        embeddings, other = given.get("inputs_embeds"), given.get("negative_prompt_ids")
        prompt = next((each for each in (embeddings, ids) if isinstance(each, Tensor) and each.dim() > 1), None)
        texts = [Text(prompt, True)] + ([] if other is None else [Text(other, False)])
        return cls(engine, told, given.get("attention_mask"), ids, texts)

    def begin(self, inputs: Tensor) -> Text:
        """The text of a pass that has no cache of an earlier one; the first pass is over the caller's own."""
        first, found = self.texts[0], [text for text in self.texts if text.begins(inputs)]
        if found:
            self.now = max(found, key=lambda text: text.length or 0)
        elif first.context is None:
            self.now, first.prompt = first, inputs  # `generate` made a prompt, or changed its end (token healing)
        else:
            self.now = Text(inputs, False)
            self.texts.append(self.now)
        return self.now

    def ids_of(self, inputs: Tensor) -> Tensor | None:
        """The ids behind embeddings, where the caller gave both."""
        if not self.now.own or self.ids is None or self.ids.dim() != 2 or self.ids.shape[1] != inputs.shape[1]:
            return None
        return self.ids.repeat_interleave(len(inputs) // len(self.ids), 0)


def named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate` call by their names, however they were given."""
    bound = inspect.signature(type(model).generate).bind(model, *args, **kwargs).arguments
    return {**bound, **bound.pop("kwargs", {})}


def refuse(given: Mapping[str, Any], model: Any) -> None:
    """Refuse what no gate can serve, wherever it is set.

    Raises:
        AdapterError: such an argument is set; the message says why and what to do instead.
    """
    places = [given.get("generation_config"), getattr(model, "generation_config", None)]
    for name, why in WITHOUT.items():
        found = [given.get(name), *(getattr(place, name, None) for place in places)]
        value = next((each for each in found if each is not None), None)
        if value is not None and (name != "cache_implementation" or value == "paged"):
            raise AdapterError(f"{name}={value!r}: {why}")


FURTHER = ("open a further answer, and past_key_values were read for what stood before it: each answer has a gate of "
           "its own, so give the whole conversation to generate, or start from an empty cache")  # fmt: skip
UNREAD = ("go on after past_key_values, and the gate has read what these hold alone: give the whole text to generate, "
          "or start from an empty cache")  # fmt: skip

CROPPED = ("come where past_key_values were cropped, and the gate has read other tokens there, or more: give the whole "
           "text to generate, or start from an empty cache")  # fmt: skip
FOLLOWED = ("tokens came behind past_key_values, and the gate has read what these held at first alone: nothing tells "
            "this adapter where an answer begins, so if they are part of the prompt, give all of it in one pass, or to "
            "generate")  # fmt: skip


def start_over(given: Mapping[str, Any], headers: Sequence[Sequence[int]], told: Told) -> None:
    """Empty the caller's cache where the gate would read otherwise than it has: it reads all that is there now.

    So it does where a further answer begins, for each has a gate of its own; where no header of answers is known, where
    more follows than the one token that was generated last; where the cache was cropped, and other tokens come than it
    has read there; and where the caller tells the gate something.

    Args:
        given: The arguments of `generate`; its cache was filled under an adapter.
        headers: Token ids that open an answer, if the adapter knows any.
        told: What the caller tells the gate.

    Raises:
        AdapterError: the ids are not those of the whole text, or the cache cannot be emptied.
    """
    cache = given["past_key_values"]
    past = int(cache.get_seq_length())
    ids = next((each for name in ("input_ids", "inputs") if isinstance(each := given.get(name), Tensor)), None)
    if not past or ids is None or ids.dim() != 2:
        refuse_told(told, past)
        return
    whole = ids.shape[1] > past
    seen = past if whole else 0
    further = reading.opens_answer(ids, headers, seen) if headers else ids.shape[1] - seen > 1
    text = cache.mops.text
    other = text is not None and past < text.shape[1] and not reading.comes_again(text, ids[:, seen:], past)
    if not further and not other and all(each is None for each in told):
        return
    if whole:
        cache.reset()
        del cache.mops
    if not whole or cache.get_seq_length():
        raise AdapterError(f"input_ids {CROPPED if other else FURTHER if headers else UNREAD}")


def refuse_told(told: Told, past: int) -> None:
    """Refuse what a gate is told after it has read.

    Raises:
        AdapterError: it is told something, and a cache holds tokens already.
    """
    name = next((name for name, value in zip(Told._fields, told, strict=True) if value is not None), None)
    if past and name is not None:
        raise AdapterError(f"gate_{name} comes with past_key_values of {past} tokens, for which the gate was read "
                           "already: give it with the first tokens, or to generate with the whole text")  # fmt: skip


def refuse_unread(kwargs: Mapping[str, Any]) -> None:
    """Refuse keywords of a pass that would go unread, or be read by some layers alone.

    Raises:
        AdapterError: there is such a keyword.
    """
    if kwargs.get("is_causal") is False:
        raise AdapterError("is_causal=False lets tokens see later ones, and the gate would read the answer: leave it "
                           "unset, or switch the adapter off with disable_adapter()")  # fmt: skip
    if unknown := sorted(name for name in kwargs if name.startswith("gate_")):
        raise AdapterError(f"{unknown[0]} is no argument of the gate: choose gate_mask, gate_embedding or gate_weights")
    bounds, examples = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    several = examples is not None and bool((examples != examples.reshape(-1)[0]).any())
    if several or (bounds is not None and bounds.numel() > 2):
        raise AdapterError(f"{'seq_idx' if several else 'cu_seq_lens_q'} says that rows hold several examples, so "
                           f"{packing.WHY} (padding_free) off")  # fmt: skip


BATCHING_CALLS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
BATCHING = ("continuous batching lays many texts into one row, and each needs a gate of its own: call generate with a "
            "padded batch, or take the adapter off with unload()")  # fmt: skip
WITHOUT = {
    "prefill_chunk_size": "the gate must read the whole instruction at once: leave it unset",
    "assistant_early_exit": "a draft by the first layers alone would miss the experts above them: leave it unset, or "
    "give an assistant_model",
    "cache_implementation": BATCHING,
}


def refuse_batching(name: str, *_: Any, **__: Any) -> NoReturn:
    """Stands in for a way into continuous batching, which an attached attention cannot be part of.

    Raises:
        AdapterError: always.
    """
    raise AdapterError(f"{name}: {BATCHING}")
