"""The token ids that a chat template writes around what user and system say: what a gate must not read. No models."""

from __future__ import annotations

from .parts import ids_of, shared
from .template import Chat, Template


def gate_frame(template: Template) -> dict[str, list[int]] | None:
    """What opens a user's and a system's turn, tokens that end one, and the system's words that a template adds itself.

    None for a plain frame, and where a template opens turns without a token of its own: then the gate is told what to
    read by `gate_mask`, or reads everything.
    """
    if not isinstance(template, Chat):
        return None
    asked = _before(template, ["user"])
    user = _opening(template, asked, _before(template, ["user", "assistant", "user"]))
    if not user:
        return None
    special = {*template.tokenizer.all_special_ids, *template.tokenizer.added_tokens_decoder}
    frame = {"user": user, "header": list(template.header_ids), "close": sorted(special), "system": []}
    frame["default_system"] = []
    # A turn that begins with blanks of its own: tokenizers make one token of them and the blank that opens it.
    frame["blank"] = [user[-1]] if len(user) > 1 and not template.tokenizer.decode(user[-1:]).strip() else []
    if template.takes_system:
        told = _before(template, ["system"])
        frame["system"] = _opening(template, told, told)
        if frame["system"] and (at := _find(asked, frame["system"])) is not None:
            rest = asked[at + len(frame["system"]) :]
            ends = [i for i, token in enumerate(rest) if token in special]
            frame["default_system"] = rest[: ends[0]] if ends else []
    return frame


def _before(template: Chat, roles: list[str]) -> list[int]:
    """Tokens before what the last of these roles says."""
    mark = "0of4711"
    messages = [{"role": role, "content": f"{number}x" if number < len(roles) - 1 else mark}
                for number, role in enumerate(roles)]  # fmt: skip
    if roles == ["system"]:
        messages.append({"role": "user", "content": "x"})
    return ids_of(template.tokenizer, [template.written(messages).partition(mark)[0]])[0]


def _opening(template: Chat, first: list[int], later: list[int]) -> list[int]:
    """What both end with, from the first special token behind the end of an earlier turn on."""
    special = {*template.tokenizer.all_special_ids, *template.tokenizer.added_tokens_decoder}
    alike = first[len(first) - shared(first[::-1], later[::-1]) :]
    ends = [i for i, token in enumerate(alike) if token in template.end_ids]
    alike = alike[ends[-1] + 1 :] if ends else alike
    starts = [i for i, token in enumerate(alike) if token in special]
    return alike[starts[0] :] if starts else []


def _find(ids: list[int], pattern: list[int]) -> int | None:
    found = (i for i in range(len(ids) - len(pattern) + 1) if ids[i : i + len(pattern)] == pattern)
    return next(found, None)
