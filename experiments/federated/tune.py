"""Learning rates for the federated tables, on a validation part of the training split: the test split is not looked at.

    python experiments/federated/tune.py DATA...     NAME=FILE, as for `smartmops reproduce` -> tuning.json

Dense embedded base, seed 100, the rounds and steps of the tables. The rate that is best for each method on the mean of the
data sets is the one its table uses.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smartmops.data.tasks import splits
from smartmops.federated.federate import FederateConfig, federate

HERE = Path(__file__).parent
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
SETTING: dict[str, Any] = {
    "clients": 100, "clients_per_round": 10, "rounds": 10, "local_steps": 10, "batch_size": 1, "max_length": 256,
    "eval_every": 10, "samples_per_task": 0, "seed": 100, "test_share": 0.1,
}  # fmt: skip


def main(datas: list[str]) -> None:
    file = HERE / "tuning.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (data.split("=") for data in datas):
            part = Path(folder) / f"{name}.jsonl"
            train, _ = splits(path, 1500, 0.1, 0)
            part.write_text("".join(json.dumps(asdict(example)) + "\n" for example in train))
            for method in ("fedprompt", "mops"):
                for rate in RATES:
                    key = f"{name} {method} {rate:g}"
                    if key not in found:
                        out = Path(folder) / key.replace(" ", "-")
                        metrics = federate(FederateConfig(model="tiny", data=str(part), out=out, method=method, prompt_lr=rate,
                                                          activations=str(Path(folder) / "cache"), **SETTING))  # fmt: skip
                        found = json.loads(file.read_text()) if file.exists() else {}
                        found[key] = metrics["perplexity"]["overall"]
                        file.write_text(json.dumps(found, indent=1) + "\n")
                        print(key, found[key], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
