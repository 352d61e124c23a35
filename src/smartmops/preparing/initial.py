"""Experts that start from real text they are meant for. Knows tokenised instructions; no gate, no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smartmops.attention.packed import IGNORED
from smartmops.backbone import halves
from smartmops.evaluation.perplexity import batch_for
from smartmops.experts import keys_values
from smartmops.tokens.batches import Collator, Encoded

SINKS = 4  # tokens at the start of a text that attention rests on, whatever they say


@torch.no_grad()
def initialise(model: Any, rows: Sequence[Encoded], collator: Collator, expert_of: Sequence[int], seed: int) -> None:
    """Each expert starts from real text it is meant for: `expert_of` says for which row which expert.

    Keys and values are those of consecutive tokens of an instruction; hidden states are single ones at the injection
    layer. Columns that every row sees start from instructions of any task. No attention sink (the first tokens) is
    among them, unless an instruction has nothing else; hidden states of a plain frame are drawn from all of it, as the
    results on the embedded base have it.
    """
    layer = model.base_model.layer()
    config = layer.configs["default"]
    config.initialised = True
    generator = torch.Generator().manual_seed(seed)
    members = [[i for i, e in enumerate(expert_of) if e == expert] for expert in range(config.num_experts)]
    if config.experts == "keys_values":
        _from_keys_values(model, rows, members, generator)
        return
    pools = [(own or list(range(len(rows))), config.prompts_per_expert) for own in members]
    prompts = layer.mops_prompts["default"]
    prompts.copy_(torch.cat([_hidden(model, rows, own, count, collator, generator) for own, count in pools]))
    if config.shared_prompts:
        every = list(range(len(rows)))
        layer.mops_shared["default"].copy_(_hidden(model, rows, every, config.shared_prompts, collator, generator))


def _hidden(
    model: Any, rows: Sequence[Encoded], own: Sequence[int], count: int, collator: Collator, generator: torch.Generator
) -> Float[Tensor, "count hidden"]:
    """Hidden states at the injection layer, of one token each of as many instructions."""
    drawn = torch.randint(len(own), (count,), generator=generator).tolist()
    batch = batch_for(model, [rows[own[i]] for i in drawn], collator)
    hidden = model.base_model.hidden_at_injection(batch["input_ids"], batch["attention_mask"])
    read = batch["attention_mask"].bool() & (batch["labels"] == IGNORED)
    if model.base_model.layer().configs["default"].gate_reads == "own":
        past_sinks = read & (batch["attention_mask"].cumsum(-1) > SINKS)
        read = torch.where(past_sinks.any(-1, keepdim=True), past_sinks, read)
    at = torch.multinomial(read.float().cpu(), 1, generator=generator)[:, 0]
    found: Tensor = hidden[torch.arange(count), at].float()
    return found


def _from_keys_values(
    model: Any, rows: Sequence[Encoded], members: Sequence[Sequence[int]], generator: torch.Generator
) -> None:
    layer = model.base_model.layer()
    config, every = layer.configs["default"], list(range(len(rows)))
    parts = [_columns(layer, rows, own or every, config.prompts_per_expert, generator) for own in members]
    parts += [_columns(layer, rows, every, config.shared_prompts, generator)] if config.shared_prompts else []
    for name in ("key", "value"):
        columns = torch.cat([getattr(part, f"{name}s") for part in parts])
        scale = keys_values.size(columns)
        getattr(layer, f"mops_{name}_size")["default"].copy_(scale)
        columns = columns / scale[None, :, None, None]
        if name == "value" and config.prefix_attention == "linear":
            columns.zero_()
        getattr(layer, f"mops_{name}s")["default"].copy_(columns[: config.num_prompts])
        if config.shared_prompts:
            getattr(layer, f"mops_shared_{name}s")["default"].copy_(columns[config.num_prompts :])


def _columns(
    layer: Any, rows: Sequence[Encoded], own: Sequence[int], count: int, generator: torch.Generator
) -> keys_values.Columns:
    """Keys and values of `count` tokens, as consecutive as the instructions of `own` allow."""
    backbone, found = layer.engine.backbone, list[keys_values.Columns]()
    device = halves.device_of(backbone)
    while (missing := count - sum(len(part.keys) for part in found)) > 0:
        row = rows[own[int(torch.randint(len(own), (1,), generator=generator))]]
        first, last = _own_text(row)
        width = min(missing, last - first)
        start = first + int(torch.randint(last - first - width + 1, (1,), generator=generator))
        ids = torch.tensor([row.input_ids[: start + width]], device=device)
        part = keys_values.observe(backbone, layer.index, ids, start + width)
        found.append(keys_values.Columns(part.keys[start:], part.values[start:]))
    return keys_values.Columns(torch.cat([p.keys for p in found]), torch.cat([p.values for p in found]))


def _own_text(row: Encoded) -> tuple[int, int]:
    """The longest run of tokens that the gate reads, past the sinks where there is anything behind them."""
    count = row.labels.count(IGNORED)
    mask = [1] * count if row.gate_mask is None else list(row.gate_mask[:count])
    best, start = (0, max(count, 1)), None
    runs = []
    for i, read in enumerate([*mask, 0]):
        if read and start is None:
            start = i
        elif not read and start is not None:
            runs.append((start, i))
            start = None
    if runs:
        best = max(runs, key=lambda run: run[1] - run[0])
    return (SINKS, best[1]) if best[0] < SINKS < best[1] else best
