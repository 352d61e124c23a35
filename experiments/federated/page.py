"""README.md of this folder from ../evidence/results and tuning.json: who held what, bytes, averaging, rates.

python experiments/federated/page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from smartmops.evidence import tables
from smartmops.evidence.tables import Values, figure, gains
from smartmops.report.holdings import save_holdings

HERE = Path(__file__).parent


def results() -> list[dict[str, Any]]:
    """Finished federated cells over a hundred clients."""
    found = [json.loads(file.read_text()) for file in sorted((HERE.parent / "evidence/results").glob("*.json"))]
    return [each for each in found if each["command"] == "federate" and each["settings"].get("clients", 100) == 100]


def weighted(fed: Values) -> str:
    """How expert-weighted averaging did against FedAvg."""
    pairs = [gain for data, base, method in fed if method == "mops"
             for gain in gains(fed[data, base, "mops"], fed.get((data, base, "mops-expert-weighted"), {})).values()]  # fmt: skip
    won = sum(gain > 0 for gain in pairs)
    return (
        f"Averaging each expert by its use against plain FedAvg, both MoPs: lower perplexity in {won} of {len(pairs)} "
        f"pairs of runs (same data, base and seed), by {statistics.mean(pairs):+.1f} ± {statistics.stdev(pairs):.1f} % "
        "(mean and standard deviation over pairs).\n"
    )


def page() -> None:
    federated = results()
    tuning = json.loads((HERE / "tuning.json").read_text())
    first = next(each for each in federated if each["method"] == "mops")
    s, m = first["settings"], first["metrics"]
    lines = [
        "# A hundred skewed clients on the embedded base\n",
        "Written by `python experiments/federated/page.py` from `../evidence/results` and `tuning.json`. Perplexities, gains and "
        "curves by round are in [table 3](../evidence/table3.md); central against federated in [skew](../evidence/skew.md); the "
        "gate before, during and after in [figure 5](../evidence/figure5.md).\n",
        f"{s['clients']} clients, each category of the training split cut as in the paper's appendix A (one part with "
        f"{s['skew']:g} times the examples of each other part), {s['clients_per_round']} clients a round, {s['rounds']} rounds "
        f"of {s['local_steps']} local steps of {s['batch_size']} example; "
        f"{'an expert for each task' if s['experts'] is None else str(s['experts']) + ' experts'} of {s['prompts_per_expert']} "
        f"prompts; {s['limit']:,} examples of each data set, of at most {s['max_length']} tokens. Seeds are of the partition, "
        "the draw of prompts and the order; the split is the same for all.\n",
        "![Who holds what](holdings.png)\n",
        "## Averaging each expert by its use\n",
        weighted(tables.perplexities(federated)),
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
