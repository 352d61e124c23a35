"""Learning rates for the tables, on a validation part of the training split: the test split is not looked at.

    python experiments/federated/tune.py federated|central DATA...     NAME=FILE, as for `smartmops reproduce` -> tuning.json

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
from smartmops.flow.trainer import TrainConfig, train
from smartmops.options.training import EMBEDDED_SETTING

HERE = Path(__file__).parent
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "model": "tiny", "batch_size": 1, "max_length": 256, "samples_per_task": 0, "seed": 100, "test_share": 0.1,
    "recovery_prompts": 0,
}  # fmt: skip
ROUNDS = {"clients": 100, "clients_per_round": 10, "rounds": 10, "local_steps": 10, "eval_every": 10}
STEPS = {"steps": 1000, "save_every": 10**9, "log_every": 100, **EMBEDDED_SETTING}
METHODS = {"federated": ("fedprompt", "mops"), "central": ("prompt-tuning", "mops")}


def run(kind: str, **settings: Any) -> float:
    """Validation perplexity over response tokens."""
    if kind == "federated":
        metrics = federate(FederateConfig(**COMMON | ROUNDS | settings))
    else:
        metrics = train(TrainConfig(**COMMON | STEPS | settings))
    found: float = metrics["perplexity"]["overall"]
    return found


def main(kind: str, datas: list[str]) -> None:
    file = HERE / "tuning.json"
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (data.split("=") for data in datas):
            part = Path(folder) / f"{name}.jsonl"
            train, _ = splits(path, 1500, 0.1, 0)
            part.write_text("".join(json.dumps(asdict(example)) + "\n" for example in train))
            for method in METHODS[kind]:
                for rate in RATES:
                    key = f"{name} {kind} {method} {rate:g}"
                    if key in json.loads(file.read_text()):
                        continue
                    found = run(kind, data=str(part), out=Path(folder) / key.replace(" ", "-"), method=method, prompt_lr=rate,
                                activations=str(Path(folder) / "cache"))  # fmt: skip
                    file.write_text(json.dumps(json.loads(file.read_text()) | {key: found}, indent=1) + "\n")
                    print(key, found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 2 and sys.argv[1] in METHODS else sys.exit(__doc__)
