"""Clients that misbehave, and a server that dies, on the embedded base and the office tasks: what each fault costs.

    python experiments/faults/run.py            runs what is missing of results.json
    python experiments/faults/run.py page       README.md and faults.png from results.json

One federation a fault, all else equal. A fault of clients befalls every answer of a fifth of them; others strike at
random. The server is killed by SIGKILL in a process of its own, or its disk is full, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "federated"))
NONE, STRAGGLER = "none", "later than the timeout"
WAIT = 10.0  # seconds of the timeout; a straggler takes a second more, by a clock on which the others take none
AT_RANDOM = {  # fault, chance, and settings
    "30 % of answers lost": ("killed", 0.3, {}), "30 % of answers NaN": ("NaN", 0.3, {}),
    "60 % of answers lost, a quorum of 3": ("killed", 0.6, {"quorum": 3, "attempts": 20}),
}  # fmt: skip
STRUCK = {  # when, and by what
    "server killed between rounds": ("between rounds", "kill"),
    "server killed within a round": ("within a round", "kill"),
    "server killed within a checkpoint": ("within a checkpoint", "kill"),
    "disk full at a checkpoint": ("within a checkpoint", "disk"),
}
SETTING: dict[str, Any] = {
    "model": "tiny", "data": "office", "clients": 20, "clients_per_round": 5, "rounds": 20, "local_steps": 5, "batch_size": 2,
    "prompt_lr": 0.3, "samples_per_task": 0,
}  # fmt: skip
THREADS, ROUND = 1, 10  # sums of several threads differ in their last bits; the round in which the server is struck


def one(name: str, out: Path, resume: bool) -> None:
    """One federation in this process, which may not survive it."""
    import torch

    from faulty import FAULTS, Faulty, Straggling, full_disk, struck
    from smartmops.federated import federate as module

    torch.set_num_threads(THREADS)
    fifth, inner, settings = range(0, SETTING["clients"], 5), module.InProcess, dict(SETTING)
    wrap: Callable[[Any], Any] = lambda transport: transport  # noqa: E731
    if name in FAULTS:
        wrap = lambda transport: Faulty(transport, FAULTS[name], clients=fifth)  # noqa: E731
    elif name in AT_RANDOM:
        fault, chance, more = AT_RANDOM[name]
        settings |= more
        wrap = lambda transport: Faulty(transport, FAULTS[fault], probability=chance)  # noqa: E731
    elif name == STRAGGLER:
        settings |= {"timeout": WAIT}
        wrap = lambda transport: Straggling(transport, fifth, WAIT + 1)  # noqa: E731
    strike: Any = nullcontext()
    if name in STRUCK and not resume:
        moment, by = STRUCK[name]
        strike = struck(moment, ROUND, full_disk if by == "disk" else lambda: os.kill(os.getpid(), signal.SIGKILL))
    with strike:
        module.InProcess = lambda worker: wrap(inner(worker))  # type: ignore[assignment,misc]
        module.federate(module.FederateConfig(out=out, resume=resume, **settings))


def run(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, __file__, "one", name, str(out)]
        first = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if (first.returncode != 0) != (name in STRUCK):
            sys.exit(f"{name}: exit status {first.returncode}\n{first.stderr[-2000:]}")
        if name in STRUCK:
            subprocess.run([*command, "resume"], check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((out / "metrics.json").read_text())
        rows = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
        arrays = hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    failures = [failure["reason"] for row in rows for failure in row.get("failures", [])]
    return {
        "perplexity": [row["perplexity"]["overall"] for row in metrics["rounds"]],
        "clients_ok": sum(row.get("clients_ok", 0) for row in rows),
        "clients_failed": metrics["clients_failed"],
        "reason": failures[0] if failures else "",
        "exit_status": first.returncode,
        "arrays": arrays,
    }


def names() -> list[str]:
    from faulty import FAULTS

    return [NONE, *FAULTS, STRAGGLER, *AT_RANDOM, *STRUCK]


def everything() -> None:
    file = HERE / "results.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in names():
        if name not in found:
            found[name] = run(name)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found[name]["perplexity"][-1], flush=True)


# ---------------------------------------------------------------------------------------------------------------- page
def alike(found: dict[str, Any]) -> list[list[str]]:
    """Faults that ended with the same bits, each group by the first of its faults."""
    groups: dict[str, list[str]] = {}
    for name, row in found.items():
        groups.setdefault(row["arrays"], []).append(name)
    return list(groups.values())


def lines(found: dict[str, Any]) -> Iterator[str]:
    clean, first = found[NONE]["perplexity"][-1], {name: group[0] for group in alike(found) for name in group}
    yield "# What a misbehaving client costs, and a server that dies\n"
    yield "Written by `python experiments/faults/run.py page` from `results.json`.\n"
    yield (f"The embedded base and the office tasks, {SETTING['clients']} clients, {SETTING['clients_per_round']} a round, "
           f"{SETTING['rounds']} rounds of {SETTING['local_steps']} local steps, one seed, {THREADS} thread. A fault befalls "
           "every answer of a fifth of the clients; where the row names a share, it strikes any answer by chance. A server "
           f"that is struck in round {ROUND} goes on with `--resume`. Test perplexity over response tokens is "
           f"{found[NONE]['perplexity'][0]:.3f} before the first round and {clean:.3f} after the last one of the clean run."
           "\n")  # fmt: skip
    yield "| fault | answers used | refused or missing | final perplexity | against the clean run | same bits as |"
    yield "|---|---|---|---|---|---|"
    for name, row in found.items():
        last, same = row["perplexity"][-1], first[name]
        shown = "" if name == same else "the clean run" if same == NONE else same
        yield (f"| {name} | {row['clients_ok']} | {row['clients_failed']} | {last:.3f} | {100 * (last / clean - 1):+.1f} % | "
               f"{shown} |")  # fmt: skip
    yield ("\nWhere both columns add up to more than the clean run's answers, a round had fewer than its quorum of "
           f"{-(-SETTING['clients_per_round'] // 2)} and was asked "
           "again, of other clients; or clients answered twice.")  # fmt: skip
    if better := [name for name, row in found.items() if row["perplexity"][-1] < clean]:
        yield (f'One seed: the run "{better[0]}" ended below the clean one, so differences of that size are chance.')
    yield "\n![Test perplexity by round, one line for all faults that end with the same bits](faults.png)\n"
    yield "What the log says of the first answer that was refused:\n"
    yield "| fault | reason |"
    yield "|---|---|"
    yield from (f"| {name} | {row['reason']} |" for name, row in found.items() if row["reason"])


def picture(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9.5, 6), height_ratios=(1.6, 1), sharex=True, constrained_layout=True
    )
    colours = ("#1c2127", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
    clean = found[NONE]["perplexity"]
    for group, colour in zip(alike(found), cycle(colours), strict=False):
        curve = found[group[0]]["perplexity"]
        words = [f"{curve[-1]:.3f}  {'no fault' if group[0] == NONE else group[0]}", *group[1:]]
        style: dict[str, Any] = {"color": colour, "lw": 1.6, "marker": "o", "ms": 3}
        above.plot(curve, label="\n".join(words), **style)
        below.plot([100 * (own / other - 1) for own, other in zip(curve, clean, strict=True)], **style)
    above.set(ylabel="test perplexity over\nresponse tokens")
    below.set(xlabel="round (0: before training)", ylabel="against the clean\nrun, %", xlim=(-0.3, len(clean) - 0.7))
    below.set_xticks(range(0, len(clean), 2))
    for axis in (above, below):
        axis.grid(axis="y", color="#e4e7ea", lw=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right center", labelspacing=1.2, alignment="left",
                  title="final perplexity, and faults\nthat end with the same bits")  # fmt: skip
    figure.savefig(HERE / "faults.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], Path(sys.argv[3]), sys.argv[4:] == ["resume"])
    elif sys.argv[1:] == ["page"]:
        results = json.loads((HERE / "results.json").read_text())
        picture(results)
        (HERE / "README.md").write_text("\n".join(lines(results)) + "\n")
    elif not sys.argv[1:]:
        everything()
    else:
        sys.exit(__doc__)
