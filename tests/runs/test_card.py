"""What lies beside an adapter's tensors: its template, a card without a machine's paths, and who reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from smartmops.base import local
from smartmops.flow.trainer import train
from smartmops.methods.baselines import load_run, template_of
from smartmops.runs.card import card
from smartmops.tokens.template import Template

Make = Callable[..., Any]
TAGS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_run_keeps_the_template_it_was_trained_with(config: Make, tmp_path: Path) -> None:
    file = tmp_path / "tags.jinja"
    file.write_text(TAGS)
    chosen = config(template=str(file), steps=1, method="prompt-tuning")
    train(chosen)
    file.write_text("{{ messages[0].content }}")
    _, tokenizer, run = load_run(chosen.out)
    assert tokenizer.chat_template == TAGS and template_of(run) == "chat"
    assert run.config["arguments"]["template"] == str(file)
    text = (run.adapter_dir / "README.md").read_text()
    assert "    <user>Name the animal.\n\n    A cat sat on the mat.<eos><assistant>The cat.<eos>" in text
    assert str(tmp_path) not in text and "import smartmops" in text and "load_base(" in text


def test_a_run_without_a_template_is_plain(config: Make) -> None:
    chosen = config(steps=1, method="prompt-tuning")
    train(chosen)
    _, tokenizer, run = load_run(chosen.out)
    assert tokenizer.chat_template is None and template_of(run) == "plain"
    assert "### Response:" in (run.adapter_dir / "README.md").read_text()


def test_the_card_names_folders_without_where_they_are(tmp_path: Path) -> None:
    template = Template.of("plain", AutoTokenizer.from_pretrained(local("tiny")))
    told = card(template, {"base": str(tmp_path), "data": "/home/me/rows.jsonl", "method": "mops"})
    assert f"# mops on {tmp_path.name}\n" in told and "`rows.jsonl`" in told and "/home" not in told
    assert str(tmp_path) not in told
