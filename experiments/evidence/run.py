"""The paper's tables and figures on the embedded base: the one setting of all results in this folder.

    python experiments/evidence/run.py [NAME] [MINUTES]      run what is missing of NAME (all), then write the pages
    python experiments/evidence/run.py pages                 write pages and report.html from results/, run nothing

Data are read from ../shared/data. Killed, it goes on where it was; several may run at once. The results here were made
with one thread each (OMP_NUM_THREADS=1), which gives the same bits again; with more, sums are taken in another order.
"""

from __future__ import annotations

import sys
from pathlib import Path

from smartmops.reproduce.reproduce import ReproduceConfig, reproduce

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared/data"


def config(name: str, budget: float | None = None) -> ReproduceConfig:
    """The paper's setting at a hundredth of its steps."""
    return ReproduceConfig(
        name=name, model="tiny", out=HERE, budget=budget, limit=1500, max_length=256, rounds=10, local_steps=10,
        eval_every=2, data=(f"dolly={SHARED / 'dolly15k/dolly-15k.jsonl'}", f"superni={SHARED / 'superni/paper7'}"),
        activations=str(HERE / "work/activations"), tables_only=name == "pages",
        # Chosen for the federated tables on validation data before: experiments/federated/tuning.json.
        rates={"federate:fedprompt": 10.0, "federate:mops": 3.0, "federate:mops-expert-weighted": 3.0},
    )  # fmt: skip


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    settings = config("all" if wanted == "pages" else wanted, float(sys.argv[2]) if len(sys.argv) > 2 else None)
    settings.tables_only = wanted == "pages"
    reproduce(settings)
