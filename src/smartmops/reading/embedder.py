"""A second model that embeds the instruction for the gate. Texts in, vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from smartmops.base.names import readable
from smartmops.checks.errors import MissingExtra, RunError
from smartmops.checks.folders import expanded
from smartmops.runs.folder import Run
from smartmops.states.fingerprint import EMBEDDER, of_tokenizer, sampled


class Embedder:
    """A second model embeds the instruction for the gate (paper, footnote 3): any sentence encoder or HF encoder.

    Attributes:
        width: Size of an embedding.
    """

    def __init__(self, name: str) -> None:
        if (Path(name) / "modules.json").exists() or not Path(name).exists():
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise MissingExtra(
                    f"embedder {name!r} needs sentence-transformers: pip install sentence-transformers"
                ) from error
            with readable(name, "--embedder"):
                self.model: Any = SentenceTransformer(name, device="cpu")
            self.tokenizer: Any = getattr(self.model, "tokenizer", None)
            self._encode = self._sentences
        else:
            from transformers import AutoModel, AutoTokenizer

            with readable(name, "--embedder"):
                self.model, self.tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
            self._encode = self._mean
        self.width = len(self(["width"])[0])

    @property
    def told(self) -> str:
        """What tells it from any other: a few numbers of its weights, and its tokenizer if it has a vocabulary."""
        words = of_tokenizer(self.tokenizer) if hasattr(self.tokenizer, "get_vocab") else ""
        return blake2b((sampled(self.model) + words).encode(), digest_size=16).hexdigest()

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """One embedding for each text."""
        found: list[list[float]] = self._encode(list(texts))
        return found

    def _sentences(self, texts: list[str]) -> list[list[float]]:
        return self.model.encode(texts, show_progress_bar=False).tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def _mean(self, texts: list[str]) -> list[list[float]]:
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        found = []
        for start in range(0, len(texts), 64):
            batch = self.tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state
            weight = batch["attention_mask"].unsqueeze(-1)
            found += ((hidden * weight).sum(1) / weight.sum(1)).tolist()
        return found


def of_run(run: Run, name: str) -> Embedder:
    """The embedder of a finished run.

    Raises:
        RunError: it is not here, or its weights or its tokenizer have changed since the run was trained.
    """
    if run.lacks(name, expanded(name)):
        raise RunError(f"the embedder {name} does not exist here, but {run.path} was trained with it: bring it back, "
                       "or go to the folder that it was trained in")  # fmt: skip
    found = Embedder(name)
    then = run.read_inputs().get(EMBEDDER)
    if then is not None and found.told != then:
        raise RunError(f"{name} is not the embedder that {run.path} was trained with, its weights or its tokenizer are "
                       "others: bring that one back, or train again")  # fmt: skip
    return found
