"""A model and token batches in, one decoder layer at a time on the device: hidden states, nats, pruned weights out.

Knows decoder layers and their linear modules. Knows no text, no folders but the one where finished layers are kept.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smartmops.backbone import halves
from smartmops.checks.errors import BaseModelError, ConfigError
from smartmops.checks.folders import replacing
from smartmops.options.compression import Method

from .solvers import SOLVERS, Pattern, Solver

Stats = dict[str, dict[str, int | float]]  # of each linear module: weights, sparsity (share of zeros), error


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    backbone = halves.backbone_of(model)
    layers: nn.ModuleList = getattr(backbone, halves.layers_name(backbone))
    return layers


def linears(model: Any, every_weight: bool = True) -> dict[str, nn.Module]:
    """Every linear module inside the decoder layers by its full name: what pruning prunes.

    Args:
        model: A base.
        every_weight: Whether weights outside them are wrong.

    Raises:
        BaseModelError: weights of a layer are held outside linear modules (fused experts), where they would stay dense.
    """
    layers, kinds = decoder_layers(model), (nn.Linear, Conv1D)
    start = next(name for name, module in model.named_modules() if module is layers)
    found = {f"{start}.{name}": module for name, module in layers.named_modules() if isinstance(module, kinds)}
    covered = {id(parameter) for module in found.values() for parameter in module.parameters()}
    for name, parameter in layers.named_parameters():
        if every_weight and parameter.dim() > 1 and id(parameter) not in covered:
            raise BaseModelError(
                f"{type(model).__name__} holds {start}.{name} {list(parameter.shape)} outside linear "
                "modules, where it would stay dense: choose a model without fused experts"
            )
    return found


def matrix(module: nn.Module) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D holds it the other way round."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def check_fits(modules: dict[str, nn.Module], pattern: Pattern, method: Method, solver: Solver) -> None:
    """Whether every width fits the pattern, and so does the block size where weights are solved for in blocks.

    Raises:
        ConfigError: one does not.
    """
    for name, module in modules.items():
        pattern.check(matrix(module).shape[1], name)
    if method == "sparsegpt":
        solver.check(pattern)


@contextmanager
def on_device(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """The layer on `device` in float32, then back where and as it was: its values must fit its own dtype again."""
    tensors = [*layer.parameters(), *layer.buffers()]
    home = [(tensor.device, tensor.dtype) for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else None)
    try:
        yield
    finally:
        for tensor, place in zip(tensors, home, strict=True):
            tensor.data = tensor.data.to(*place)


@torch.no_grad()
def embed(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """What enters the first decoder layer, float32, where the model is."""
    bottom = halves.lower(halves.backbone_of(model), 0)
    return [bottom(input_ids=ids.to(model.device), use_cache=False).last_hidden_state.float() for ids in batches]


def _through(model: Any, index: int, hidden: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Each batch through one layer (which is on `device`), back where it was."""
    one = halves.layer(halves.backbone_of(model), index)
    for each in hidden:
        yield one(inputs_embeds=each.to(device), use_cache=False).last_hidden_state.to(each.device)


@torch.no_grad()
def check_runs_by_layer(model: Any) -> None:
    """Refuse architectures whose layers, one after another, are not the model.

    Raises:
        BaseModelError: they are not (the backbone scales what comes in, hands more than hidden states on, or the like).
    """
    ids = torch.arange(1, 9, device=model.device)[None] % int(model.config.get_text_config().vocab_size)
    (hidden,) = embed(model, [ids])
    hidden = hidden.to(model.dtype)
    for index in range(len(decoder_layers(model))):
        hidden = halves.layer(halves.backbone_of(model), index)(inputs_embeds=hidden, use_cache=False).last_hidden_state
    got = halves.upper(halves.backbone_of(model), len(decoder_layers(model)))(inputs_embeds=hidden, use_cache=False)
    want = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(got.last_hidden_state, want, rtol=1e-2, atol=1e-2 * float(want.abs().max())):
        raise BaseModelError(f"{type(model).__name__} does not run layer by layer: choose another architecture, such "
                             "as Llama, or prune it elsewhere (any checkpoint with zeros is welcome)")  # fmt: skip


@torch.no_grad()
def nats(
    model: Any,
    batches: Sequence[dict[str, Tensor]],
    device: torch.device | str = "cpu",
    on_layer: Callable[[int], None] = lambda index: None,
) -> tuple[float, int]:
    """Sum of nats, and number, of the labelled tokens of right-padded batches, in float32, one layer at a time.

    Padding comes after the text, so causality hides it and no mask is needed.
    """
    device, layers = torch.device(device), decoder_layers(model)
    quantised = bool(getattr(model, "is_quantized", False))  # such a model is where it must be, and stays as it is
    place = (lambda module, device: nullcontext()) if quantised else on_device
    hidden = embed(model, [batch["input_ids"] for batch in batches])
    hidden = [each.to(model.dtype) for each in hidden] if quantised else hidden
    for index, layer in enumerate(layers):
        with place(layer, device):
            hidden = list(_through(model, index, hidden, device))
        on_layer(index)
    head = copy.copy(model)
    head._modules = dict(model._modules)
    top = halves.upper(halves.backbone_of(model), len(layers))
    head._modules[model.base_model_prefix] = halves.in_its_place(model, top)
    with on_device(head, device):
        return _head_nats(head, hidden, [batch["labels"] for batch in batches], device)


