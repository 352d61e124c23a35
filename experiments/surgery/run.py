"""An eighth expert added to a run of seven tasks on SmolLM2, against training all eight together. Resumable.

    python experiments/surgery/run.py [TASK...]     run what has no result yet; TASK is an eighth task, by its number
    python experiments/surgery/run.py page          write README.md from results/

The seven tasks are the paper's, read from ../shared/data (or --shared); the eighth is one of SAPT's. Each eighth task is one file in
results/. All runs share base, examples and split: an example is in the test part of every run or of none.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

import smartmops as sm
from smartmops.data.tasks import splits
from smartmops.rows.example import Example
from smartmops.runs.folder import write_text
from smartmops.tokens.batches import prompts
from smartmops.tokens.template import Template

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared"
WORK = HERE / "checkpoints"
EIGHTH = {"748": "task748_glucose_reverse_cause_event_detection", "591": "task591_sciq_answer_generation",
          "639": "task639_multi_woz_user_utterance_generation"}  # fmt: skip
ROWS, LONGEST, TEST = 40, 450, 0.25  # examples of each task; tokens of one; share of them that is tested on
EACH, ADDED = 80, 160  # examples of each task that a run sees in training; of the eighth that `add` sees
BATCH, TOKENS = 4, 8  # examples of a step; tokens of an answer that is compared bit by bit
SETTINGS: dict[str, Any] = {"model": "smollm2", "dtype": "float32", "test_share": TEST, "validation_share": 0.15,
                            "batch_size": BATCH, "samples_per_task": 0, "max_length": 512}  # fmt: skip


def tasks(names: tuple[str, ...] | None, folder: Path) -> dict[str, list[Example]]:
    """At most `ROWS` short examples of each task of a folder, or of those that are named."""
    _, tokenizer = sm.load_base("smollm2")
    every = sm.read(str(folder), keep_general_qa=True)
    random.Random(0).shuffle(every)
    found: dict[str, list[Example]] = {}
    for example in every:
        own = found.setdefault(example.category, [])
        if len(own) >= ROWS or (names is not None and example.category not in names):
            continue
        text = f"{example.instruction}\n{example.context}\n{example.response}"
        if len(tokenizer(text)["input_ids"]) <= LONGEST:
            own.append(example)
    return {name: rows for name, rows in sorted(found.items()) if rows}


def write(file: Path, rows: list[Example]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    names = ("instruction", "context", "response", "category")
    file.write_text("".join(json.dumps({n: getattr(row, n) for n in names}) + "\n" for row in rows))
    return file


def train(file: Path, out: Path, count: int) -> dict[str, Any]:
    """A run of so many tasks; one that is finished is read."""
    if not (out / "metrics.json").exists():
        sm.train(**SETTINGS, data=str(file), out=out, experts=count, steps=EACH * count // BATCH, resume=out.exists())
    return json.loads((out / "metrics.json").read_text())


def answers(run: sm.LoadedRun, rows: list[Example]) -> list[tuple[torch.Tensor, dict[str, float], float | None]]:
    """Logits of the first greedy tokens of each answer, given alone, with the gate's weights."""
    template, found = Template.of("auto", run.tokenizer), []
    for row in rows:
        batch = prompts([row], run.tokenizer, 512, template)
        out = run.model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True,
                                 output_logits=True, pad_token_id=run.tokenizer.eos_token_id)  # fmt: skip
        found.append((torch.cat(out.logits), *run.latest()))
    return found


def compared(before: Path, after: Path, name: str, rows: list[Example]) -> dict[str, Any]:
    """Old test questions, one by one: how many the new expert gets, and how many of the other answers are the same."""
    sides = [answers(sm.load_run(path), rows) for path in (before, after)]
    sent = [now[1][name] > 0 for now in sides[1]]
    pairs = [(was[0], now[0]) for was, now, own in zip(*sides, sent, strict=True) if not own]
    same = sum(was.shape == now.shape and torch.equal(was, now) for was, now in pairs)
    return {"questions": len(rows), "sent": sum(sent), "not_sent": len(pairs), "identical": same, "tokens": TOKENS}


def cell(number: str, seven: dict[str, list[Example]], data: Path) -> dict[str, Any]:
    """One eighth task."""
    started, name = time.perf_counter(), EIGHTH[number]
    (rows,) = tasks((name,), data / "sapt_superni").values()
    old = write(WORK / "seven.jsonl", [row for own in seven.values() for row in own])
    new = write(WORK / f"{number}.jsonl", rows)
    both = write(WORK / f"seven-and-{number}.jsonl", [row for own in [*seven.values(), rows] for row in own])
    first = train(old, WORK / "seven", len(seven))
    joint = train(both, WORK / f"joint-{number}", len(seven) + 1)
    out = WORK / f"added-{number}"
    if not (out / "metrics.json").exists():
        sm.add_expert(WORK / "seven", data=str(new), out=out, name=name, steps=ADDED // BATCH, test_share=TEST,
                      batch_size=BATCH)  # fmt: skip
    added = json.loads((out / "metrics.json").read_text())["change"]
    questions = list(splits(str(old), None, TEST, 0)[1])
    jointly = joint["perplexity"]["per_task"]
    return {
        "eighth": name, "tasks": list(seven), "settings": SETTINGS, "examples_each": EACH, "examples_added": ADDED, "rows_each": ROWS,
        "seven": first["perplexity"], "frozen": first["perplexity_frozen"],
        "joint": joint["perplexity"], "added": added, "compared": compared(WORK / "seven", out, name, questions),
        "new_over_joint": added["new"]["after"] / jointly[name] - 1,
        "old_change": added["old"]["after"] / added["old"]["before"] - 1,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(EIGHTH))
    parser.add_argument("--shared", type=Path, default=SHARED)
    given = parser.parse_args()
    chosen, data = given.tasks, given.shared / "data" / "superni"
    sys.path.insert(0, str(HERE))
    if chosen == ["page"]:
        from page import write as page

        page(HERE)
        return
    seven = None
    for number in chosen:
        file = HERE / "results" / f"{number}.json"
        if file.exists():
            continue
        seven = seven or tasks(None, data / "paper7")
        found = cell(number, seven, data)
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(found, indent=1) + "\n")
        print(number, found["new_over_joint"], found["old_change"], found["compared"], flush=True)


if __name__ == "__main__":
    main()
