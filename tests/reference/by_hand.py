"""The method computed by hand: columns concatenated, one explicit mask, plain transformers.

The reference that the library is tested against, so it imports nothing from the library. It is slow and simple: no key
or value is ever reused, prompts are columns like any other, and whatever enters a decoder layer can be replaced.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

HIDE = torch.finfo(torch.float32).min


class Null(NamedTuple):
    """What tells a text unlike all instructions: basis [r, d], centres [c, r], direction [d], cut [3]."""

    basis: Tensor
    centres: Tensor
    direction: Tensor
    cut: Tensor


class Prompts(NamedTuple):
    """Everything trained, as plain tensors: experts [E*P, d], gate [d_g, d] and [G, d_g], recovery [R, d]."""

    experts: Tensor
    gate_in: Tensor
    gate_out: Tensor
    gate_mean: Tensor
    gate_scale: Tensor
    recovery: Tensor
    shared: Tensor | None = None  # [S, d]
    gate_bias: Tensor | None = None  # [G]
    null: Null | None = None


class Outcome(NamedTuple):
    logits: Tensor  # of the text columns only
    gate: Tensor  # [batch, experts or prompts]
    pooled: Tensor  # [batch, d], what the gate reads


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return next(getattr(model.base_model, name) for name in ("layers", "h") if hasattr(model.base_model, name))


def entering(model: PreTrainedModel, index: int, replace: Tensor | None = None, **inputs) -> Tensor:
    """What enters decoder layer `index`, where `replace` (if given) enters layer 0 instead of the embeddings."""
    seen: list[Tensor] = []
    layers = decoder_layers(model)
    with ExitStack() as stack:
        if replace is not None:
            stack.enter_context(_removed(layers[0].register_forward_pre_hook(lambda _, args: (replace, *args[1:]))))
        stack.enter_context(_removed(layers[index].register_forward_pre_hook(lambda _, args: seen.append(args[0]))))
        model.base_model(use_cache=False, **inputs)
    return seen[0]


def leaving(model: PreTrainedModel, start: int, columns: Tensor, scale: Tensor | None = None, **inputs) -> Tensor:
    """Logits of all columns where `columns` enter layer `start`; each layer's input is multiplied by `scale` first."""

    def hook(_, args, index):
        hidden = columns if index == start else args[0]
        return (hidden if scale is None else hidden * scale.to(hidden.dtype), *args[1:])

    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            if index >= start:
                handle = layer.register_forward_pre_hook(lambda m, args, index=index: hook(m, args, index))
                stack.enter_context(_removed(handle))
        # the layers below `start` also run, on zeros; nothing reads what they say
        return model(inputs_embeds=torch.zeros_like(columns), use_cache=False, **inputs).logits


def null_weight(config, prompts: Prompts, pooled: Tensor) -> Tensor:
    """What each row leaves to the base: 1 from the threshold on."""
    lost = torch.zeros(len(pooled))
    if prompts.null is None:
        return lost
    for row, a in enumerate((pooled - prompts.gate_mean) / prompts.gate_scale):
        basis, centres, direction, cut = prompts.null
        nearest = min(((basis @ a - centre) ** 2).sum() for centre in centres)
        share = torch.maximum(cut[1] * (nearest.log() - cut[0]), direction @ a - cut[2]).sigmoid()
        lost[row] = 1.0 if share >= config.null_threshold else share
    return lost


def gate_weights(config, prompts: Prompts, pooled: Tensor) -> Tensor:
    """Weight of each group in each row, less what goes to the null expert."""
    standard = (pooled - prompts.gate_mean) / prompts.gate_scale
    scores = torch.relu(standard @ prompts.gate_in.T) @ prompts.gate_out.T
    scores = scores if prompts.gate_bias is None else scores + prompts.gate_bias
    weights = (scores / config.gate_temperature).softmax(-1)
    if config.gate_top_k is not None:
        kept = torch.zeros_like(weights).scatter(-1, weights.topk(config.gate_top_k).indices, 1.0)
        weights = weights * kept / (weights * kept).sum(-1, keepdim=True)
    return weights * (1 - null_weight(config, prompts, pooled))[:, None]


def logs(weights: Tensor) -> Tensor:
    """What is added to attention logits; its gradient is a number also where a weight is 0."""
    closed = weights == 0
    return weights.masked_fill(closed, 1).log().masked_fill(closed, HIDE)