def _head_nats(head: Any, hidden: list[Tensor], labels: list[Tensor], device: torch.device) -> tuple[float, int]:
    """A row at a time: a large vocabulary makes logits the largest tensor of all."""
    total, count = 0.0, 0
    for each, batch in zip(hidden, labels, strict=True):
        for row, target in zip(each, batch, strict=True):
            logits = head(inputs_embeds=row[None].to(device, torch.float32), use_cache=False).logits[0, :-1]
            target = target[1:].to(device)
            total += F.cross_entropy(logits.float(), target, ignore_index=-100, reduction="sum").item()
            count += int((target != -100).sum())
    return total, count


class _Inputs:
    """Sums x x^T of what enters each linear module; modules fed by one tensor (q, k, v; gate, up) share one sum."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}  # the module whose sum each module uses
        self.latest: tuple[str, Tensor] | None = None
        self.handles = [module.register_forward_pre_hook(self._see(name)) for name, module in modules.items()]

    def _see(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.latest is not None and self.latest[1] is args[0]:
                self.first[name] = self.latest[0]
                return
            self.latest, self.first[name] = (name, args[0]), name
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self.sums[name].addmm_(x.T, x)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.latest = None


@torch.no_grad()
def prune(
    model: Any,
    batches: Sequence[Tensor],
    pattern: Pattern,
    method: Method = "sparsegpt",
    solver: Solver | None = None,
    device: torch.device | str | None = None,
    keep: Path | None = None,
    on_layer: Callable[[int], None] = lambda index: None,
) -> Stats:
    """Prune every linear module of the decoder layers in place; embeddings, head and norms are left alone.

    Layer by layer, each seeing what the already pruned layers before it give. Only the layer at work is on `device`;
    model and activations stay where they are.

    Args:
        model: A causal language model, in any float dtype; solved in float32, stored in its own.
        batches: Calibration tokens, each [rows, seq], no padding; magnitude needs none.
        pattern: What becomes zero.
        method: `sparsegpt`, `wanda` or `magnitude`.
        solver: SparseGPT's block size and damping.
        device: Where a layer is solved; None: where the model is.
        keep: Folder of finished layers; those found there are taken over instead of solved.
        on_layer: Told the index of each finished layer.

    Returns:
        Of each linear module its number of `weights`, `sparsity`, the share of zeros reached, and where there are
        calibration tokens `error`, ||(W' - W) X||^2 / ||W X||^2.

    Raises:
        ConfigError: a width does not fit the pattern, there is no calibration, or the architecture is not supported.
    """
    solver, modules = solver or Solver(), linears(model)
    check_fits(modules, pattern, method, solver)
    if not batches and method != "magnitude":
        raise ConfigError(f"method={method} needs calibration text, and got 0 tokens: give some, or choose magnitude")
    device = torch.device(device if device is not None else model.device)
    stored = {name: matrix(module).dtype for name, module in modules.items()}
    was_training = model.training
    model.eval()
    hidden, stats = embed(model, batches), Stats()
    for index, layer in enumerate(decoder_layers(model)):
        inside = set(layer.modules())
        own = {name: module for name, module in modules.items() if module in inside}
        file = keep / f"layer-{index:03d}.safetensors" if keep else None
        found = _take_over(own, file) if file else None
        with on_device(layer, device):
            if found is None:
                found = _prune_layer(model, index, own, stored, hidden, pattern, method, solver, device)
            hidden = list(_through(model, index, hidden, device))
        if file:
            _put_down(own, found, file)
        stats |= found
        on_layer(index)
    model.train(was_training)
    return stats


def _prune_layer(
    model: Any, index: int, own: dict[str, nn.Module], stored: dict[str, torch.dtype], hidden: list[Tensor],
    pattern: Pattern, method: Method, solver: Solver, device: torch.device,
) -> Stats:  # fmt: skip
    """Solve one layer, which is on `device` in float32; what is written fits the dtype it is stored in exactly."""
    inputs = _Inputs(own)
    try:
        for _ in _through(model, index, hidden, device):
            pass
    finally:
        inputs.close()
    stats = Stats()
    for name, module in own.items():
        weight, hessian = matrix(module), inputs.sums.get(inputs.first.get(name, ""))
        if hessian is None and method != "magnitude":
            raise BaseModelError(f"no calibration token went through {name}: choose another architecture or magnitude")
        new = SOLVERS[method](weight, hessian, pattern, solver).to(stored[name]).float()
        stats[name] = {"weights": new.numel(), "sparsity": (new == 0).float().mean().item()}
        if hessian is not None:
            change = new - weight
            lost, whole = ((change @ hessian) * change).sum(), ((weight @ hessian) * weight).sum()
            stats[name]["error"] = (lost / whole).item()
        weight.copy_(new)
    return stats


def _put_down(own: dict[str, nn.Module], stats: Stats, file: Path) -> None:
    """Keep a finished layer: whole or not at all."""
    if file.exists():
        return
    weights = {name: matrix(module).contiguous() for name, module in own.items()}
    with replacing(file) as fresh:
        save_file(weights, fresh, {"stats": json.dumps(stats)})


def _take_over(own: dict[str, nn.Module], file: Path) -> Stats | None:
    """The stats of a layer finished before, its weights put in place; None where there is none, or a damaged one."""
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in own}
            stats: Stats = json.loads(opened.metadata()["stats"])
    except (FileNotFoundError, SafetensorError):
        file.unlink(missing_ok=True)
        return None
    for name, module in own.items():
        matrix(module).copy_(weights[name])
    return stats
