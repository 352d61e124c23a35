"""Options in a YAML file: nested or flat, typed by the option, and wrong ones answered with file and line."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from smartmops.checks.errors import ConfigError
from smartmops.options.federation import FederateConfig, ServerConfig
from smartmops.options.training import CompareConfig, TrainConfig
from smartmops.settings.described import GROUPS, described
from smartmops.settings.reading import options_of
from smartmops.settings.writing import KINDS, resolved


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def read(folder: Path, text: str, kind: type = TrainConfig) -> dict[str, Any]:
    return options_of(written(folder, text), kind)


def test_nested_and_flat_say_the_same(tmp_path: Path) -> None:
    nested = "base:\n  model: tiny\nexperts: {experts: 3}\ntraining:\n  steps: 4\nrun:\n  out: runs/a\n"
    wanted = {"model": "tiny", "experts": 3, "steps": 4, "out": Path("runs/a")}
    assert read(tmp_path, nested) == read(tmp_path, "model: tiny\nexperts: 3\nsteps: 4\nout: runs/a\n") == wanted
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(("line", "value"), [
    ("prompt_lr: 1e-3", 1e-3), ("prompt_lr: 1", 1.0), ("prompt_lr: ~", None), ("prompt_lr:", None),
    ("prompt_lr: null", None), ("hold_out: no", "no"), ("hold_out: 'null'", "null"), ("hold_out: 1e3", "1e3"),
    ("hold_out: 12:30", "12:30"), ("hold_out: 2026-11-26", "2026-11-26"), ("data: off", "off"), ("steps: 010", 10),
    ("steps: 1_000", 1000), ("null_expert: no", False), ("validation: on", True), ("resume: false", False),
    ("columns: [response=answer]", ("response=answer",)), ("expert_names: [no, 3]", ("no", "3")),
    ("lora_match: none", "none"), ("gate_temperature: .inf", float("inf")),
])  # fmt: skip
def test_a_value_is_what_its_option_is(line: str, value: Any, tmp_path: Path) -> None:
    (found,) = read(tmp_path, line).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("text", "said"), [
    ("model: tiny\nstepz: 3", "line 2: unknown option 'stepz': perhaps steps is meant"),
    ("training:\n  step: 3", "line 2: unknown option 'step': perhaps steps is meant"),
    ("trainng:\n  steps: 3", "line 1: unknown option 'trainng': perhaps training is meant"),
    ("data:\n  steps: 3", "line 2: steps stands under data, but is one of training: move it"),
    ("steps: 3\ntraining:\n  steps: 4", "line 3: steps is given twice"),
    ("steps: many", "line 1: steps is 'many': give INT"),
    ("steps: 1e3", "line 1: steps is '1e3': give INT"),
    ("steps: 0x10", "line 1: steps is '0x10': give INT"),
    ("steps: [3]", "line 1: steps is a list: give INT"),
    ("columns: response=answer", "line 1: columns is 'response=answer': give a list, such as ['response=answer']"),
    ("validation: maybe", "line 1: validation is 'maybe': give true or false"),
    ("lr_schedule: none", "line 1: lr_schedule is 'none': choose cosine, linear or constant"),
    ("- steps", "line 1: a list where options by name are meant: write `name: value`"),
    ("steps 3", "line 1: 'steps 3' where options by name are meant"),
    ("a: b: c", "line 1: no YAML"),
    ("[1]: 2", "line 1: a list for a name"),
    ("steps: *x", "line 1: no YAML"),
    ("x: !!python/name:os.system", "line 1: unknown option 'x'"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'run.yaml'}, {said}") and "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read \(No such file"):
        options_of(tmp_path / "nowhere.yaml", TrainConfig)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(ConfigError, match=r"bytes\.yaml"):
        options_of(tmp_path / "bytes.yaml", TrainConfig)
    with pytest.raises(ConfigError, match=r"no YAML \(too deep\)|line 1"):
        read(tmp_path, "[" * 9000)


def some(kind: type) -> Any:
    given: dict[str, Any] = {"model": "tiny", "data": "no", "out": Path("runs/a"), "hold_out": "1e-3", "steps": 7,
                             "prompt_lr": 1e-5, "expert_names": ("null", "ü: b"), "methods": {"mops": 1e-3, "lora": None},
                             "seeds": (3, 4)}  # fmt: skip
    names = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names})


@pytest.mark.parametrize("command", ["train", "compare", "federate", "compress"])
def test_what_is_written_is_read_back(command: str, tmp_path: Path) -> None:
    config = some(KINDS[command])
    text = resolved(command, asdict(config))
    assert KINDS[command](**read(tmp_path, text, KINDS[command])) == config
    if command != "compress":
        assert set(yaml.safe_load(text)) <= set(GROUPS)


@pytest.mark.parametrize("kind", [TrainConfig, CompareConfig, FederateConfig, ServerConfig], ids=lambda k: k.__name__)
def test_every_option_is_of_a_small_group(kind: type) -> None:
    groups = [each.group for each in described(kind)]
    assert None not in groups and max(map(groups.count, groups)) <= 12
