"""A model folder or hub id in, a frozen model out: plain, pruned, int8 or 4-bit. Its gradient is checked once, here.

Knows quantising libraries by what they do, not by name. Knows no text and no adapters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smartmops.tiny import resolve
from smartmops.tuner.engine import keep_unpacked

Quantisation = Literal["int8", "int8-torchao", "nf4"]
LEAST_COSINE = 0.9


def load_base(model: str, dtype: torch.dtype | str = torch.float32, quantisation: Quantisation | None = None) -> Any:
    """Frozen model in eval mode, on the GPU if there is one, and its tokenizer.

    A quantised one has passed `check_gradient`.

    Args:
        model: A local folder, a hub id, or `tiny`.
        dtype: Of all that is not quantised; `auto`: as stored. What was stored quantised keeps its dtype.
        quantisation: Quantise on the way in: `int8` is LLM.int8(), `nf4` 4-bit NormalFloat (both bitsandbytes),
            `int8-torchao` weight-only int8. None: as stored.

    Raises:
        FileNotFoundError: `model` looks like a path, and there is nothing.
        ImportError: the quantising library is missing; the message has its `pip install` line.
        ValueError: gradients do not pass through the quantised model as they should.
    """
    name = local(model)
    kind = quantisation or quantised_as(model)
    options: dict[str, Any] = {"dtype": dtype}
    if kind is not None:
        _installed(kind)
        options |= {"device_map": {"": torch.cuda.current_device()} if torch.cuda.is_available() else "cpu"}
    if quantisation is not None:
        options["quantization_config"] = _config(quantisation, dtype)
    base = AutoModelForCausalLM.from_pretrained(name, **options)
    if kind is None:
        base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    base = base.requires_grad_(False).eval()
    if kind is not None:
        keep_unpacked(base)
        check_gradient(base)
    return base, AutoTokenizer.from_pretrained(name)


def local(model: str) -> str:
    """The folder or hub id behind a MODEL argument.

    Raises:
        FileNotFoundError: it looks like a path, and there is nothing.
    """
    name = resolve(model)
    if (name.startswith((".", "/", "~")) or Path(name).suffix) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"MODEL {model} does not exist: give a model folder, a hub id, or tiny")
    return name


def _installed(kind: str) -> None:
    packages = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int8-torchao": "torchao"}
    package = packages.get(kind, kind)
    if package == "bitsandbytes":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer and pass on casts to fp16
    if package in ("bitsandbytes", "torchao"):
        try:
            __import__(package)
        except ImportError as error:
            extra = {"bitsandbytes": "int8", "torchao": "torchao"}[package]
            raise ImportError(
                f"a model in {kind} needs the package {package} ({error}): pip install 'smartmops[{extra}]'"
            ) from error


def _config(quantisation: Quantisation, dtype: torch.dtype | str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantisation == "nf4":
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


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
        ValueError: a cosine of less than 0.9, or a backward pass that fails.
    """
    least = 1.0
    for name, module in quantised_linears(model).items():
        for when in ("at load", "after a pass without gradient"):
            try:
                cosine = _cosine(module, model.dtype)
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(
                    f"no gradient flows through {name} ({type(module).__name__}: {error}), so nothing below it can be "
                    "trained: load the model with load_base, or quantise with int8 or nf4"
                ) from error
            if not cosine > LEAST_COSINE:
                raise ValueError(
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


def describe(model: str) -> dict[str, Any]:
    """What names a stored model exactly enough to notice another: files, their sizes and, of a local one, times."""
    folder = Path(local(model)).expanduser()
    if not folder.is_dir():
        return {"name": model}
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    return {"name": str(folder.resolve()), "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}}


def quantised_as(model: str) -> str | None:
    """`quant_method` of a stored model, None where it is not quantised."""
    stored = getattr(AutoConfig.from_pretrained(local(model)), "quantization_config", None)
    return None if stored is None else str(stored.get("quant_method"))
