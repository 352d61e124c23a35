"""Bytes autograd keeps for one training step, by injection layer: the lower half records no graph.

python benchmarks/saved_activations.py      writes saved_activations.json and saved_activations.md beside itself
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smartmops import MoPsConfig

HERE = Path(__file__).parent
LAYERS, HIDDEN, BATCH, LENGTH, PROMPTS = 16, 256, 4, 128, 70


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    return LlamaForCausalLM(config)


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes of distinct tensors saved for backward in one step, parameters not counted."""
    ids = torch.randint(3, 1000, (BATCH, LENGTH))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
    loss.backward()
    return sum(seen.values())


def main() -> None:
    """Measure and write both files."""
    found = {
        str(layer): saved_bytes(get_peft_model(base(), MoPsConfig(injection_layer=layer, task_type="CAUSAL_LM")))
        for layer in range(0, LAYERS, 3)
    }
    peft = saved_bytes(get_peft_model(base(), PromptTuningConfig(num_virtual_tokens=PROMPTS, task_type="CAUSAL_LM")))
    result = {"layers": LAYERS, "hidden": HIDDEN, "batch": BATCH, "length": LENGTH, "prompts": PROMPTS,
              "bytes": found, "peft_prompt_tuning_bytes": peft}  # fmt: skip
    (HERE / "saved_activations.json").write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "saved_activations.md").write_text("\n".join(lines(result)) + "\n")


def lines(result: dict[str, object]) -> Iterator[str]:
    """The table."""
    yield "# Saved activations by injection layer\n"
    yield "Written by `python benchmarks/saved_activations.py` from `saved_activations.json`.\n"
    yield (
        f"A Llama of {result['layers']} layers, hidden {result['hidden']}, float32; {result['batch']} rows of "
        f"{result['length']} tokens, {result['prompts']} prompts; MiB (2^20 bytes) that autograd keeps for backward in one "
        "step, parameters not counted.\n"
    )
    yield "| method | MiB | against PEFT prompt tuning |"
    yield "|---|---|---|"
    peft = float(str(result["peft_prompt_tuning_bytes"]))
    yield f"| PEFT prompt tuning (input) | {peft / 2**20:.1f} | 1.00 |"
    found = result["bytes"]
    assert isinstance(found, dict)
    for layer, value in found.items():
        yield f"| MoPs, injection layer {layer} | {value / 2**20:.1f} | {value / peft:.2f} |"


if __name__ == "__main__":
    main()
