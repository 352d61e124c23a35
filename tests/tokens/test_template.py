"""Templates of all shapes: only the answer and its end are learnt, and what is asked is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chats import CHATML, CHATS, QWEN3, chatting
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

import smartmops
from smartmops.rows.example import Example
from smartmops.tokens.batches import IGNORED, Collator, Encoded, TooLong, encode, encode_all, few_shot, pack, prompts
from smartmops.tokens.template import Template, check_template, render, user_text

Make = Callable[..., Tokenizer]
words = st.text(st.characters(codec="utf-8"), max_size=20)
said = words.filter(lambda text: bool(text.strip()))
EXAMPLE = Example("Name it.", "A text about a cat.", "The cat")
examples = st.builds(
    Example, said, words, said, system=words, history=st.lists(st.tuples(said, said), max_size=2).map(tuple)
)


@pytest.fixture(scope="module", params=[*CHATS, "plain"])
def template(request: pytest.FixtureRequest, make_tokenizer: Make) -> Template:
    if request.param == "plain":
        return Template.of("plain", make_tokenizer())
    return Template.of("chat", chatting(make_tokenizer, CHATS[request.param]))


def parts(row: Encoded) -> tuple[list[int], list[int]]:
    learnt = [token for token in row.labels if token != IGNORED]
    return row.input_ids[: len(row.labels) - len(learnt)], learnt


def read(row: Encoded, tokenizer: Tokenizer) -> str:
    assert row.gate_mask is not None
    return tokenizer.decode([token for token, mask in zip(row.input_ids, row.gate_mask, strict=True) if mask])


# ---------------------------------------------------------------------------------------------- what is learnt and read
@settings(max_examples=12)
@given(examples)
def test_the_answer_and_its_end_are_learnt_and_nothing_else(template: Template, example: Example) -> None:
    tokenizer = template.tokenizer
    prompt, learnt = parts(encode(example, tokenizer, 10_000, template))
    assert learnt[-1:] == template.end_ids and not set(template.end_ids) & set(learnt[:-1])
    assert tokenizer.decode(learnt[:-1]).strip() == example.response.strip()
    assert prompts([example], tokenizer, None, template)["input_ids"][0].tolist() == prompt


@settings(max_examples=12)
@given(examples, said)
def test_the_gate_reads_the_users_own_text_whatever_is_answered(
    template: Template, example: Example, other: str
) -> None:
    tokenizer = template.tokenizer
    row, same = (encode(each, tokenizer, 10_000, template) for each in (example, replace(example, response=other)))
    assert row.gate_mask is not None and same.gate_mask is not None
    prompt, _ = parts(row)
    assert not any(row.gate_mask[len(prompt) :])
    assert same.gate_mask[: len(prompt)] == row.gate_mask[: len(prompt)]
    batch = prompts([example], tokenizer, None, template)
    assert batch["gate_mask"][0].tolist() == row.gate_mask[: len(prompt)]
    texts = [example.system, *(user for user, _ in example.history)]
    texts += [example.instruction, example.context] if template.source is None else [user_text(example)]
    if template.source is None and not any(texts):
        return
    wanted = "".join("".join(texts).split())
    assert "".join(read(row, tokenizer).split()) == wanted


@settings(max_examples=12)
@given(examples)
def test_the_tokens_are_those_of_transformers(template: Template, example: Example) -> None:
    if template.source is None or template.name == "r1":
        return
    tokenizer = template.tokenizer
    messages = [] if "System role" not in template.source else [{"role": "user", "content": example.instruction}]
    if not messages:
        messages = [{"role": "system", "content": example.system}] if example.system else []
        for user, answer in example.history:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": user_text(example)})
    else:
        example = replace(example, context="", system="", history=())
    source = template.source.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'").replace("<think>\n{%", "{%")
    text = tokenizer.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    found = prompts([example], tokenizer, None, template)["input_ids"][0].tolist()
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_a_template_writes_by_itself_is_not_read(make_tokenizer: Make) -> None:
    tokenizer = chatting(make_tokenizer, CHATML)
    row = encode(EXAMPLE, tokenizer, 200)
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nName it.\n\nA text about a cat.<|im_end|>\n"
        "<|im_start|>assistant\nThe cat<|im_end|>"
    )
    assert read(row, tokenizer) == "Name it.\n\nA text about a cat."
    own = encode(replace(EXAMPLE, system="Be brief.", history=(("user", "No."),)), tokenizer, 200)
    assert read(own, tokenizer) == "Be brief.userName it.\n\nA text about a cat."


@pytest.mark.parametrize("name", CHATS)
def test_the_header_opens_the_assistants_turn(make_tokenizer: Make, name: str) -> None:
    tokenizer = chatting(make_tokenizer, CHATS[name])
    template = Template.of("auto", tokenizer)
    headers = {"chatml": "<|im_start|>assistant\n", "llama2": " [/INST]", "gemma": "<start_of_turn>model\n",
               "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n", "phi3": "<|assistant|>\n",
               "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n", "r1": "<|assistant|>"}  # fmt: skip
    assert tokenizer.decode(template.header_ids) == headers[name]
    row = encode(EXAMPLE, tokenizer, 500)
    prompt, _ = parts(row)
    assert row.header == len(template.header_ids) and prompt[-row.header :] == template.header_ids


# ------------------------------------------------------------------------------------------------- lengths and batches
@settings(max_examples=12)
@given(st.integers(1, 150))
def test_a_long_context_is_cut_and_nothing_else(template: Template, max_length: int) -> None:
    tokenizer = template.tokenizer
    example = replace(EXAMPLE, context="A long text. " * 12, history=(("Hi", "Hello"),))
    whole = encode(example, tokenizer, 10_000, template)
    bare = encode(replace(example, context=""), tokenizer, 10_000, template)
    if len(bare.input_ids) > max_length:
        with pytest.raises(TooLong, match=f"instruction and response take .*max_length={max_length}"):
            encode(example, tokenizer, max_length, template)
        return
    row = encode(example, tokenizer, max_length, template)
    assert len(row.input_ids) == len(whole.input_ids) - row.tokens_cut <= max_length
    assert parts(row)[1] == parts(whole)[1]
    assert read(row, tokenizer).strip() in read(whole, tokenizer)


def test_solved_examples_are_earlier_turns(make_tokenizer: Make) -> None:
    tokenizer = chatting(make_tokenizer, CHATML)
    shots = [Example(f"Question {n}.", "", f"Answer {n}") for n in range(3)]
    row = few_shot(EXAMPLE, shots, tokenizer, 10_000)
    turns = tuple((shot.instruction, shot.response) for shot in shots)
    same = encode(replace(EXAMPLE, history=turns), tokenizer, 10_000)
    assert row == replace(same, shots=3)
    fewer = few_shot(EXAMPLE, shots, tokenizer, len(row.input_ids) - 1)
    assert fewer.shots == 2 and fewer.input_ids == encode(
        replace(EXAMPLE, history=turns[1:]), tokenizer, 10_000
    ).input_ids  # fmt: skip


def test_batches_carry_masks_and_headers(make_tokenizer: Make) -> None:
    tokenizer = chatting(make_tokenizer, CHATML)
    rows = encode_all([EXAMPLE, replace(EXAMPLE, context="")], tokenizer, 500).rows
    batch = pack(rows)
    assert batch["gate_mask"].tolist() == [bool(each) for row in rows for each in row.gate_mask or []]
    assert batch["headers"].tolist() == [row.header for row in rows]
    assert "gate_mask" not in Collator(tokenizer)(rows)
    padded = Collator(tokenizer, "left", gate_mask=True)(rows)
    for i, row in enumerate(rows):
        assert padded["gate_mask"][i][padded["attention_mask"][i].bool()].tolist() == row.gate_mask
    with pytest.raises(ValueError, match="1 of 2 rows carry a gate_mask"):
        pack([rows[0], replace(rows[1], gate_mask=None)])


def test_rows_on_disk_are_those_in_memory(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = chatting(make_tokenizer, CHATML)
    some = [EXAMPLE, replace(EXAMPLE, system="Be brief.", history=(("Hi", "Hello"),))]
    assert list(encode_all(some, tokenizer, 500, None, tmp_path).rows) == encode_all(some, tokenizer, 500).rows


# ------------------------------------------------------------------------------------------------------ render and stop
def test_render_shows_what_training_and_generation_use(template: Template, make_tokenizer: Make) -> None:
    tokenizer = template.tokenizer
    name = "plain" if template.source is None else "chat"
    asked = render(tokenizer, "Name it.", name)
    assert asked.input_ids == prompts([Example("Name it.", "", "")], tokenizer, None, template)["input_ids"][0].tolist()
    assert smartmops.render(tokenizer, [{"role": "user", "content": "Name it."}], name) == asked
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Name it."),
                ("assistant", "The cat")]  # fmt: skip
    whole = render(tokenizer, [{"role": role, "content": content} for role, content in messages], name)
    row = encode(Example("Name it.", "", "The cat", system="Be brief.", history=(("Hi", "Hello"),)), tokenizer, 10_000,
                 template)  # fmt: skip
    assert (whole.input_ids, whole.gate_mask) == (row.input_ids, row.gate_mask)
    assert tokenizer.decode(whole.input_ids) == whole.text


def test_generation_stops_at_the_end_of_a_turn_or_a_text(make_tokenizer: Make) -> None:
    tokenizer = chatting(make_tokenizer, CHATML)
    template = Template.of("auto", tokenizer)

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[5, 7]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert template.stops(model) == sorted({end, tokenizer.eos_token_id, 5, 7})
    assert template.stops(object()) == sorted({end, tokenizer.eos_token_id})


def test_a_template_writes_the_same_on_every_day(make_tokenizer: Make) -> None:
    tokenizer = chatting(make_tokenizer, CHATS["llama3"])
    assert "Today is 26 Jul 2024" in render(tokenizer, "Hi").text


def test_nothing_is_thought_where_no_answer_shows_thoughts(make_tokenizer: Make) -> None:
    for name in ("qwen3", "r1"):
        tokenizer = chatting(make_tokenizer, CHATS[name])
        answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        assert render(tokenizer, answered).text.startswith(render(tokenizer, "Hi").text)


# ------------------------------------------------------------------------------------------------------------ choosing
def test_auto_is_the_chat_template_where_there_is_one(make_tokenizer: Make, tmp_path: Path) -> None:
    plain, chat = make_tokenizer(), chatting(make_tokenizer, CHATML)
    assert (Template.of("auto", plain).name, Template.of("auto", chat).name) == ("plain", "chat")
    assert encode(EXAMPLE, plain, 200) == encode(EXAMPLE, plain, 200, Template.of("plain", plain))
    file = tmp_path / "own.jinja"
    file.write_text(QWEN3)
    check_template(str(file))
    chosen = Template.of(str(file), chat)
    assert (chosen.name, chosen.source) == (str(file), QWEN3)


def test_the_plain_frame_is_whole_tokens_of_the_users_text(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    row = encode(replace(EXAMPLE, system="Be brief.", history=(("Hi", "Hello"),)), tokenizer, 500)
    assert tokenizer.decode(row.input_ids) == (
        "<bos>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello<eos>### Instruction:\nName it.\n\n### Context:\n"
        "A text about a cat.\n\n### Response:\nThe cat<eos>"
    )
    assert read(row, tokenizer) == "Be brief.HiName it.A text about a cat."
    assert tokenizer.decode(row.input_ids[: -len(parts(row)[1])][-row.header :]) == "### Response:\n"


FIRST_LINE = "{% for m in messages %}<|user|>{{ m.content{0} }}<|end|>{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"


def test_a_token_that_begins_in_the_blanks_before_a_header_opens_the_answer() -> None:
    tokenizer = smartmops.load_base("tiny")[1]
    header = Template.of("plain", tokenizer).header_ids
    assert tokenizer.decode(header) == "\n\n### Response:\n" and len(header) == 1
    row = encode(EXAMPLE, tokenizer, 500, Template.of("plain", tokenizer))
    assert row.header == 1 and parts(row)[0][-1:] == header


LOSES = {
    "cut off": "[:20]", "first line": ".split('\n')[0]", "escaped": "|e", "other words": "|replace('cat', 'dog')",
    "thoughts": ".split('</think>')[-1]",
}  # fmt: skip


@pytest.mark.parametrize("loses", LOSES)
@pytest.mark.parametrize("whose", ["instruction", "response", "system", "history"])
def test_a_template_that_changes_what_is_said_is_refused(
    make_tokenizer: Make, tmp_path: Path, loses: str, whose: str
) -> None:
    (tmp_path / "own.jinja").write_text(FIRST_LINE.replace("{0}", LOSES[loses]))
    tokenizer = chatting(make_tokenizer, CHATML)
    template = Template.of(str(tmp_path / "own.jinja"), tokenizer)
    long = "<think>A cat & a bird.</think>A cat and\na second line."
    said: dict[str, Any] = {whose: ((long, "Yes."),) if whose == "history" else long}
    assert encode(Example("Hi.", "", "Yes."), tokenizer, 500, template).input_ids
    with pytest.raises(ValueError, match=r"as it stands, or writes around it|writes another prompt, another answer"):
        encode(replace(Example("Hi.", "", "Yes."), **said), tokenizer, 500, template)


def test_thoughts_of_earlier_answers_may_be_left_out_and_those_of_the_last_moved(
    make_tokenizer: Make, tmp_path: Path
) -> None:
    source = FIRST_LINE.replace("m.content{0}", "m.content if loop.last else m.content.split('</think>')[-1].strip()")
    (tmp_path / "own.jinja").write_text(source)
    tokenizer, thought = chatting(make_tokenizer, CHATML), "<think> Hm. </think> Yes."
    template = Template.of(str(tmp_path / "own.jinja"), tokenizer)
    row = encode(Example("Hi.", "", thought, history=(("No?", thought),)), tokenizer, 500, template)
    assert (
        tokenizer.decode(row.input_ids)
        == f"<|user|>No?<|end|><|user|>Yes.<|end|><|user|>Hi.<|end|><|user|>{thought}<|end|>"
    )
    assert read(row, tokenizer) == "No?Hi."


THINKING = (
    "{% for m in messages %}<|user|>{% if m.role == 'assistant' %}<think>\n{{ m.content.split('</think>')[0]"
    ".replace('<think>', '').strip() if '</think>' in m.content else '' }}\n</think>\n\n{{ m.content.split('</think>')[-1]"
    ".strip() }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|user|><think>\n"
    "{% endif %}"
)  # opens a thought with every turn, as models do that always think


@pytest.mark.parametrize("response", ["<think>\nLet me see.\n</think>\n\n42", "42"])
def test_where_every_answer_begins_with_a_thought_its_own_is_learnt(
    make_tokenizer: Make, tmp_path: Path, response: str
) -> None:
    (tmp_path / "own.jinja").write_text(THINKING)
    tokenizer = chatting(make_tokenizer, CHATML)
    row = encode(Example("Hi.", "", response), tokenizer, 500, Template.of(str(tmp_path / "own.jinja"), tokenizer))
    thought = "Let me see." if "see" in response else ""
    assert tokenizer.decode(row.input_ids) == f"<|user|>Hi.<|end|><|user|><think>\n{thought}\n</think>\n\n42<|end|>"


SWITCHED = FIRST_LINE.replace(
    "m.content{0}", "m.content.replace('/no_think', '').rstrip() if m.role == 'system' else m.content.lstrip('\n')"
)


def test_switches_of_thinking_and_breaks_at_an_end_may_go(make_tokenizer: Make, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(SWITCHED)
    tokenizer, code = chatting(make_tokenizer, CHATML), "\n    print(1)"
    example = Example("Hi.", "", "Yes.", system="Be brief. /no_think", history=(("Code?", code),))
    row = encode(example, tokenizer, 500, Template.of(str(tmp_path / "own.jinja"), tokenizer))
    assert read(row, tokenizer) == "Be brief.Code?Hi."
    assert "<|user|>    print(1)<|end|>" in tokenizer.decode(row.input_ids)


BAD = {
    "no end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", r"does not end a turn.*'\\n'"),
    "no answer": ("{{ messages[0]['content'] }}<|end|>", r"does not write a question and its answer.*mark0000of4711"),
    "capitals": (FIRST_LINE.replace("{0}", "|upper"), r"as they stand, one behind the other \(.*MARK0000OF4711"),
    "fails": ("{{ 1/0 }}", r"refuses messages of user, assistant \(division by zero\)"),
    "fails otherwise": ("{{ messages[7]['content'] + messages.nothing() }}", "refuses messages of user, assistant"),
    "no jinja": ("{% for m in messages %}\n{{ m.content }", "line 2: no Jinja"),
    "no user": ("{{ raise_exception('never') }}", r"refuses messages of user, assistant \(never\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_templates_that_say_too_little(make_tokenizer: Make, tmp_path: Path, kind: str) -> None:
    source, message = BAD[kind]
    file = tmp_path / "own.jinja"
    file.write_text(source)
    with pytest.raises(ValueError, match=message) as found:
        Template.of(str(file), chatting(make_tokenizer, CHATML))
    assert "\n" not in str(found.value) and "template='plain'" in str(found.value)


def test_templates_that_are_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no chat template: choose plain, or give a file"):
        Template.of("chat", tokenizer)
    missing = str(tmp_path / "none.jinja")
    for ask in (check_template, lambda name: Template.of(name, tokenizer)):
        with pytest.raises(ValueError, match=r"none.jinja' cannot be read \(No such file.*choose auto, chat, plain"):
            ask(missing)
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="line 1: no Jinja"):
        check_template(str(tmp_path / "bad.jinja"))
