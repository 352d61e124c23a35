"""What a gate reads of bare token ids is what training marked, turn by turn, without being told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chats import CHATS, chatting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smartmops.calls.reading import answer_starts, framed
from smartmops.rows.example import Example
from smartmops.tokens.batches import encode, prompts
from smartmops.tokens.frames import gate_frame
from smartmops.tokens.template import Template

Make = Callable[..., PreTrainedTokenizerFast]
FRAMED = tuple(CHATS)
EXAMPLES = [
    Example("Name it.", "", "The answer."),
    Example("Name this", "A text of more words.", "The response is this."),
    Example("And that?", "", "Yes.", history=(("Name it.", "The answer of this."),)),
]


@pytest.mark.parametrize("name", FRAMED)
def test_the_gate_finds_the_users_words_by_the_frame_alone(make_tokenizer: Make, name: str) -> None:
    template = Template.of("chat", chatting(make_tokenizer, CHATS[name]))
    frame = gate_frame(template)
    assert frame is not None
    for example in EXAMPLES:
        batch = prompts([example], template.tokenizer, template=template)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        found, want = framed(ids, real, frame), batch["gate_mask"].bool()
        words = [template.tokenizer.decode(ids[0][mask[0]]).split() for mask in (found, want)]
        assert words[0] == words[1] and words[1]


def test_a_system_turn_is_read_where_it_is_not_the_templates_own(make_tokenizer: Make) -> None:
    template = Template.of("chat", chatting(make_tokenizer, CHATS["chatml"]))
    frame = gate_frame(template)
    assert frame is not None
    for system, read in (("", False), ("Answer in rhyme.", True)):
        batch = prompts([Example("Name it.", "", "It.", system=system)], template.tokenizer, template=template)
        found = framed(batch["input_ids"], batch["attention_mask"].bool(), frame)
        text = template.tokenizer.decode(batch["input_ids"][0][found[0]])
        assert ("rhyme" in text) == read and "You help" not in text and "Name it." in text


def test_the_templates_own_system_prompt_is_nobodys_words_whoever_writes_it(make_tokenizer: Make) -> None:
    template = Template.of("chat", chatting(make_tokenizer, CHATS["chatml"]))
    silent, said = (prompts([Example("Name it.", "", "It.", system=system)], template.tokenizer, template=template)
                    for system in ("", "You help."))  # fmt: skip
    assert all(torch.equal(value, said[name]) for name, value in silent.items())
    found = framed(said["input_ids"], said["attention_mask"].bool(), gate_frame(template) or {})
    assert "You help" not in template.tokenizer.decode(said["input_ids"][0][found[0]])


def test_a_row_of_another_template_is_read_whole(make_tokenizer: Make) -> None:
    template = Template.of("chat", chatting(make_tokenizer, CHATS["chatml"]))
    ids = torch.tensor([template.tokenizer("No turns here.")["input_ids"]])
    real = torch.ones_like(ids, dtype=torch.bool)
    assert bool(framed(ids, real, gate_frame(template) or {}).all())


def test_a_plain_frame_and_one_without_tokens_of_its_own_have_none(make_tokenizer: Make) -> None:
    assert gate_frame(Template.of("plain", make_tokenizer())) is None
    words = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:{% else %} {{ m.content }}<eos>{% endif %}"
    assert gate_frame(Template.of("chat", chatting(make_tokenizer, words + "{% endfor %}"))) is None


@pytest.mark.parametrize("name", FRAMED)
def test_an_answer_starts_at_its_header_with_labels_and_without(make_tokenizer: Make, name: str) -> None:
    template = Template.of("chat", chatting(make_tokenizer, CHATS[name]))
    for example in EXAMPLES:
        row = encode(example, template.tokenizer, 400, template)
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        first = next(i for i, label in enumerate(row.labels) if label != -100)
        real = torch.ones_like(ids, dtype=torch.bool)
        header = template.header_ids
        assert answer_starts(ids, real, labels, header).item() == first - row.header
        alone = ids[:, :first]  # a prompt that is about to be answered
        assert answer_starts(alone, real[:, :first], None, header).item() == first - row.header
        assert answer_starts(ids, real, None, header).item() == first - row.header


BLANKS = st.lists(st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "\r\n", "\u00a0", "Hello", " world", "?", "user", "a"]),
                  min_size=1, max_size=6).map("".join).filter(str.strip)  # fmt: skip


@pytest.fixture(scope="module")
def chatted(smollm2: Path) -> Template:
    return Template.of("chat", AutoTokenizer.from_pretrained(smollm2))


@pytest.mark.smollm2
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=BLANKS, system=st.one_of(st.just(""), BLANKS), before=st.one_of(st.none(), BLANKS))
def test_blanks_that_merge_with_what_opens_a_turn_hide_no_turn(
    chatted: Template, question: str, system: str, before: str | None
) -> None:
    history = () if before is None else ((before, before),)
    batch = prompts([Example(question, "", "x", system=system, history=history)], chatted.tokenizer, template=chatted)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    start = answer_starts(ids, real, None, chatted.header_ids)
    found = framed(ids, real & (torch.arange(ids.shape[1]) < start[:, None]), gate_frame(chatted) or {})
    assert found.long().tolist() == batch["gate_mask"].tolist()
