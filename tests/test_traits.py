"""The table of methods: complete, consistent with the options, and read before anything that takes time is imported."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from smartmops.methods.baselines import BUILDERS
from smartmops.options.federation import FederateConfig
from smartmops.options.method import Method
from smartmops.report.results import name
from smartmops.traits import CENTRAL, LABELS, METHODS, compared, is_told


def test_options_offer_the_methods_of_the_table() -> None:
    assert set(get_args(Method)) == set(METHODS)
    assert set(get_args(get_type_hints(FederateConfig)["method"])) == set(CENTRAL)


def test_every_kind_of_adapter_has_a_builder() -> None:
    assert {each.adapter for each in METHODS.values()} == set(BUILDERS)


def test_reading_the_table_imports_no_torch() -> None:
    code = "import sys, smartmops.traits, smartmops.options.federation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("trait", "methods"),
    [
        ("ours", "mops prompt-tuning uniform-gate oracle nearest-cluster top-1"),
        ("told", "oracle nearest-cluster"),
        ("reads", "mops uniform-gate top-1"),
        ("by_task", "mops uniform-gate top-1 oracle"),
        ("one_expert", "oracle nearest-cluster top-1"),
        ("learned", "mops"),
        ("answers", "mops prompt-tuning lora ia3 uniform-gate top-1"),
    ],
)
def test_traits(trait: str, methods: str) -> None:
    assert {name for name, each in METHODS.items() if getattr(each, trait)} == set(methods.split())


def test_labels_of_runs_comparisons_and_federations() -> None:
    assert [name(each) for each in ("prompt-tuning", "ungated", "fedprompt", "fedlora", "ia3", "lora", "mops")] == [
        "Prompt tuning", "Ungated prompts", "FedPrompt", "FedLoRA", "IA3", "LoRA", "MoPs",
    ]  # fmt: skip
    assert compared("prompt-tuning") == "ungated" and compared("lora") == "lora" and set(METHODS) <= set(LABELS)


def test_a_run_may_name_no_method_or_one_that_is_unknown() -> None:
    assert [is_told(each) for each in ("oracle", "mops", "fedprompt", None)] == [True, False, False, False]
