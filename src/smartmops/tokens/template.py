"""How a model is spoken to: its tokenizer's chat template, a template of the user's, or a plain frame.

Knows templates and tokenizers; knows no models. What is rendered here is what is trained, counted and generated from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from smartmops.checks.errors import BaseModelError, ConfigError
from smartmops.checks.folders import as_path
from smartmops.rows.example import Example, opened

from .parts import Part, Prompt, a_tokenizer, holds, ids_of, shared, span, tokens, whole_after

CHOICES = "auto, chat, plain or a file with a Jinja template"
FILE = "chat_template.jinja"  # what transformers calls it, beside a tokenizer
# A template that asks for the day would make a run depend on the day it is made on: this is what Llama's falls back to.
FIXED = {"date_string": "26 Jul 2024", "enable_thinking": False}
SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
RESPONSE = "### Response:\n"
Turns = Sequence[Example]  # one conversation, the last one being the turn that is asked


def user_text(example: Example) -> str:
    """What the user says: the instruction, then the context."""
    return "\n\n".join(filter(None, (example.instruction, example.context)))


def prompt_text(example: Example) -> str:
    """Everything before the response in the plain frame."""
    return _framed(example).text


@dataclass(frozen=True)
class Rendered:
    """What a model reads."""

    text: str
    input_ids: list[int]
    gate_mask: list[int] | None  # 1 on the tokens that a gate may read


def render(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[Mapping[str, str]], template: str = "auto"
) -> Rendered:
    """Text and tokens that training or generation would use.

    Args:
        tokenizer: The model's.
        text: A question, or messages with `role` and `content`. Where they end with the user, the assistant's turn is
            opened, and generation would go on from there; where they end with the assistant, this is trained on.
        template: `auto`, `chat`, `plain` or a file.

    Raises:
        ConfigError: as `Template.of`, or the messages are no conversation.
    """
    chosen = Template.of(template, a_tokenizer(tokenizer))
    system, history, question = opened([{"role": "user", "content": text}] if isinstance(text, str) else text)
    *earlier, (user, answer) = history if question is None else (*history, (question, ""))
    turns = Example(user, "", answer, system=system, history=tuple(earlier)).turns()
    words = chosen.words(chosen.parts(turns))
    if question is not None:
        (prompt,) = chosen.prompts([turns])
        return Rendered(words, prompt.input_ids, prompt.gate_mask)
    ((prompt, ids),) = chosen.rows([turns])
    mask = None if prompt.gate_mask is None else prompt.gate_mask + [0] * len(ids)
    return Rendered(words + chosen.answer(turns, words) + chosen.end, prompt.input_ids + ids, mask)


class Template:
    """How text is rendered for one tokenizer. Made by `Template.of`.

    Attributes:
        name: `chat`, `plain` or the file.
        source: The Jinja text; None: the plain frame.
        tokenizer: Whose tokens these are.
        lead: Special tokens that start every text.
        end: The token that ends the assistant's turn, as text.
        end_ids: The same as a list of its id: what is learnt last, and what generation stops at.
        header_ids: Tokens that open the assistant's turn.
    """

    name = "plain"
    source: str | None = None
    lead: list[int]
    end: str
    end_ids: list[int]
    header_ids: list[int]

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
        """`auto` (the chat template where the tokenizer has one, else plain), `chat`, `plain` or a file.

        Raises:
            ConfigError: the tokenizer has no chat template, the file cannot be read, the template is no Jinja, or it
                does not say where the assistant's turn begins and ends.
        """
        if name == "plain" or (name == "auto" and not tokenizer.chat_template):
            return Plain(tokenizer)
        if name not in ("auto", "chat"):
            return Chat(tokenizer, read_template(name), name)
        if not tokenizer.chat_template:
            raise ConfigError(f"template='chat', but the model's {type(tokenizer).__name__} has no chat template: "
                              "choose plain, or give a file with one")  # fmt: skip
        return Chat(tokenizer, tokenizer.get_chat_template())

    def parts(self, turns: Turns) -> list[Part]:
        """Everything up to the answer of the last turn."""
        raise NotImplementedError

    def answer(self, turns: Turns, opened: str) -> str:
        """The answer of the last turn as it is written behind `opened`, without the token that ends it."""
        raise NotImplementedError

    def words(self, parts: Sequence[Part]) -> str:
        """All parts as one text."""
        texts = [part.text + (self.end if part.closed else "") for part in parts]
        return str(self.tokenizer.decode(self.lead)) + "".join(texts)

    def prompts(self, conversations: Sequence[Turns]) -> list[Prompt]:
        """Tokens up to the answer of each conversation's last turn."""
        return self._prompts([self.parts(turns) for turns in conversations])

    def rows(self, conversations: Sequence[Turns]) -> list[tuple[Prompt, list[int]]]:
        """`prompts`, each with the tokens of the answer and of its end."""
        every = [self.parts(turns) for turns in conversations]
        answers = [self.answer(turns, parts[-1].text) for turns, parts in zip(conversations, every, strict=True)]
        ended = [[*ids, *self.end_ids] for ids in ids_of(self.tokenizer, answers)]
        return list(zip(self._prompts(every), ended, strict=True))

    def count(self, turns: Turns) -> int:
        """How many tokens `prompts` makes of a conversation."""
        parts = self.parts(turns)
        ids = ids_of(self.tokenizer, [part.text for part in parts])
        return len(self.lead) + sum(map(len, ids)) + sum(part.closed for part in parts)

    def stops(self, model: Any) -> list[int]:
        """Tokens at which generation stops: the end of a turn, and what tokenizer and model stop at themselves."""
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found = [*self.end_ids, self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return sorted({token for token in found if token is not None})

    def _prompts(self, every: Sequence[Sequence[Part]]) -> list[Prompt]:
        found = iter(tokens(self.tokenizer, [part for parts in every for part in parts]))
        return [self._joined(parts, [next(found) for _ in parts]) for parts in every]

    def _joined(self, parts: Sequence[Part], found: Sequence[tuple[list[int], list[int]]]) -> Prompt:
        ids, mask = list(self.lead), [0] * len(self.lead)
        for part, (own, read) in zip(parts, found, strict=True):
            ids += [*own, *(self.end_ids if part.closed else [])]
            mask += [*read, *([0] * len(self.end_ids) if part.closed else [])]
        header = shared(ids[::-1], self.header_ids[::-1])
        if not any(mask):  # the user says nothing that is a token of its own: there must be something to read
            mask = [1] * len(ids)
        return Prompt(ids, mask if self.tokenizer.is_fast else None, header)


class Plain(Template):
    """Instruction, context and response under headings, each turn after the other; EOS ends a response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        empty = prompt_text(Example("", "", ""))
        whole = list(tokenizer(empty, verbose=False)["input_ids"])
        if whole[-1] == tokenizer.eos_token_id:
            whole.pop()  # some tokenizers end every text with it
        self.lead = whole[: len(whole) - len(ids_of(self.tokenizer, [empty])[0])]
        self.end = tokenizer.eos_token or ""
        self.end_ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        asked = prompt_text(Example("a", "", ""))
        self.header_ids = whole_after(self.tokenizer, asked, len(asked) - len(RESPONSE))

    def parts(self, turns: Turns) -> list[Part]:
        """A prompt for each turn, and between them the earlier answers."""
        system = turns[-1].system
        found = []
        for number, turn in enumerate(turns):
            found.append(_framed(turn, system if number == 0 else ""))
            if number < len(turns) - 1:
                found.append(Part(turn.response, closed=True))
        return found

    def answer(self, turns: Turns, opened: str) -> str:
        """The response, letter for letter.

        Raises:
            BaseModelError: the tokenizer has no EOS.
        """
        if not self.end_ids:
            raise BaseModelError(f"{type(self.tokenizer).__name__} has no EOS token, so no response would ever end: "
                                 "set tokenizer.eos_token")  # fmt: skip
        return turns[-1].response


class Chat(Template):
    """A chat template: instruction and context are the user's turn, the response is the assistant's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, name: str = "chat") -> None:
        super().__init__(tokenizer)
        _check_jinja(source, name)
        self.name, self.source, self.lead = name, source, []
        self._given = {**tokenizer.special_tokens_map, **FIXED}
        self._frames: dict[tuple[bool, int], list[str]] = {}
        self._own: dict[str, bool] = {}  # what the system may say -> whether the template writes that by itself
        said, told, answered = (_mark(number) for number in range(3))
        asked, reply = {"role": "user", "content": said}, {"role": "assistant", "content": answered}
        full, opening = self.written([asked, reply]), self.written([asked], opens=True)
        before, found, self._tail = full.partition(answered)
        common = before[: shared(before, opening)]
        if not found or said not in common:
            raise ConfigError(f"template {name!r} does not write a question and its answer as they stand, one behind "
                              f"the other ({_short(full)}): mend it, or choose template='plain'")  # fmt: skip
        self._thought = opening[len(common) :]  # what a template opens that answers to learn from do not have
        self._opens = common.partition(said)[2]  # the assistant's turn, and thoughts where all answers begin with some
        self.header_ids = self._header(common, self.written([asked]), said)
        self.end, self.end_ids, self._closing = self._ending()
        self.takes_system = self._knows_system(asked, told)

    def parts(self, turns: Turns) -> list[Part]:
        """One text, in which only what user and application wrote is their own."""
        messages = self._messages(turns)
        text = self._opened(messages)
        frame = self._frame(messages)
        spans, at = [], 0
        for number, message in enumerate(messages):
            at += len(frame[number])
            size = span(text, at, message["content"], frame[number + 1], message["role"] == "assistant")
            if size is None or not text.startswith(frame[0]):
                raise ConfigError(f"template {self.name!r} does not write {_short(message['content'])} as it stands, "
                                  "or writes around it what it does not write around other texts: choose another "
                                  "template or leave the example out")  # fmt: skip
            if message["role"] != "assistant":
                spans.append((at, at + size))
            at += size
        return [Part(text, tuple(spans))]

    def answer(self, turns: Turns, opened: str) -> str:
        """What the template adds to a prompt for the response.

        Raises:
            ConfigError: what it opened the turn with is gone once there is an answer, or not all of that is there.
        """
        response = turns[-1].response
        full = self.written([*self._messages(turns), {"role": "assistant", "content": response}])
        found = full[len(opened) : len(full) - len(self._tail)]
        if not full.startswith(opened) or not full.endswith(self._tail) or not holds(self._opens + found, response):
            raise ConfigError(f"template {self.name!r} writes another prompt, another answer or another end once the "
                              f"answer {_short(response)} is there: choose another template or leave the example "
                              "out")  # fmt: skip
        return found + self._closing

    def written(self, messages: Sequence[Mapping[str, str]], opens: bool = False) -> str:
        """Messages as the template writes them.

        Raises:
            ConfigError: it refuses them.
        """
        assert self.source is not None
        source = SAME_DAY + self.source if "strftime_now" in self.source else self.source
        try:
            found = render_jinja_template(
                [list(messages)], chat_template=source, add_generation_prompt=opens, **self._given
            )
            return str(found[0][0])
        except Exception as error:  # a template is somebody's program, and may fail in any way
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(f"template {self.name!r} refuses messages of {roles} ({error}): leave such turns out, or "
                              "choose template='plain'") from error  # fmt: skip

    def _opened(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self.written(messages, opens=True).removesuffix(self._thought)

    def _messages(self, turns: Turns) -> list[dict[str, str]]:
        """Without the last answer; what the system says goes to the user where the template knows no system."""
        system, found = turns[-1].system, []
        for number, turn in enumerate(turns):
            words = user_text(turn)
            if number == 0 and system and not self.takes_system:
                words = f"{system}\n\n{words}"
            found += [{"role": "user", "content": words}, {"role": "assistant", "content": turn.response}]
        leads = system and self.takes_system and not self._writes(system)
        return [*([{"role": "system", "content": system}] if leads else []), *found[:-1]]

    def _writes(self, system: str) -> bool:
        """Whether the template writes these words of the system's by itself, so that they are nobody's own."""
        if system not in self._own:
            asked = {"role": "user", "content": _mark(0)}
            self._own[system] = self.written([{"role": "system", "content": system}, asked]) == self.written([asked])
        return self._own[system]

    def _frame(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """What the template writes before, between and behind as many messages, whatever they say."""
        key = (messages[0]["role"] == "system", len(messages))
        if key not in self._frames:
            marks = [_mark(number) for number in range(len(messages))]
            text = self._opened([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
            pieces = []
            for mark in marks:
                piece, found, text = text.partition(mark)
                if not found:
                    raise ConfigError(f"template {self.name!r} does not write all turns of a conversation of "
                                      f"{len(messages)} as they stand, one after the other: give it fewer turns, or "
                                      "choose template='plain'")  # fmt: skip
                pieces.append(piece)
            self._frames[key] = [*pieces, text]
        return self._frames[key]

    def _header(self, opened: str, closed: str, said: str) -> list[int]:
        """Tokens that only the opened text has; behind the user's words where a template opens nothing by itself."""
        with_it, without = ids_of(self.tokenizer, [opened, closed])
        return with_it[shared(with_it, without) :] or whole_after(
            self.tokenizer, opened, opened.index(said) + len(said)
        )

    def _ending(self) -> tuple[str, list[int], str]:
        """The first special token behind an answer, its id, and what stands between the answer and it."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        found = [token for token in ids_of(self.tokenizer, [self._tail])[0] if token in special]
        if not found:
            raise ConfigError(f"template {self.name!r} does not end a turn: behind an answer it writes {self._tail!r}, "
                              "which holds no special token, so generation would not know where to stop: end the "
                              "assistant's turn with one, or choose template='plain'")  # fmt: skip
        end = str(self.tokenizer.convert_ids_to_tokens(found[0]))
        return end, [found[0]], self._tail.partition(end)[0]

    def _knows_system(self, asked: Mapping[str, str], told: str) -> bool:
        try:
            return told in self.written([{"role": "system", "content": told}, asked])
        except ValueError:
            return False


def check_template(name: str) -> None:
    """What can be known of a template before there is a tokenizer.

    Raises:
        ConfigError: the file cannot be read, or is no Jinja.
    """
    if name not in ("auto", "chat", "plain"):
        _check_jinja(read_template(name), name)


def _check_jinja(source: str, name: str) -> None:
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=source)
    except TemplateSyntaxError as error:
        raise ConfigError(f"template {name!r}, line {error.lineno}: no Jinja ({error.message}): mend it, or choose "
                          "template='plain'") from error  # fmt: skip
    except Exception:
        return  # it refuses this one conversation, or asks for what there is only beside a tokenizer


def read_template(file: str | Path) -> str:
    """The text of a template in a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return as_path("template", file, CHOICES).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"template={str(file)!r} cannot be read ({reason}): choose {CHOICES}") from error


def _framed(example: Example, system: str = "") -> Part:
    text, own = "", []
    for head, words in (("", system), ("### Instruction:\n", example.instruction), ("### Context:\n", example.context)):
        if not words and head != "### Instruction:\n":
            continue
        text += ("\n\n" if text else "") + head
        own.append((len(text), len(text) + len(words)))
        text += words
    return Part(f"{text}\n\n{RESPONSE}", tuple(own))


def _mark(number: int) -> str:
    """Words that no template knows."""
    return f"mark{number:04}of4711"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
