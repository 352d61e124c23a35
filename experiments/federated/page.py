"""README.md of this folder from results/ and tuning.json: federated and central training side by side.

    python experiments/federated/page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from smartmops.analysis.holdings import save_holdings
from smartmops.reproduce import figures, tables
from smartmops.reproduce.tables import Values, figure, gain

HERE = Path(__file__).parent
DATAS, BASES = ("dolly", "superni"), ("dense", "75%", "85%", "7:8")


def results(command: str) -> list[dict[str, Any]]:
    """Finished cells of one kind and of this page's setting."""
    found = [json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))]
    return [each for each in found if each["command"] == command and each["settings"].get("clients", 100) == 100]


def gains(values: Values, baseline: str, method: str, data: str, base: str) -> list[float]:
    """Percent by seed."""
    first, own = values.get((data, base, baseline), {}), values.get((data, base, method), {})
    return [100 * (1 - own[seed] / first[seed]) for seed in sorted(first.keys() & own.keys())]


def compared(fed: Values, central: Values) -> Iterator[str]:
    """Gains of gating, federated against central."""
    yield "| data | base | gain of MoPs, central | federated | federated, expert-weighted | federated minus central, points |"
    yield "|---|---|---|---|---|---|"
    more, cells = 0, 0
    for data in DATAS:
        for base in BASES:
            inside = gains(central, "prompt-tuning", "mops", data, base)
            outside = gains(fed, "fedprompt", "mops", data, base)
            words = "not run"
            if inside and outside:
                pairs = [o - i for i, o in zip(inside, outside, strict=False)]
                words = spread_of(pairs)
                cells, more = cells + 1, more + (statistics.mean(pairs) > 0)
            yield (f"| {data} | {base} | {gain(central.get((data, base, 'prompt-tuning'), {}), central.get((data, base, 'mops'), {}))} | "
                   f"{gain(fed.get((data, base, 'fedprompt'), {}), fed.get((data, base, 'mops'), {}))} | "
                   f"{gain(fed.get((data, base, 'fedprompt'), {}), fed.get((data, base, 'mops-expert-weighted'), {}))} | {words} |")
    yield ""
    yield f"Gating gained more in the federation than in the centre in {more} of {cells} cells (means over seeds, paired).\n"


def spread_of(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):+.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def weighted(fed: Values) -> str:
    """How expert-weighted averaging did against FedAvg."""
    pairs = [g for data in DATAS for base in BASES for g in gains(fed, "mops", "mops-expert-weighted", data, base)]
    won = sum(g > 0 for g in pairs)
    return (f"Averaging each expert by its use against plain FedAvg, both MoPs: lower perplexity in {won} of {len(pairs)} "
            f"pairs of runs (same data, base and seed), by {spread_of(pairs)} % (mean and standard deviation over pairs).\n")


def page() -> None:
    federated, central = results("federate"), results("train")
    fed, cen = tables.perplexities(federated), tables.perplexities(central)
    tuning = json.loads((HERE / "tuning.json").read_text())
    first = next(each for each in federated if each["method"] == "mops")
    s, m = first["settings"], first["metrics"]
    lines = [
        "# A hundred skewed clients on the embedded base\n",
        "Written by `python experiments/federated/page.py` from `results/` and `tuning.json`.\n",
        f"{s['clients']} clients, each category of the training split cut as in the paper's appendix A (one part with "
        f"{s['skew']:g} times the examples of each other part), {s['clients_per_round']} clients a round, {s['rounds']} rounds "
        f"of {s['local_steps']} local steps of {s['batch_size']} example; {s['experts']} experts of {s['prompts_per_expert']} "
        f"prompts; 1,500 examples of each data set, of at most {s['max_length']} tokens. Central training makes as many steps "
        f"({s['rounds'] * s['clients_per_round'] * s['local_steps']:,} of one example) on all of the data. Perplexity over "
        "response tokens of the test split: mean ± standard deviation over 3 seeds (of the partition, the draw of prompts and "
        "the order; the split is the same). A gain is the reduction of the ungated baseline's perplexity, paired by seed.\n",
        "![Who holds what](holdings.png)\n",
        "## Does gating help more under skew?\n",
        *compared(fed, cen),
        "## Federated (paper, table 3)\n",
        *tables.table("table3", fed, DATAS, BASES, "fedprompt", ("mops", "mops-expert-weighted"), tables.frozen_of(federated)),
        weighted(fed),
        *(f"![Perplexity by round on {data}](rounds_{data}.png)\n" for data in DATAS),
        "## Central (paper, table 2)\n",
        *tables.table("table2", cen, DATAS, BASES, "prompt-tuning", ("mops",), tables.frozen_of(central)),
        "## Bytes\n",
        f"One run: {decimal(m['bytes_down'])} sent to clients, {decimal(m['bytes_up'])} received, "
        f"{m['trainable_parameters']:,} trained numbers, {m['clients_failed']} answers failed.\n",
        "## Learning rates\n",
        "Each method has its own rate for prompts, the best on the mean of both data sets on a validation part of the training "
        "split (dense base, one seed of its own):\n",
        "| data, training, method | " + " | ".join(rates(tuning)) + " |",
        "|---" * (1 + len(rates(tuning))) + "|",
        *tuned(tuning),
    ]  # fmt: skip
    (HERE / "README.md").write_text("\n".join(lines) + "\n")
    held = m["holdings"]
    save_holdings(held["table"], held["names"], HERE / "holdings.png")
    for data in DATAS:
        figures.rounds(federated, BASES, data, HERE / f"rounds_{data}")


def rates(tuning: dict[str, float]) -> list[str]:
    """Those that were tried, in order."""
    return sorted({key.split()[-1] for key in tuning}, key=float)


def tuned(tuning: dict[str, float]) -> Iterator[str]:
    """Validation perplexity by rate."""
    for start in dict.fromkeys(key.rpartition(" ")[0] for key in tuning):
        cells = (f"{figure(tuning[key])}" if (key := f"{start} {rate}") in tuning else "" for rate in rates(tuning))
        yield f"| {start} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    page()