def by_hand(
    model: PreTrainedModel, config, prompts: Prompts, input_ids, attention_mask, gate_mask, gate=None
) -> Outcome:
    """The whole method on a frozen `model`; `config` needs the fields of MoPsConfig only. `gate` overrides the gate."""
    rows, start = len(input_ids), config.injection_layer
    shared = prompts.experts[:0] if prompts.shared is None else prompts.shared
    recovery, experts, shared = (p.expand(rows, -1, -1) for p in (prompts.recovery, prompts.experts, shared))
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    text = entering(
        model, 0, input_ids=input_ids, attention_mask=attention_mask, position_ids=_usable(model, positions)
    )
    # below the injection layer: recovery prompts, text
    block = _causal(recovery.shape[1])
    below = torch.cat([recovery, text], 1)
    inputs = _inputs(
        model, block, torch.zeros(rows, len(block)), attention_mask, torch.arange(-len(block), 0), positions
    )
    hidden = entering(model, start, replace=below, inputs_embeds=torch.zeros_like(below), **inputs)
    recovery, text = hidden[:, : len(block)], hidden[:, len(block) :]
    if not config.keep_recovery_prompts:
        recovery, block = recovery[:, :0], block[:0, :0]
    pooled = (text * gate_mask[..., None]).sum(1) / gate_mask.sum(1, keepdim=True)
    gate = gate_weights(config, prompts, pooled) if gate is None else gate
    # from the injection layer up: recovery prompts, experts, shared prompts, text
    weight = gate.repeat_interleave(experts.shape[1] // gate.shape[1], 1)  # one for each prompt
    bias, scale, lost = logs(weight * gate.shape[1]), None, null_weight(config, prompts, pooled)[:, None]
    if config.gate_target == "hidden_states":
        ones = torch.ones(rows, 1)
        rest = ones.expand(-1, shared.shape[1] + text.shape[1])
        scale = torch.cat([ones.expand(-1, len(block)), weight, rest], 1)[..., None]
        bias = logs((lost < 1).float()).expand_as(weight)
    expert_block, expert_positions = _expert_block(config)
    at = torch.cat([torch.arange(-len(block), 0), expert_positions, torch.arange(-shared.shape[1], 0)])
    bias = torch.cat([torch.zeros(rows, len(block)), bias, logs(1 - lost).expand(-1, shared.shape[1])], 1)
    blocks = _apart(block, expert_block, _causal(shared.shape[1]))
    inputs = _inputs(model, blocks, bias, attention_mask, at, positions)
    logits = leaving(model, start, torch.cat([recovery, experts, shared, text], 1), scale, **inputs)
    return Outcome(logits[:, -text.shape[1] :], gate, pooled)


def _expert_block(config) -> tuple[Tensor, Tensor]:
    """Who sees whom among the experts' prompts, and their positions."""
    experts, each = config.num_experts, config.prompts_per_expert
    if config.expert_attention == "causal":
        return _causal(experts * each), torch.arange(-experts * each, 0)
    return _apart(*[_causal(each)] * experts), torch.arange(-each, 0).repeat(experts)


def _causal(length: int, window: int | None = None) -> Tensor:
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return torch.zeros(length, length).masked_fill(~seen, HIDE)


def _apart(*blocks: Tensor) -> Tensor:
    """Blocks on the diagonal that do not see each other."""
    seen = torch.block_diag(*[torch.ones_like(block) for block in blocks])
    return torch.block_diag(*blocks).masked_fill(seen == 0, HIDE)


def _inputs(
    model, prompt_block: Tensor, bias: Tensor, attention_mask: Tensor, prompt_at: Tensor, text_at: Tensor
) -> dict:
    """Mask and positions of [prompts, text]: prompts see prompts by their block, text sees all prompts with the bias."""

    def mask(window: int | None) -> Tensor:
        (rows, n), k = attention_mask.shape, len(prompt_block)
        whole = torch.full((rows, 1, k + n, k + n), HIDE)
        whole[:, :, :k, :k] = prompt_block
        whole[:, :, k:, :k] = bias[:, None, None, :]
        whole[:, :, k:, k:] = (
            _causal(n, window).expand(rows, 1, n, n).masked_fill((attention_mask == 0)[:, None, None], HIDE)
        )
        return whole

    window, kinds = getattr(model.config, "sliding_window", None), set(getattr(model.config, "layer_types", None) or ())
    mixed = {"full_attention": mask(None), "sliding_attention": mask(window)}
    positions = torch.cat([prompt_at.expand(len(text_at), -1), text_at], 1)
    return {"attention_mask": mixed if "sliding_attention" in kinds else mask(window),
            "position_ids": _usable(model, positions)}  # fmt: skip


def _usable(model: PreTrainedModel, positions: Tensor) -> Tensor:
    """GPT-2 looks positions up in a table, before layer 0, where `entering` and `leaving` replace the columns anyway."""
    return positions.clamp(min=0) if model.config.model_type == "gpt2" else positions


class _removed:
    def __init__(self, handle):
        self.handle = handle

    def __enter__(self):
        return self.handle

    def __exit__(self, *_):
        self.handle.remove()
