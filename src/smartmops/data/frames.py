"""The token ids that a chat template writes around what user and system say: what a gate must not read. No models."""

from __future__ import annotations

from smartmops.data.parts import ids_of
from smartmops.data.template import Chat, Template


def gate_frame(template: Template) -> dict[str, list[int]] | None:
    """What opens a user's and a system's turn, what closes one, and the system's words that a template adds by itself.

    None for a plain frame, and where a template opens turns without a token of its own: then the gate is told what to
    read by `gate_mask`, or reads everything.
    """
    if not isinstance(template, Chat) or not template.end_ids:
        return None
    asked, before = _before(template, ["user"]), _before(template, ["user", "assistant", "user"])
    user = _opening(template, asked)
    if not user or _opening(template, before) != user:
        return None
    frame = {"user": user, "close": list(template.end_ids), "system": [], "default_system": []}
    if template._takes_system:
        told = _before(template, ["system"])
        frame["system"] = _opening(template, told)
        if frame["system"] and (at := _find(asked, frame["system"])) is not None:
            rest = asked[at + len(frame["system"]) :]
            if template.end_ids[0] in rest:
                frame["default_system"] = rest[: rest.index(template.end_ids[0])]
    return frame


def _before(template: Chat, roles: list[str]) -> list[int]:
    """Tokens before what the last of these roles says."""
    mark = "0of4711"
    messages = [{"role": role, "content": f"{number}x" if number < len(roles) - 1 else mark}
                for number, role in enumerate(roles)]  # fmt: skip
    if roles == ["system"]:
        messages.append({"role": "user", "content": "x"})
    return ids_of(template.tokenizer, [template._written(messages).partition(mark)[0]])[0]


def _opening(template: Chat, ids: list[int]) -> list[int]:
    """The tokens from the last special one on."""
    special = {*template.tokenizer.all_special_ids, *template.tokenizer.added_tokens_decoder}
    at = [i for i, token in enumerate(ids) if token in special]
    return ids[at[-1] :] if at else []


def _find(ids: list[int], pattern: list[int]) -> int | None:
    found = (i for i in range(len(ids) - len(pattern) + 1) if ids[i : i + len(pattern)] == pattern)
    return next(found, None)
