"""Write the embedded base from a pretraining run: bf16 safetensors, tokenizer, loss curve and model card.

python experiments/tiny_base/export.py [--work experiments/tiny_base/work] [--out src/smartmops/tiny/base]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# The embedded base of smartmops

A Llama-architecture causal language model of {parameters:,} parameters ({layers} layers, hidden size {hidden},
{vocabulary:,} byte-level BPE tokens), pretrained on {tokens:,} tokens by `experiments/tiny_base/pretrain.py`. It exists
so that adaptation by prompts can be shown, tested and measured in minutes on two CPU cores. It is no general assistant.

**Trained on** (share of the loss): 65 % episodes of seven generated office tasks, one task and one random house style
per row; 17.5 % few-shot rows of {tasks} Natural Instructions tasks (none of the paper's seven, nor tasks built from
their passages); 17.5 % English Wikipedia (CC BY-SA 3.0) and public-domain books.

**Held out**: every fifth office content by hash (`smartmops.rows.office.part`), and the house styles of adaptation.

**Reads its task from context** (held-out episodes, natural log, per response token):

| example of the episode | nats | perplexity |
|---|---|---|
{shots}

Held-out Wikipedia text: {text:.3f} nats per token, perplexity {text_ppl:.1f}.

**Limits**: knows little beyond the generator's facts; English only; may repeat whatever its sources say.
"""


def picture(rows: list[dict[str, object]], out: Path) -> None:
    """The loss curve, and the in-context measure: loss on the 1st against the 5th example of an episode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name, label in (("office", "office episodes"), ("natural", "text and Natural Instructions")):
        left.plot([r["step"] for r in rows], [r[name] for r in rows], label=label, lw=1.2)
    left.set(xlabel="optimiser step", ylabel="training loss (nats per token)", ylim=(0, 7))
    seen = [r for r in rows if "by_shot" in r]
    for shot, label in ((0, "1st example"), (1, "2nd"), (4, "5th example")):
        right.plot([r["step"] for r in seen], [r["by_shot"][shot] for r in seen], label=label, lw=1.6)  # type: ignore[index]
    right.set(xlabel="optimiser step", ylabel="held-out loss (nats per response token)", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Export the newest state of a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "src/smartmops/tiny/base")
    arguments = parser.parse_args()
    rows = {r["step"]: r for r in map(json.loads, (arguments.work / "loss.jsonl").read_text().splitlines())}
    log = [rows[step] for step in sorted(rows)]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.work / "tokenizer")
    state = {n[6:]: t for n, t in load_file(arguments.work / "state.safetensors").items() if n.startswith("model.")}
    hidden = state["model.norm.weight"].numel()
    layers = len({n.split(".")[2] for n in state if n.startswith("model.layers.")})
    ff = state["model.layers.0.mlp.gate_proj.weight"].shape[0]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        rope_theta=10_000.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    last = [r for r in log if "by_shot" in r][-1]
    shots = "\n".join(f"| {i + 1} | {x:.3f} | {math.exp(x):.2f} |" for i, x in enumerate(last["by_shot"]))
    card = CARD.format(
        parameters=model.num_parameters(), layers=layers, hidden=hidden, vocabulary=len(tokenizer), shots=shots,
        tokens=last["step"] * (16 * 288 + 4 * 512), tasks=45, text=last["text"], text_ppl=math.exp(last["text"]),
    )  # fmt: skip
    (arguments.out / "README.md").write_text(card)
    (HERE / "loss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    picture(log, HERE / "loss.png")


if __name__ == "__main__":
    main()
