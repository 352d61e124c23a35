"""Readers: files in, `Example` out."""

from __future__ import annotations

import json
from pathlib import Path

from .example import Example


def read_superni(file: Path) -> list[Example]:
    """One Super-NaturalInstructions (or v1) task file: definition, input and first output of each instance."""
    task = json.loads(Path(file).read_text(encoding="utf-8"))
    definition, name = task["Definition"], Path(file).stem if Path(file).stem not in ("train", "test") else Path(file).parent.name
    definition = definition[0] if isinstance(definition, list) else definition
    rows = []
    for instance in task["Instances"]:
        output = instance["output"]
        rows.append(Example(definition, instance["input"], output[0] if isinstance(output, list) else output, name, "superni"))
    return rows
