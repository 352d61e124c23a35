"""README.md from results/. Knows files and numbers; runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write(folder: Path) -> None:
    found = [json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))]
    (folder / "README.md").write_text("\n".join(lines(found)))


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "# An eighth expert, added to a run of seven\n"
    yield "Written by `python experiments/surgery/run.py page` from the files in `results/`.\n"
    if not found:
        yield "Nothing has been run yet.\n"
        return
    one = found[0]
    yield (
        f"SmolLM2-135M-Instruct, {len(one['tasks'])} of the paper's tasks with {one['rows_each']} examples each, a quarter of "
        f"them for testing; one seed. Together, a run sees {one['examples_each']} examples of each task in training, and `add` "
        f"sees {one['examples_added']} of the eighth. Perplexity over the answer's tokens. An old question is one of the seven "
        "tasks' test part; its answer is the logits of the first "
        f"{one['compared']['tokens']} greedy tokens, given alone, before and after, compared bit by bit.\n"
    )
    yield "| eighth task | frozen | the seven's run | all eight together | added | against together |"
    yield "|---|---|---|---|---|---|"
    for each in found:
        new, name = each["added"]["new"], each["eighth"]
        yield (f"| {name} | {new['frozen']:.3f} | {new['before']:.3f} | {each['joint']['per_task'][name]:.3f} | "
               f"{new['after']:.3f} | {each['new_over_joint']:+.1%} |")  # fmt: skip
    yield "\n| eighth task | the seven before | after | change | sent to the new expert | not sent | of these identical |"
    yield "|---|---|---|---|---|---|---|"
    for each in found:
        old, same = each["added"]["old"], each["compared"]
        yield (f"| {each['eighth']} | {old['before']:.4f} | {old['after']:.4f} | {each['old_change']:+.3%} | {same['sent']} of "
               f"{same['questions']} | {same['not_sent']} | {same['identical']} |")  # fmt: skip
    yield "\n| eighth task | its instructions that the rule takes | those of the others |"
    yield "|---|---|---|"
    for each in found:
        rule = each["added"]["rule"]
        yield f"| {each['eighth']} | {rule['sent']:.1%} | {rule['taken']:.1%} |"
    yield ""
