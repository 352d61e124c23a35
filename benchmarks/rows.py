"""Data larger than memory: what `train` holds of texts and tokens that are kept in memory, and mapped from disk.

python benchmarks/rows.py      writes rows.json and rows.md beside itself; needs /proc (Linux)

Each run is a process of its own that trains a few steps on the embedded base, lower half run in every step. Memory is
the peak of its anonymous pages (RssAnon, looked at 50 times a second): pages of a mapped file are not in it, since the
system can drop them at any time. The last two runs have a limit on their data segment (RLIMIT_DATA, which mapped files
do not count towards) half-way between what the two before them took of it (VmData), as on a machine without more.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COUNTS = (1_000, 50_000, 200_000)  # examples
STEPS, BATCH = 5, 8
TRAIN = f"""
import sys
from pathlib import Path
from smartmops.fitting.loop import EMBEDDED_SETTING
from smartmops.flow.trainer import TrainConfig, train
data, rows, out = sys.argv[1:]
found = train(TrainConfig(model="tiny", data=data, out=Path(out), rows=rows, activations="off", method="prompt-tuning",
    steps={STEPS}, batch_size={BATCH}, test_share=0.001, samples_per_task=0, init="random", prompt_lr=0.1,
    dtype="float32", **EMBEDDED_SETTING))
print("perplexity", found["perplexity"]["overall"])
"""


def data(count: int, file: Path) -> int:
    """Write `count` synthetic examples of seven tasks; returns their bytes."""
    with open(file, "w") as lines:
        for i in range(count):
            context = " ".join(f"item {i * k % 9973} is in room {k}" for k in range(1, 9))
            row = {"instruction": f"Sort list {i}.", "context": context, "response": f"room {i % 8}, then {i % 5}",
                   "category": f"task {i % 7}"}  # fmt: skip
            lines.write(json.dumps(row) + "\n")
    return file.stat().st_size


def measured(file: Path, rows: str, limit: int | None = None) -> dict[str, Any]:
    """Peaks of anonymous pages and of the data segment in bytes, seconds, and what it ended with, of one run."""

    def held() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began, peaks = time.perf_counter(), {"RssAnon": 0, "VmData": 0}
    with tempfile.TemporaryDirectory() as out:
        run = subprocess.Popen([sys.executable, "-c", TRAIN, str(file), rows, f"{out}/run"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=held)  # fmt: skip
        while run.poll() is None:
            for line in Path(f"/proc/{run.pid}/status").read_text().split("\n"):
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)
        said, failed = run.communicate()
    last = (failed if run.returncode else said).strip().split("\n")[-1]
    return peaks | {"seconds": time.perf_counter() - began, "ended": last, "code": run.returncode}


def main(counts: tuple[int, ...] = COUNTS) -> None:
    """Measure and write both files."""
    found: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "runs": []}
    with tempfile.TemporaryDirectory() as place:
        for count in counts:
            file = Path(place) / f"{count}.jsonl"
            size = data(count, file)
            for name, rows in (("memory", "memory"), ("disk", f"{place}/rows")):
                found["runs"].append({"examples": count, "file_bytes": size, "rows": name} | measured(file, rows))
                print(found["runs"][-1], flush=True)
        limit = (found["runs"][-1]["VmData"] + found["runs"][-2]["VmData"]) // 2
        for name, rows in (("memory", "memory"), ("disk", f"{place}/rows")):
            row = {"examples": counts[-1], "file_bytes": size, "rows": name, "limit": limit}
            found["runs"].append(row | measured(file, rows, limit))
            print(found["runs"][-1], flush=True)
    (HERE / "rows.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "rows.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: dict[str, Any]) -> list[str]:
    """The page."""
    mib = 2**20
    table = [
        f"| {each['examples']:,} | {each['file_bytes'] / mib:,.1f} | {each['rows']} | "
        + (f"{each['limit'] / mib:,.0f}" if "limit" in each else "none")
        + f" | {each['RssAnon'] / mib:,.0f} | {each['VmData'] / mib:,.0f} | {each['seconds']:,.0f} | "
        + f"{'exit 1: ' if each['code'] else ''}{each['ended'].replace('|', ' ')[:60]} |"
        for each in found["runs"]
    ]
    return [
        "# Data larger than memory",
        "",
        f"`train --rows DIR` keeps texts and tokens on disk. {found['steps']} steps of {found['batch']} on the embedded "
        "base. Peaks: of anonymous pages, and of the data segment, which the limit is on.",
        "",
        "| examples | file, MiB | rows kept in | limit, MiB | anonymous, MiB | data segment, MiB | seconds | ended with |",
        "|---|---|---|---|---|---|---|---|",
        *table,
    ]


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or COUNTS)
