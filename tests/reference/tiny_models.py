"""One tiny random model of each supported architecture, and inputs for them. Offline, seeded; knows nothing of prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS, WIDTH, VOCABULARY = 6, 64, 300
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=300)
GROUPED = dict(SMALL, num_key_value_heads=2)  # fewer key heads than query heads
MODELS = {
    "llama": GROUPED,
    "mistral": dict(GROUPED, sliding_window=None),
    "mixtral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": dict(GROUPED, head_dim=16),
    "gpt_neox": SMALL,
    "gpt2": dict(n_embd=64, n_layer=6, n_head=4, vocab_size=300),
    "phi": SMALL,
    "phi3": SMALL,
    "gemma": dict(GROUPED, head_dim=16),
    "gemma2": dict(GROUPED, head_dim=16),
    "gemma3_text": dict(GROUPED, head_dim=16),
    "olmo2": SMALL,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
}
# transformers itself refuses sdpa for Gemma2: its softcapping of attention logits needs the eager kernel.
KERNELS = [(name, kernel) for name in MODELS for kernel in ("sdpa", "eager") if (name, kernel) != ("gemma2", "sdpa")]


def build(name: str = "llama", kernel: str = "sdpa", seed: int = 0, **changes) -> PreTrainedModel:
    """The same call gives the same weights.

    Weights of standard deviation 0.02 attend almost uniformly, and then a test of attention tests nothing: matrices are
    multiplied by 3.
    """
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(name, **{**MODELS[name], **special, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Three rows of 11 tokens: padded on the left, not padded, padded on the right. The gate reads 5 tokens of each."""
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 8:] = 0
    gate_mask = mask * (mask.cumsum(-1) <= 5)
    return {"input_ids": ids * mask, "attention_mask": mask, "gate_mask": gate_mask}


def relative(got: Tensor, want: Tensor, where: Tensor | None = None) -> float:
    """Largest difference as a fraction of the largest wanted value, over the positions `where` is not 0."""
    if where is not None:
        got, want = got[where.bool()], want[where.bool()]
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
