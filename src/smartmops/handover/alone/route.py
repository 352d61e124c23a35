"""Name the expert for each text: onnxruntime, tokenizers and numpy, nothing else.

python route.py FOLDER "text" ["text" ...]

FOLDER holds `router.onnx` (token ids and what of them is read in, weights out), `router.json` (experts, and what the
template writes around a text) and `tokenizer.json`. A JSON line is printed for each text: `expert` (null: the text is
left to the base), `weights` and `left_to_base`, which sum to one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Reader:
    """Texts as the template writes them, and what of them the gate reads."""

    def __init__(self, about: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.about, self.tokenizer = about, tokenizer

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Token ids of a text, and 1 on those that the gate reads."""
        before, after, lead = self.about["before"], self.about["after"], self.about["lead"]
        starts, ends = self.about["trims"]  # where the template takes blanks off
        text = text.lstrip() if starts else text
        text = text.rstrip() if ends else text
        whole, first, last = before + text + after, len(before), len(before) + len(text)
        made = self.tokenizer.encode(whole, add_special_tokens=False)
        reads = [0] * len(lead) + [int(within(whole, start, end, first, last)) for start, end in made.offsets]
        if self.about["reads"] == "all" or not any(reads):
            reads = [1] * len(reads)
        return {"input_ids": [*lead, *made.ids], "reads": reads}


class Router:
    """The gate of a run, without the run."""

    def __init__(self, folder: str) -> None:
        self.about: dict[str, Any] = json.loads((Path(folder) / "router.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.reader = Reader(self.about, tokenizer)
        self.session = onnxruntime.InferenceSession(str(Path(folder) / "router.onnx"))

    def __call__(self, text: str) -> dict[str, Any]:
        """Which expert answers a text, and the weights of all."""
        row = {name: np.array([ids]) for name, ids in self.reader(text).items()}
        weights, left = self.session.run(["weights", "left_to_base"], row)
        named = dict(zip(self.about["experts"], (weights[0] * (1 - left[0])).tolist(), strict=True))
        best = max(named, key=named.__getitem__)
        return {"expert": best if named[best] > 0 else None, "weights": named, "left_to_base": float(left[0])}


def within(text: str, start: int, end: int, first: int, last: int) -> bool:
    """Whether a token from `start` to `end` lies within `first` to `last`; blanks around a word may stand outside."""
    if start >= last or end <= first or start >= end:
        return False
    return not text[start : max(start, first)].strip() and not text[min(end, last) : end].strip()


def main(folder: str, *texts: str) -> None:
    """Print one JSON line for each text."""
    router = Router(folder)
    for text in texts:
        print(json.dumps(router(text), ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
