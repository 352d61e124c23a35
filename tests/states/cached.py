"""A tiny adapted model, rows for it, and what is asked of a cache of their activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smartmops import MoPsConfig
from smartmops.rows.example import Example
from smartmops.states.activations import ActivationCache
from smartmops.tokens.batches import IGNORED, Encoded

VOCABULARY, WIDTH = 300, 32
TRAINED = ("mops_prompts", "mops_gate_in", "mops_gate_out")
EXAMPLES = [
    Example(f"Name number {i}.", "Some context. " * (i % 3), "A word or two."[: 5 + i], "ab"[i % 2]) for i in range(9)
]


def base(dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": VOCABULARY, "attention_dropout": 0.5}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).requires_grad_(False).eval()


def over(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    shape = {"num_experts": 2, "prompts_per_expert": 3, "injection_layer": 2, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, MoPsConfig(**(shape | options)))
    torch.nn.init.normal_(model.base_model.layer().mops_gate_out["default"])
    return model.eval()


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return over(base(dtype), **options)


def made_up(lengths: Sequence[int] = (7, 30, 4, 18, 9, 25, 12, 5)) -> list[Encoded]:
    torch.manual_seed(2)
    rows = []
    for n in lengths:
        ids = torch.randint(3, VOCABULARY, (n,)).tolist()
        rows.append(Encoded(ids, [IGNORED] * (n - 3) + ids[-3:]))
    return rows


def packed(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    ids, labels = ([x for row in rows for x in getattr(row, name)] for name in ("input_ids", "labels"))
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "lengths": lengths}
    if rows[0].gate_embedding is not None:
        batch["pooled"] = torch.stack([row.gate_embedding for row in rows])
    return batch


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(packed=batch).loss
    loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if any(f".{name}." in n for name in TRAINED)]
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in trained}


def apart(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor, the largest difference as a share of its own largest number, none of which may be 0."""
    assert got.keys() == want.keys() and len(want) == 4
    assert all(float(value.abs().max()) > 0 for value in want.values())
    return {name: float((got[name] - each).abs().max()) / float(each.abs().max()) for name, each in want.items()}


def same(one: ActivationCache, two: ActivationCache, tolerance: float = 0.0) -> None:
    assert len(one) == len(two)
    for i in range(len(one)):
        left, right = one.batch([i]), two.batch([i])
        for name in ("labels", "lengths"):
            assert torch.equal(left[name], right[name])
        for name in ("hidden", "pooled"):
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance)


def fill(*args: Any, **options: Any) -> ActivationCache:
    return ActivationCache.fill(*args, **{"progress": False, **options})
