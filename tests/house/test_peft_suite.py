"""The script that runs PEFT's own tests: whose lists it replaces, and how it counts."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALL_CONFIGS: list[Any] = [("Lora", {}), ("IA3", {})]


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("peft_suite", str(ROOT / "scripts" / "peft_suite"))
    spec = importlib.util.spec_from_loader("peft_suite", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", [False, True])
def test_the_whole_list_of_methods_is_replaced_and_a_part_of_it_is_left(script: Any, part: bool) -> None:
    plugin = script.Plugin(["llama"], True)

    @pytest.mark.parametrize("model_id", ["big", "bigger"])
    @pytest.mark.parametrize("config_cls, config_kwargs", ALL_CONFIGS[:1] if part else ALL_CONFIGS)
    def of_the_suite() -> None:
        pass

    module = SimpleNamespace(obj=SimpleNamespace(ALL_CONFIGS=ALL_CONFIGS))
    plugin.pytest_pycollect_makeitem(SimpleNamespace(getparent=lambda kind: module), "of_the_suite", of_the_suite)
    found = {mark.args[0].replace(" ", ""): mark.args[1] for mark in of_the_suite.pytestmark}  # type: ignore[attr-defined]
    assert found["model_id"] == ["llama"]
    methods = {each[0] for each in found["config_cls,config_kwargs"]}
    assert methods == ({"Lora"} if part else {plugin.config})


def outcome(script: Any, said: str, outcome: str = "failed") -> dict[str, str]:
    plugin = script.Plugin(["llama"], True)
    longrepr: Any = SimpleNamespace(reprcrash=SimpleNamespace(message=said), __str__=lambda self: said)
    plugin.pytest_runtest_logreport(SimpleNamespace(
        when="call", outcome=outcome, longrepr=("file", 1, said) if outcome == "skipped" else type("R", (), vars(longrepr))(),
        nodeid="tests/a.py::B::c"))  # fmt: skip
    return dict(plugin.results[0])


def test_outcomes_are_counted_with_their_reasons(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from smartmops.tuner.model import NO_MERGE

    results = [outcome(script, f"ValueError: {NO_MERGE}"), outcome(script, "Skipped: of others", "skipped"),
               outcome(script, "AssertionError: not equal"), outcome(script, "", "passed")]  # fmt: skip
    assert [each["outcome"] for each in results] == ["not applicable", "not applicable", "failed", "passed"]
    script.report(results)
    said = capsys.readouterr().out
    assert said.startswith("1 passed, 1 failed, 2 not applicable\n")
    assert "1 not applicable: merging" in said and "FAILED B::c: AssertionError: not equal" in said
