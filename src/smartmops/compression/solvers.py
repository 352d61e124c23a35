"""One weight matrix and what enters it in, a sparser matrix out. Knows no models, no layers and no text.

SparseGPT after Frantar and Alistarh (2023, arXiv:2301.00774), Wanda after Sun et al. (2023, arXiv:2306.11695).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smartmops.checks.errors import BaseModelError, ConfigError
from smartmops.options.compression import Method, OfEvery, undivided, uneven


@dataclass(frozen=True)
class Pattern:
    """How many weights become zero: a share of all, or `n` of every `m` neighbours along the input axis."""

    share: float  # of zeros
    n: int = 0  # 0: unstructured
    m: int = 0

    @classmethod
    def parse(cls, sparsity: float | None = None, pattern: str | None = None) -> Pattern:
        """From `sparsity`, a share of zeros, or from `pattern`, `n:m` in the paper's notation: prune n of every m.

        Raises:
            ConfigError: neither or both are given, or the value is none of these.
        """
        if (sparsity is None) == (pattern is None):
            raise ConfigError(f"sparsity={sparsity}, pattern={pattern}: give one of them, such as 0.75 or 7:8")
        if pattern is None:
            if not 0 < float(sparsity or 0) < 1:
                raise ConfigError(f"sparsity={sparsity}: choose a share of zeros between 0 and 1, such as 0.75")
            return cls(float(sparsity or 0))
        if said := OfEvery().wrong(pattern):
            raise ConfigError(f"pattern={pattern}{said}")
        n, m = map(int, pattern.split(":"))
        return cls(n / m, n, m)

    def __str__(self) -> str:
        """As the command line takes it."""
        return f"{self.n}:{self.m}" if self.m else f"{self.share:g}"

    def check(self, columns: int, name: str) -> None:
        """Refuse a layer whose number of inputs `m` does not divide.

        Raises:
            ConfigError: it does not.
        """
        if said := undivided(columns, self.m, name):
            raise ConfigError(f"pattern={self}, but {said}")

    def smallest(self, score: Float[Tensor, "out in"], by_row: bool = False) -> Bool[Tensor, "out in"]:
        """True where `score` is to be pruned: exact counts, whatever the ties; `by_row`, the same count in each row."""
        groups, count = score.reshape(1, -1), round(self.share * score.numel())
        if self.m:
            groups, count = score.reshape(-1, self.m), self.n
        elif by_row:
            groups, count = score, round(self.share * score.shape[1])
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(1, groups.topk(count, dim=1, largest=False, sorted=False).indices, True)
        return mask.view_as(score)


@dataclass(frozen=True)
class Solver:
    """SparseGPT's two numbers."""

    block_size: int = 128  # columns solved before the rest is updated; an unstructured mask is chosen per block
    damping: float = 0.01  # share of the Hessian's mean diagonal that is added to its diagonal

    def check(self, pattern: Pattern) -> None:
        """Refuse numbers that cannot work with the pattern.

        Raises:
            ConfigError: naming the one that cannot.
        """
        if said := uneven(self.block_size, pattern.m):
            raise ConfigError(f"block_size={self.block_size}{said}")
        if self.damping < 0:
            raise ConfigError(f"damping={self.damping}: choose 0 or more, such as 0.01")


def inverse_factor(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Upper-triangular U with (H + damping * mean(diag H) * I)^-1 = U^T U.

    Row j of U divided by U[j, j] is the optimal change of the columns not yet visited when column j is pruned. With
    H = R R^T, R upper (Cholesky of H read backwards), U = R^-1: one factorisation and one triangular solve.

    Raises:
        BaseModelError: no damping up to the size of the diagonal itself makes the Hessian positive.
    """
    mean, eye = hessian.diagonal().mean(), torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while damping <= 1:
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * mean * eye).flip(0, 1))
        if not failed.any():
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return factor
        damping = max(10 * damping, 1e-4)
    raise BaseModelError("the inputs of a layer are not finite or all alike, so nothing can be solved for: check the "
                         "model and the calibration text")  # fmt: skip


@torch.no_grad()
def sparsegpt(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], pattern: Pattern, solver: Solver
) -> Float[Tensor, "out in"]:
    """Prune column by column and let the columns to the right make up for it (Algorithm 1 of SparseGPT).

    Args:
        weight: W of y = W x.
        hessian: H = sum over calibration tokens of x x^T, up to a factor.
        pattern: Scores are W^2 / diag(U)^2; of an unstructured mask the smallest of each block go, of n:m those of each
            group when it is reached.
        solver: Block size and damping.
    """
    weight, hessian = weight.float().clone(), hessian.float().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    factor = inverse_factor(hessian, solver.damping)
    for start in range(0, weight.shape[1], solver.block_size):
        columns = slice(start, start + solver.block_size)
        rest = slice(start + solver.block_size, None)
        errors = _block(weight[:, columns], factor[columns, columns], pattern)
        weight[:, rest].addmm_(errors, factor[columns, rest], alpha=-1)
    return weight


def _block(
    weight: Float[Tensor, "out block"], factor: Float[Tensor, "block block"], pattern: Pattern
) -> Float[Tensor, "out block"]:
    """Prune a block in place; returns each column's error over its pivot, which the columns to the right absorb."""
    pivots, errors = factor.diagonal(), torch.zeros_like(weight)
    mask = torch.zeros_like(weight, dtype=torch.bool) if pattern.m else pattern.smallest((weight / pivots).square())
    for j in range(weight.shape[1]):
        if pattern.m and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            mask[:, group] = pattern.smallest((weight[:, group] / pivots[group]).square())
        errors[:, j] = torch.where(mask[:, j], weight[:, j], 0) / pivots[j]
        weight[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    weight.masked_fill_(mask, 0)
    return errors


def wanda(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], pattern: Pattern, solver: Solver
) -> Float[Tensor, "out in"]:
    """Prune the smallest |W| * ||x|| of each row (or group); no weight that stays is changed."""
    return weight.masked_fill(pattern.smallest(weight.float().abs() * hessian.diagonal().sqrt(), by_row=True), 0)


def magnitude(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None, pattern: Pattern, solver: Solver
) -> Float[Tensor, "out in"]:
    """Prune the smallest |W| of the matrix (or group); looks at no input."""
    return weight.masked_fill(pattern.smallest(weight.float().abs()), 0)


SOLVERS: dict[Method, Callable[..., Tensor]] = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
