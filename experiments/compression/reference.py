"""One linear layer pruned by our SparseGPT and by llmcompressor's: is the error the same?

    python experiments/compression/reference.py [--out experiments/compression/reference.json]

Run by hand, with a Python that has llmcompressor and jaxtyping; neither this repository nor its tests need llmcompressor.
`solvers.py` is loaded as a file, because the package around it may want other versions than llmcompressor does.

Every case is solved at every pattern by
    ours       `smartmops.compression.solvers.sparsegpt`
    theirs     `llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify`, unmodified, Hessian included
    textbook   the algorithm as written, in float64: the inverse Hessian of the columns not yet visited is computed anew
               at every column, and every change reaches all of them at once (no Cholesky, no lazy blocks)
    bound      no solver: exact least squares of each row on the mask that `ours` chose, so no weights on it do better
and judged by |(W' - W) X|^2 / |W X|^2 in float64. Both solvers take n:m as prune n of every m.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from torch import Tensor

HERE = Path(__file__).parent
SOLVERS_FILE = HERE.parents[1] / "src/smartmops/compression/solvers.py"
PATTERNS = ("0.5", "0.75", "0.85", "0.9", "2:4", "4:8", "3:4", "7:8")
SEEDS = (0, 1, 2)
BLOCK_SIZE, DAMPING, BATCH, TOLERANCE = 128, 0.01, 512, 0.01


@dataclass(frozen=True)
class Case:
    """A layer's size, how many inputs it sees, and how many of its input channels are always zero."""

    outputs: int
    inputs: int
    samples: int
    silent: int = 0

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}" + f", {self.silent} silent" * bool(self.silent)


# The last: a block that is not full (320 = 2 * 128 + 64), and channels without input.
CASES = (Case(192, 256, 2048), Case(512, 512, 4096), Case(96, 320, 3072, silent=5))


