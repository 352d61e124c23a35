"""Scripts that go on for as long as they are told do what they say when they are told little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_fuzz_keeps_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "reliability.json"
    command = [sys.executable, ROOT / "scripts/fuzz", "--minutes", "0.0001", "--only", "YAML", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())["fuzz"]["YAML of options"]
    assert found["read"] + found["refused"] > 0 and found["fault"] is None
