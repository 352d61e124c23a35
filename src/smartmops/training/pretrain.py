"""What comes before training: recovery prompts, experts from real text, and a gate that already tells tasks apart.

Knows instructions and their tasks. The gate's pretraining never sees a response (paper, "Pretraining the gating
function").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import get_peft_model
from rich.progress import track
from sklearn.cluster import KMeans
from torch import Tensor

from smartmops.data.batches import Collator, Encoded, by_budget, pack
from smartmops.options.method import GatePretraining
from smartmops.tuner import MoPsConfig, keys_values
from smartmops.tuner.packed import IGNORED

from .evaluate import batch_for
from .gating import close as close

SINKS = 4  # tokens at the start of a text that attention rests on, whatever they say


def train_recovery(base: Any, rows: Sequence[Encoded], collator: Collator, count: int, steps: int, lr: float,
                   batch_size: int, seed: int) -> Float[Tensor, "R hidden"]:  # fmt: skip
    """P^1: `count` ungated prompts at the input, trained for a few steps so that a compressed base recovers.

    They are one causal expert at injection layer 0, taken off the base again afterwards.
    """
    config = MoPsConfig(num_experts=1, prompts_per_expert=count, injection_layer=0, expert_attention="causal",
                        task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    initialise(model, rows, collator, [0] * len(rows), seed)
    prompts = model.base_model.layer().mops_prompts["default"]
    optimiser = torch.optim.AdamW([prompts], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in track(range(steps), "recovery prompts", transient=True):
        chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        model(**batch_for(model, [rows[i] for i in chosen], collator), use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    found: Tensor = prompts.detach().clone()
    model.unload()
    base.requires_grad_(False)
    return found


def instructions(model: Any, rows: Sequence[Encoded], budget: int = 4096) -> Float[Tensor, "n d_in"]:
    """What the gate reads of each example, before standardisation; the responses are cut off first.

    `budget` tokens go through the lower half at once.
    """
    embedded = [row.gate_embedding for row in rows if row.gate_embedding is not None]
    if embedded:
        return torch.stack(embedded)
    groups = by_budget([row.labels.count(IGNORED) for row in rows], budget)
    found = []
    for group in track(groups, "instructions", transient=True):
        batch = {name: value.to(model.device) for name, value in pack([_instruction(rows[i]) for i in group]).items()}
        found.append(model.base_model.lower(batch)[1])
    order = torch.tensor([i for group in groups for i in group])
    return torch.cat(found)[order.argsort().to(found[0].device)]


def _instruction(row: Encoded) -> Encoded:
    count = row.labels.count(IGNORED)
    mask = None if row.gate_mask is None else row.gate_mask[:count]
    return replace(row, input_ids=row.input_ids[:count], labels=row.labels[:count], gate_mask=mask)


def assign(rows: Sequence[Encoded], pooled: Float[Tensor, "n d_in"], experts: int, how: str, seed: int,
           given: Sequence[str] | None = None) -> tuple[list[int], list[str]]:  # fmt: skip
    """The expert each example is meant for (task labels 1:1, or k-means clusters), and the experts' names.

    Raises:
        ValueError: labels are asked for, but there are none, more tasks than experts, or a task that no expert in
            `given` is meant for.
    """
    tasks = sorted({row.category for row in rows})
    if how == "labels":
        if tasks == [""]:
            raise ValueError("gate_pretraining='labels', but no example has a category: add one, or choose 'clusters'")
        if given is not None and (unknown := [task for task in tasks if task not in given]):
            raise ValueError(f"category {unknown[0]!r} is none of the expert_names {list(given)}: name an expert for "
                             "it, leave its examples out, or choose gate_pretraining='clusters'")  # fmt: skip
        if len(tasks) > experts:
            raise ValueError(f"{len(tasks)} tasks for experts={experts}: choose experts={len(tasks)}, or "
                             "gate_pretraining='clusters'")  # fmt: skip
        names = list(given) if given is not None else tasks
        names += [f"expert {i}" for i in range(len(names), experts)]
        return [names.index(row.category) for row in rows], names
    if len(rows) < experts:
        raise ValueError(f"{len(rows)} examples cannot form {experts} clusters: give more data, or fewer experts")
    standard = (pooled - pooled.mean(0)) / pooled.std(0).clamp(min=1e-6)
    found = KMeans(experts, n_init=4, random_state=seed).fit(standard.cpu().numpy()).labels_.tolist()
    return found, [f"cluster {i}" for i in range(experts)]


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
    device = backbone.get_input_embeddings().weight.device
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


def standardise(model: Any, pooled: Float[Tensor, "n d_in"]) -> None:
    """Store mean and scale of the training instructions as the gate's frozen buffers."""
    layer = model.base_model.layer()
    layer.mops_gate_mean["default"].data.copy_(pooled.mean(0))
    scale = pooled.std(0) if len(pooled) > 1 else torch.ones_like(pooled[0])
    layer.mops_gate_scale["default"].data.copy_(scale.clamp(min=1e-6))


def pretrain_gate(
    model: Any, pooled: Float[Tensor, "n d_in"], expert_of: Int[Tensor, " n"], config: GatePretraining
) -> float:
    """Cross-entropy from instruction embeddings to experts; returns the share of instructions sent to their expert."""
    layer = model.base_model.layer()
    own = layer.configs["default"]
    gate = [layer.mops_gate_in["default"], layer.mops_gate_out["default"]]
    optimiser = torch.optim.Adam(gate, lr=config.gate_pretraining_lr)
    per = own.num_groups // own.num_experts  # under granularity "prompt" an expert's weight is the sum over its prompts

    def log_expert() -> Float[Tensor, "n experts"]:
        log_g: Float[Tensor, "n groups"] = layer.log_gate(pooled, "default")
        return log_g if per == 1 else log_g.view(-1, own.num_experts, per).logsumexp(-1)

    for _ in track(range(config.gate_pretraining_steps), "gate pretraining", transient=True):
        loss = F.nll_loss(log_expert(), expert_of.to(pooled.device))
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        return (log_expert().argmax(-1).cpu() == expert_of).float().mean().item()


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
                raise ImportError(
                    f"embedder {name!r} needs sentence-transformers: pip install sentence-transformers"
                ) from error
            self.model: Any = SentenceTransformer(name, device="cpu")
            self._encode = self._sentences
        else:
            from transformers import AutoModel, AutoTokenizer

            self.model, self.tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
            self._encode = self._mean
        self.width = len(self(["width"])[0])

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