def load_solvers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("solvers", SOLVERS_FILE)
    assert spec and spec.loader
    module = sys.modules["solvers"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


solvers = load_solvers()


def make(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Random weights, and inputs as layers see them: few directions carry most of it, and a few channels are strong."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank, modes = case.inputs // 8, 4
    mixture = torch.randint(modes, (case.samples,), generator=generator)
    bases, centres = normal(modes, rank, case.inputs) / rank**0.5, normal(modes, case.inputs)
    hidden = normal(case.samples, rank)
    x = torch.stack([hidden[i] @ bases[m] + 0.3 * centres[m] for i, m in enumerate(mixture.tolist())])
    x += 0.2 * normal(case.samples, case.inputs)
    order = torch.randperm(case.inputs, generator=generator)
    x[:, order[:4]] *= 10
    x[:, order[4 : 4 + case.silent]] = 0
    return normal(case.outputs, case.inputs) / case.inputs**0.5, x


def ours(weight: Tensor, x: Tensor, pattern: Any) -> Tensor:
    hessian = torch.zeros(x.shape[1], x.shape[1])
    for rows in x.split(BATCH):
        hessian.addmm_(rows.T, rows)
    return solvers.sparsegpt(weight, hessian, pattern, solvers.Solver(BLOCK_SIZE, DAMPING))


@torch.no_grad()
def theirs(weight: Tensor, x: Tensor, pattern: Any) -> Tensor:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.copy_(weight)
    hessian, seen = sgpt_sparsify.make_empty_hessian(layer), 0
    for rows in x.split(BATCH):
        hessian, seen = sgpt_sparsify.accumulate_hessian(rows, layer, hessian, seen)
    return sgpt_sparsify.sparsify_weight(
        module=layer,
        hessians_dict={layer: hessian},
        sparsity=pattern.share,
        prune_n=pattern.n,
        prune_m=pattern.m,
        block_size=BLOCK_SIZE,
        dampening_frac=DAMPING,
        preserve_sparsity_mask=False,
    )[1]


def first_rows(hessian: Tensor) -> list[Tensor]:
    """For every column j, the first row of the inverse of the damped Hessian of columns j and later."""
    hessian = hessian.clone()
    silent = hessian.diagonal() == 0
    hessian[silent, silent] = 1
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    return [torch.linalg.inv(hessian[j:, j:])[0] for j in range(len(hessian))]


def textbook(weight: Tensor, hessian: Tensor, rows: list[Tensor], pattern: Any) -> Tensor:
    weight = weight.double().masked_fill(hessian.diagonal() == 0, 0)
    cost = torch.stack([row[0] for row in rows])  # pruning w in column j costs w^2 / cost[j]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    step = pattern.m or BLOCK_SIZE
    for j, row in enumerate(rows):
        if j % step == 0:
            score = weight[:, j : j + step] ** 2 / cost[j : j + step]
            groups, count = (
                (score, pattern.n) if pattern.m else (score.view(1, -1), round(pattern.share * score.numel()))
            )
            rank = groups.argsort(dim=1, stable=True).argsort(dim=1)
            mask[:, j : j + step] = (rank < count).view_as(score)
        lost = weight[:, j] * mask[:, j]
        weight[:, j:] -= torch.outer(lost / row[0], row)
    return weight.masked_fill(mask, 0)


def bound(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The best weights with these zeros: for each row, the normal equations of the weights that stay."""
    best, weight = torch.zeros_like(hessian[:1]).repeat(len(weight), 1), weight.double()
    alive = hessian.diagonal() > 0
    for i, zero in enumerate(mask):
        kept = (~zero & alive).nonzero()[:, 0]
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[i])
    return best


def error(new: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """|(new - weight) X|^2 / |weight X|^2."""
    weight, change = weight.double(), new.double() - weight.double()
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


def measure(case: Case, seed: int) -> list[dict[str, Any]]:
    weight, x = make(case, seed)
    hessian = x.double().T @ x.double()
    rows, found = first_rows(hessian), []
    for name in PATTERNS:
        pattern = solvers.Pattern.parse(**({"pattern": name} if ":" in name else {"sparsity": float(name)}))
        mine, other = ours(weight, x, pattern), theirs(weight, x, pattern)
        written = textbook(weight, hessian, rows, pattern)
        best = bound(weight, hessian, mine == 0)
        errors = {
            k: error(w, weight, hessian)
            for k, w in (("ours", mine), ("theirs", other), ("textbook", written), ("bound", best))
        }
        found.append(
            {
                "case": str(case),
                "seed": seed,
                "pattern": name,
                **errors,
                "ours/theirs": errors["ours"] / errors["theirs"],
                "ours/textbook": errors["ours"] / errors["textbook"],
                "zeros of ours": int((mine == 0).sum()),
                "zeros of theirs": int((other == 0).sum()),
                "mask differs from theirs": int(((mine == 0) ^ (other == 0)).sum()),
                "mask differs from textbook": int(((mine == 0) ^ (written == 0)).sum()),
            }
        )
        print(" ".join(f"{v:.6g}" if isinstance(v, float) else f"{v}" for v in found[-1].values()), flush=True)
    return found


def write(file: Path, content: dict[str, Any]) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "reference.json")
    out = parser.parse_args().out
    found = [row for case in CASES for seed in SEEDS for row in measure(case, seed)]
    ratios = {k: [row[k] for row in found] for k in ("ours/theirs", "ours/textbook")}
    write(
        out,
        {
            "versions": {n: version(n) for n in ("llmcompressor", "torch", "transformers", "jaxtyping")}
            | {"python": platform.python_version()},
            "setting": {"block_size": BLOCK_SIZE, "damping": DAMPING, "samples": {str(c): c.samples for c in CASES}},
            "range": {k: [min(v), max(v)] for k, v in ratios.items()},
            "within": {k: max(abs(r - 1) for r in v) <= TOLERANCE for k, v in ratios.items()},
            "tolerance": TOLERANCE,
            "rows": found,
        },
    )


if __name__ == "__main__":
    main()
