"""Quantised linear modules told by what they do: the weight they act by, and whether a gradient passes through them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smartmops.checks.errors import BaseModelError

LEAST_COSINE = 0.9


def quantised_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear modules whose weights are not plain floats."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not _plain(module)
    }


def _plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module) is nn.Linear and type(weight) is nn.Parameter and weight.is_floating_point()


def dense_weight(module: Any, dtype: torch.dtype = torch.float32, most: int | None = None) -> Float[Tensor, "out in"]:
    """The weight a linear module acts by, float32, read off from what it makes of unit vectors of `dtype`.

    `most` limits it to the first so many columns.
    """
    count, device = int(module.in_features), next(module.parameters()).device
    with torch.no_grad():
        return _columns(module, torch.eye(min(most or count, count), count, device=device, dtype=dtype)).T.float()


def _columns(module: nn.Module, units: Float[Tensor, "some in"]) -> Float[Tensor, "some out"]:
    made: Tensor = module(units) - module(torch.zeros_like(units[:1]))
    return made


def check_gradient(model: Any) -> float:
    """Check that what flows back through each quantised linear module is the gradient of what flows forward.

    A quantised module is linear in its input, x -> W x + b. Its columns W[:, s] for some s are read off from unit
    vectors, and the gradient at x for a random g must point along g W[:, s]. Looked at again after a pass in eval mode
    without gradient, where some kernels repack their weights. "The gradient is not zero" would prove nothing: through a
    whole model the residual path alone carries one.

    Returns:
        The smallest cosine found; 1 where nothing is quantised.

    Raises:
        BaseModelError: a cosine of less than 0.9, or a backward pass that fails.
    """
    least = 1.0
    for name, module in quantised_linears(model).items():
        for when in ("at load", "after a pass without gradient"):
            try:
                cosine = _cosine(module, model.dtype)
            except (RuntimeError, NotImplementedError) as error:
                raise BaseModelError(
                    f"no gradient flows through {name} ({type(module).__name__}: {error}), so nothing below it can be "
                    "trained: load the model with load_base, or quantise with int8 or nf4"
                ) from error
            if not cosine > LEAST_COSINE:
                raise BaseModelError(
                    f"the gradient through {name} ({type(module).__name__}) is wrong {when}: its cosine with the right "
                    f"one is {cosine:.3f}, but {LEAST_COSINE} is the least: quantise with int8 or nf4, or load the "
                    "model with load_base"
                )
            least = min(least, cosine)
            training = module.training
            with torch.no_grad():
                module.eval()(_random(module, model.dtype))
            module.train(training)
    return least


def _random(module: Any, dtype: torch.dtype) -> Float[Tensor, "4 in"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, int(module.in_features), generator=generator).to(next(module.parameters()).device, dtype)


def _cosine(module: Any, dtype: torch.dtype, columns: int = 64) -> float:
    x = _random(module, dtype).requires_grad_(True)
    with torch.enable_grad():
        y = module(x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        (got,) = torch.autograd.grad(y, x, g)
    some = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))[:columns].to(x.device)
    with torch.no_grad():
        want = g.float() @ _columns(module, F.one_hot(some, x.shape[1]).to(x)).T.float()
    return F.cosine_similarity(got[:, some].float().flatten(), want.flatten(), dim=0).item()
