"""An adapter goes to the hub with its card, and nothing of this machine with it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub, hub

import smartmops as sm
from smartmops import cli
from smartmops.checks.errors import HubError
from smartmops.handover.hub import stage, without_folders
from smartmops.runs.folder import Run

TOKEN = "hf_secretsecretsecretsecretsecretsecret"
NAMES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub(TOKEN) as (kept, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield kept


def test_adapter_and_card_arrive_whole_and_name_no_folder(
    by_answers: Path, base: Path, here: Hub, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        found = cli.push_command(cli.PushConfig(run=by_answers, repo="me/fruit", private=True))
    assert found["url"].endswith("/me/fruit/commit/" + "1" * 40) and set(found["files"]) == NAMES
    assert here.made["me/fruit"]["visibility"] == "private"
    sent = here.files["me/fruit"]
    assert set(sent) == NAMES
    assert sent["adapter_model.safetensors"] == (by_answers / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("README.md", "adapter_config.json"):
        assert str(base.parent).encode() not in sent[name] and str(by_answers.parent).encode() not in sent[name]
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == base.name
    assert TOKEN not in capsys.readouterr().out + caplog.text
    text = sent["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "me/fruit")' in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft" and front["tags"] == ["smartmops"]
    metrics = json.loads((by_answers / "metrics.json").read_text())
    frozen, adapted = (metrics[name]["per_task"]["banana"] for name in ("perplexity_frozen", "perplexity"))
    assert f"| banana | {frozen:.2f} | {adapted:.2f} |" in text


def test_what_is_to_be_private_is_not_sent_where_all_can_read_it(by_answers: Path, here: Hub) -> None:
    sm.push(run=by_answers, repo="me/fruit")
    sent = here.files.pop("me/fruit")
    with pytest.raises(HubError, match="private: me/fruit is there already, and everybody can read it: name another"):
        sm.push(run=by_answers, repo="me/fruit", private=True)
    assert sent and "me/fruit" not in here.files


def test_neither_another_base_of_that_name_nor_another_tokenizer_is_asked(by_answers: Path, tmp_path: Path) -> None:
    run = shutil.copytree(by_answers, tmp_path / "run")
    config, inputs = (json.loads((run / name).read_text()) for name in ("config.json", "inputs.json"))
    (run / "config.json").write_text(json.dumps(config | {"base": "me/base", "paths": ["me/base"]}))
    with pytest.raises(
        sm.BaseModelError, match=r"MODEL me/base does not exist here, but .*run was trained on it, from"
    ):
        sm.push(run=run, repo="me/fruit", dry_run=True)
    (run / "config.json").write_text(json.dumps(config))
    (run / "inputs.json").write_text(json.dumps(inputs | {"tokenizer": "another"}))
    with pytest.raises(sm.RunError, match=r"is not the one that .*run was trained with, so the same text is other tok"):
        sm.push(run=run, repo="me/fruit", dry_run=True)


def test_a_dry_run_lists_and_sends_nothing(by_answers: Path, here: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert sm.push(run=by_answers, repo="me/fruit", dry_run=True)["url"] is None
    found = cli.push_command(cli.PushConfig(run=by_answers, repo="me/fruit", dry_run=True))
    printed = capsys.readouterr().out
    assert here.made == here.files == {} and all(name in printed for name in NAMES)
    assert found["files"]["adapter_model.safetensors"] > 1000


def test_a_hub_that_does_not_let_us_write_is_told_in_one_line_without_the_token(
    by_answers: Path, here: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anothersecretanothersecretanother")
    with pytest.raises(OSError, match=r"answers 401 for me/fruit: log in with `hf auth login`") as caught:
        sm.push(run=by_answers, repo="me/fruit")
    assert "anothersecret" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("repo", ["fruit", "me/fruit/more", "me/", "../x", "me/a b"])
def test_what_is_no_repository_is_refused(repo: str, by_answers: Path) -> None:
    with pytest.raises(ValueError, match="give owner/name, such as me/office-experts"):
        sm.push(run=by_answers, repo=repo)


def test_paths_lose_their_folders() -> None:
    found: Any = without_folders({"a": ["/home/me/base", "org/name"], "b": {"c": "~/x/y"}, "d": 3, "e": None})
    assert found == {"a": ["base", "org/name"], "b": {"c": "y"}, "d": 3, "e": None}
    given = {"expert_names": ["in/and/out"], "embedder": "models/client-x/emb", "tokenizer_name_or_path": "client/base"}
    found = without_folders(given, ["client/base"])
    assert found == {"expert_names": ["in/and/out"], "embedder": "emb", "tokenizer_name_or_path": "base"}
    names = {"expert_names": ["/r/science", "/x/science", "~/home", "./here"], "frozen_experts": ["/r/science"]}
    assert without_folders(names) == names  # words of users', and no paths


def test_a_base_named_from_the_working_folder_is_no_id_of_the_hub(
    by_answers: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run as it is where base and data were named from there: what goes to the hub names neither folder."""
    shutil.copytree(by_answers, tmp_path / "run")
    (tmp_path / "client-x").mkdir()
    (tmp_path / "client-x" / "c_sp").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    for name, kept in (("config.json", {"base": "client-x/c_sp", "data": "client-x/gone", "paths": ["client-x/gone"]}),
                       ("adapter/adapter_config.json", {"base_model_name_or_path": "client-x/c_sp"})):  # fmt: skip
        file = tmp_path / "run" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | kept))
    (tmp_path / "staged").mkdir()
    stage(Run.open(Path("run")), tmp_path / "staged", "me/fruit")
    texts = [(tmp_path / "staged" / name).read_text() for name in ("README.md", "adapter_config.json")]
    assert "client-x" not in "".join(texts) and all("c_sp" in text for text in texts)
    assert 'load_base("c_sp")' in texts[0] and "data `gone`" in texts[0]
