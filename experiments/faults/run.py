"""Clients that misbehave, on the embedded base and the office tasks: what each fault costs.

    python experiments/faults/run.py            runs what is missing of results.json
    python experiments/faults/run.py page       README.md and faults.png from results.json

One federation a fault, all else equal: 20 clients, 5 a round, 20 rounds. In every fault but the last two a fifth of the
clients misbehaves always; the last ones strike 30 % of all answers at random.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "federated"))
AT_RANDOM = {"30 % of answers lost": "killed", "30 % of answers NaN": "NaN"}
SETTING: dict[str, Any] = {
    "model": "tiny", "data": "office", "clients": 20, "clients_per_round": 5, "rounds": 20, "local_steps": 5, "batch_size": 2,
    "prompt_lr": 0.3, "samples_per_task": 0,
}  # fmt: skip


def run(name: str) -> dict[str, Any]:
    from faulty import FAULTS, Faulty

    from smartmops.federated import federate as module

    inner: Any = module.InProcess

    def wrapped(worker: Any) -> Any:
        if name == "none":
            return inner(worker)
        if name in AT_RANDOM:
            return Faulty(inner(worker), FAULTS[AT_RANDOM[name]], probability=0.3)
        return Faulty(inner(worker), FAULTS[name], clients=range(0, 20, 5))

    module.InProcess = wrapped  # type: ignore[assignment,misc]
    try:
        with tempfile.TemporaryDirectory() as folder:
            metrics = module.federate(module.FederateConfig(out=Path(folder) / "run", **SETTING))
    finally:
        module.InProcess = inner  # type: ignore[misc]
    rounds = metrics["rounds"]
    return {
        "perplexity": [row["perplexity"]["overall"] for row in rounds],
        "clients_ok": sum(row.get("clients_ok", 0) for row in rounds),
        "clients_failed": metrics["clients_failed"],
    }


def everything() -> None:
    from faulty import FAULTS

    file = HERE / "results.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in ["none", *FAULTS, *AT_RANDOM]:
        if name not in found:
            found[name] = run(name)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found[name]["perplexity"][-1], flush=True)


def lines(found: dict[str, Any]) -> Iterator[str]:
    clean = found["none"]["perplexity"][-1]
    yield "# What a misbehaving client costs\n"
    yield "Written by `python experiments/faults/run.py page` from `results.json`.\n"
    yield (f"The embedded base and the office tasks, {SETTING['clients']} clients, {SETTING['clients_per_round']} a round, "
           f"{SETTING['rounds']} rounds of {SETTING['local_steps']} local steps. A fault befalls every answer of a fifth of the "
           f"clients; \"30 %\" strikes at random. Test perplexity before the first round {found['none']['perplexity'][0]:.3f}. "
           "One seed.\n")  # fmt: skip
    yield "| fault | answers used | refused or missing | final perplexity | against the clean run |"
    yield "|---|---|---|---|---|"
    for name, row in found.items():
        last = row["perplexity"][-1]
        yield f"| {name} | {row['clients_ok']} | {row['clients_failed']} | {last:.3f} | {100 * (last / clean - 1):+.1f} % |"
    yield "\n![Perplexity by round under each fault](faults.png)"


def picture(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for (name, row), colour in zip(found.items(), colours, strict=False):
        clean = name == "none"
        axis.plot(row["perplexity"], color="black" if clean else colour, lw=2.5 if clean else 1.2, label=name,
                  zorder=3 if clean else 2)  # fmt: skip
    axis.set(xlabel="round", ylabel="test perplexity over response tokens", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(HERE / "faults.png", dpi=130)


if __name__ == "__main__":
    if sys.argv[1:] == ["page"]:
        results = json.loads((HERE / "results.json").read_text())
        picture(results)
        (HERE / "README.md").write_text("\n".join(lines(results)) + "\n")
    elif not sys.argv[1:]:
        everything()
    else:
        sys.exit(__doc__)
