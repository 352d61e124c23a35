"""What a process sets before torch is loaded, asked of processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from smartmops.starting import GENERATING, WAITING


def said(code: str, **given: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    return done.stdout.strip()


STARTED = "import os; from smartmops.starting import start; start('train'); print(os.environ.get('OMP_WAIT_POLICY'))"


def test_threads_sleep_where_they_wait() -> None:
    assert said(STARTED) == "passive"


@pytest.mark.parametrize("command", GENERATING)
def test_threads_spin_where_text_is_generated(command: str) -> None:
    assert said(STARTED.replace("train", command)) == "None"


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_says_of_waiting_stays(name: str) -> None:
    assert said(STARTED, **{name: "active" if name == "OMP_WAIT_POLICY" else "7"}) in ("active", "None")


def test_nothing_is_said_of_waiting_once_torch_is_loaded() -> None:
    assert said("import torch; " + STARTED) == "None"


def test_importing_the_library_sets_nothing() -> None:
    assert said("import os; before = dict(os.environ); import smartmops; print(before == dict(os.environ))") == "True"
