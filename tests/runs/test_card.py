"""What lies beside an adapter's tensors: its template, a card without a machine's paths, and who reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from smartmops.base import local
from smartmops.base.names import shown_name
from smartmops.flow.trainer import train
from smartmops.methods.baselines import load_run, template_of
from smartmops.runs.card import card, licence_of
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
    assert str(tmp_path) not in told and "a folder of its author's: below, put where it lies with you" in told
    assert "folder of its author" not in card(template, {"base": "tiny", "data": "office", "method": "mops"})


def test_a_template_that_refuses_the_cards_example_leaves_the_card_without_it(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(local("tiny"))
    (tmp_path / "lines.jinja").write_text(TAGS.replace("m.content", "m.content.replace('\n\n', ' ')"))
    template = Template.of(str(tmp_path / "lines.jinja"), tokenizer)
    told = card(template, {"base": "tiny", "data": "office", "method": "mops"})
    assert "    No example: template" in told and "does not write 'Name the animal" in told


def test_a_folder_that_has_gone_takes_no_licence_of_who_is_called_so_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("smartmops.runs.card.try_to_load_from_cache", lambda *_: str(tmp_path / "README.md"))
    assert licence_of("models/mine") == "mit" and licence_of("models/mine", ["models/mine"]) is None


@pytest.mark.parametrize(("name", "paths", "shown"), [
    ("models/client-x/c_sp", (), "c_sp"), ("client-x/rows.JSONL", (), "rows.JSONL"), ("./c_sp", (), "c_sp"),
    ("~/client-x/c_sp", (), "c_sp"), ("~nobody-x.jsonl", (), "~nobody-x.jsonl"),
    ("client-x/here", (), "here"), ("client-x/gone", ("client-x/gone",), "gone"),
    ("client-x/here/..", (), "client-x"), ("owner/name-1.5", (), "owner/name-1.5"), ("smollm2", (), "smollm2"),
])  # fmt: skip
def test_a_path_is_one_that_is_here_was_here_or_is_spelt_as_one(
    name: str, paths: tuple[str, ...], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "client-x" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown_name(name, paths) == shown
    template = Template.of("plain", AutoTokenizer.from_pretrained(local("tiny")))
    words = card(template, {"base": name, "data": ["office", name], "method": "mops", "paths": paths})
    assert f"# mops on {shown}\n" in words and f"data `office {shown}`" in words


def told(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    template = Template.of("plain", AutoTokenizer.from_pretrained(local("tiny")))
    return card(template, {"base": "tiny", "data": "office", "method": "mops", **config}, metrics)


def test_the_card_of_a_comparison_has_each_method_and_says_which_adapter_it_is() -> None:
    tasks = {"frozen": {"a": 9.0, "b": 8.0}, "ungated": {"a": 6.0, "b": 7.0}, "mops": {"a": 5.0, "b": 4.0}}
    metrics = {
        "perplexity": {"frozen": 8.5, "ungated": 6.5, "mops": 4.5}, "per_task": tasks, "seeds": [3, 4],
        "per_seed": {"frozen": [8.5], "ungated": [6.5, 6.5], "mops": [4.4, 4.6]}, "examples": {"train": 90, "test": 10},
    }  # fmt: skip
    config = {"command": "compare", "method": "prompt-tuning, mops", "arguments": {"steps": 40, "seed": 0}}
    text = told(config, metrics)
    assert "# mops on tiny" in text and "| task | frozen | ungated | mops |" in text
    assert "| a | 9.00 | 6.00 | 5.00 |" in text and "| **overall** | 8.50 | 6.50 | 4.50 |" in text
    assert ("Means over seeds 3, 4: steps 40, 90 examples to train on, 10 examples to test on; this adapter is `mops` of "
            "seed 3, 4.40 overall.") in text  # fmt: skip
    one = told(config, metrics | {"seeds": [3], "per_seed": {"mops": [4.4]}})
    assert "One seed, 3: steps 40" in one


def test_the_card_of_a_federation_has_its_numbers_rounds_and_clients() -> None:
    metrics = {
        "perplexity": {"overall": 4.5, "per_task": {"": 4.5}}, "clients": 5, "examples": {"test": 10},
        "perplexity_frozen": {"overall": 8.5, "per_task": {"": 8.5}},
    }  # fmt: skip
    arguments = {"rounds": 2, "local_steps": 3, "clients_per_round": 4, "seed": 1, "steps": 1000}
    text = told({"command": "federate", "arguments": arguments}, metrics)
    assert "| no task | 8.50 | 4.50 |" in text
    said = "One run: rounds 2, local steps 3, clients per round 4, seed 1, 5 clients, 10 examples to test on."
    assert said in text and "steps 1000" not in text


def test_the_card_says_what_it_was_measured_on_and_how_long_it_was_trained() -> None:
    sides = {"perplexity": {"overall": 4.5, "per_task": {"": 4.5}}, "perplexity_frozen": {"overall": 8.5, "per_task": {}}}
    arguments = {"steps": 60, "patience": 2, "seed": 0}
    text = told({"command": "train", "arguments": arguments}, sides | {"best": {"step": 24, "last_step": 32}})
    assert "tokens of the run's test split:" in text and "One run: steps 32 of 60, seed 0." in text
    arguments = {"steps": 60, "patience": None, "seed": 0}
    text = told({"command": "train", "arguments": arguments}, sides | {"measured_on": "a part", "best": {"last_step": 54}})
    assert "tokens of a part:" in text and "One run: steps 60, seed 0." in text


def test_a_card_without_numbers_claims_nothing() -> None:
    assert "nothing else is claimed" in told({"command": "federate"}, {"clients": 3})
    assert "nothing else is claimed" in told({"command": "compare"}, {})
