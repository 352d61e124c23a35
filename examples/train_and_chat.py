"""Train on chats of your own, see what it brought, and chat. Ends at an empty line.

python examples/train_and_chat.py --model smollm2 --data examples/data/support.jsonl --steps 150 --out runs/support
"""

from __future__ import annotations

import argparse
from pathlib import Path

import smartmops as sm

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a *.gguf file, smollm2 or tiny")
    parser.add_argument("--data", default=str(HERE / "data/support.jsonl"), help="rows with `messages` and `category`")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of 4 examples")
    parser.add_argument("--out", default="runs/support", help="run folder")
    given = parser.parse_args()

    found = sm.train(model=given.model, data=given.data, out=given.out, steps=given.steps, batch_size=4)
    for task, frozen in found["perplexity_frozen"]["per_task"].items():
        print(f"{task}: perplexity {frozen:.2f} frozen, {found['perplexity']['per_task'][task]:.2f} adapted")

    run = sm.load_run(given.out)
    turns: list[dict[str, str]] = []
    while line := input("you> ").strip():
        turns.append({"role": "user", "content": line})
        turns.append({"role": "assistant", "content": run.chat(turns)})
        weights, left = run.latest()
        print(f"model> {turns[-1]['content']}")
        said = f", {left:.0%} left to the base" if left else ""
        print(f"       by {max(weights, key=lambda name: weights[name])}{said}")


if __name__ == "__main__":
    main()
