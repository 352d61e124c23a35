"""How far one set of defaults moves the parameters of differently shaped bases, as a share of their own size.

    python benchmarks/updates.py [--steps 20]       writes updates.json and updates.md beside this file

The embedded base and SmolLM2 as they are; GPT-NeoX, Phi and Qwen2 shapes of random weights at two widths, whose hidden
states, keys and values differ in size by orders of magnitude. All train on the embedded data with the same defaults.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smartmops.base import load_base
from smartmops.data.tasks import read
from smartmops.fitting.loop import fit
from smartmops.options.training import TrainConfig
from smartmops.preparing.adapting import adapt
from smartmops.reading.task import Task

HERE = Path(__file__).resolve().parent
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "gpt_neox, 6 layers of 64": ("gpt_neox", {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}),
    "phi, 8 layers of 256": ("phi", {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8}),
    "qwen2, 12 layers of 512": ("qwen2", {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
                                          "num_key_value_heads": 2}),
}  # fmt: skip
NAMES = ("mops_keys", "mops_values", "mops_gate_in", "mops_gate_out")


def base_of(name: str) -> tuple[Any, Any]:
    """A model and a tokenizer; the random ones speak with the embedded base's tokenizer."""
    if name not in SHAPES:
        return load_base(name, "float32")
    _, tokenizer = load_base("tiny", "float32")
    kind, shape = SHAPES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), intermediate_size=2 * shape["hidden_size"], max_position_embeddings=512,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def rms(x: torch.Tensor) -> float:
    return float(x.float().pow(2).mean().sqrt())


def measure(name: str, steps: int) -> dict[str, Any]:
    model, tokenizer = base_of(name)
    examples = read("office", keep_general_qa=False)[:400]
    config = TrainConfig(model="tiny", data="office", out=HERE, experts=7, steps=steps, batch_size=4, validation_share=0.0,
                         max_length=160, log_every=steps)  # fmt: skip
    task = Task.of(model, tokenizer, examples, examples[:40], config)
    adapted, _, accuracy = adapt(task, config, config, 0)
    layer = adapted.base_model.layer()
    before = {each: getattr(layer, each)["default"].detach().clone() for each in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        fit(adapted, config, config, *task.feed(adapted), Path(folder), lambda row: None)
    moved = {each: getattr(layer, each)["default"].detach() - before[each] for each in NAMES}
    own = {"key": rms(layer.mops_key_size["default"]), "value": rms(layer.mops_value_size["default"])}
    shares = {each: rms(moved[each]) / rms(before[each]) for each in NAMES if rms(before[each]) > 0}
    layers = {each: [rms(moved[each][:, i]) / rms(before[each][:, i]) for i in range(before[each].shape[1])]
              for each in NAMES[:2]}  # fmt: skip
    return {"parameters": sum(p.numel() for p in model.parameters()), "size": own, "moved": shares,
            "moved_by_layer": layers, "gate_accuracy": accuracy}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    lines = [
        "# What one rate moves, on bases of different shapes",
        "",
        f"Written by `python benchmarks/updates.py`: the defaults, {found['steps']} steps of 4 examples of the embedded "
        "data. Root mean square of what changed, as a share of the root mean square before; for keys and values also the "
        "least and most of all layers. The rate is the same everywhere, so the shares should be.",
        "",
        "| base | parameters, M | size of a key | of a value | keys moved | by layer | values moved | by layer | gate moved, in and out |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found["bases"].items():
        cells = [name, f"{each['parameters'] / 1e6:.1f}", f"{each['size']['key']:.3g}", f"{each['size']['value']:.3g}"]
        for kind in NAMES[:2]:
            layers = each["moved_by_layer"][kind]
            cells += [f"{each['moved'][kind]:.3f}", f"{min(layers):.3f} to {max(layers):.3f}"]
        gate = [each["moved"][kind] for kind in NAMES[2:] if kind in each["moved"]]
        cells.append(", ".join(f"{share:.3f}" for share in gate))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    found: dict[str, Any] = {"steps": chosen.steps, "bases": {}}
    for name in ("tiny", "smollm2", *SHAPES):
        found["bases"][name] = measure(name, chosen.steps)
        print(name, json.dumps(found["bases"][name]["moved"]), flush=True)
    (HERE / "updates.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "updates.md").write_text(page(found))


if __name__ == "__main__":
    main()
