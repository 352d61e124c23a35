"""Training, reading and generating in bfloat16 on one GPU: MoPs beside PEFT and the bare model, on Llamas of random weights.

    python benchmarks/gpu.py            measures every shape, and writes gpu.json and gpu.md beside itself
    python benchmarks/gpu.py page       writes the page alone, which says "unmeasured" where there is no gpu.json
    python benchmarks/gpu.py tiny OUT   a shape that proves nothing, on whatever device there is; writes into OUT

The shapes are SmolLM2-135M's and Llama-7B's, rows of 512 tokens, attention by torch's own kernels (flash where it
serves). Every number is written as soon as it is measured, so a killed run leaves what it has.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smartmops.methods.baselines import build
from smartmops.options.method import MethodConfig
from smartmops.states.answer_states import AnswerStates
from smartmops.tokens.batches import Encoded

HERE = Path(__file__).parent
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # bfloat16 FLOP/s of the dense product, as sold
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "rows": 16, "length": 512},
    "Llama-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "vocab_size": 32000, "rows": 4, "length": 512},
}  # fmt: skip
TINY = {"tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
                 "vocab_size": 128, "rows": 2, "length": 24}}  # fmt: skip
SHARES = {"a tenth": 0.1, "half": 0.5}  # of a row that is answer
EXPERTS, PROMPTS, REPEATS, NEW = 7, 10, 5, 16


def base(shape: dict[str, Any], device: torch.device) -> Any:
    """A frozen Llama of random weights, made where it runs; every call gives the same."""
    config = LlamaConfig(
        max_position_embeddings=4096, **{k: v for k, v in shape.items() if k not in ("rows", "length")}
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with device:
            return LlamaForCausalLM(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def rows(shape: dict[str, Any], share: float) -> list[Encoded]:
    """Made-up rows of one length."""
    torch.manual_seed(1)
    ids = torch.randint(3, shape["vocab_size"], (shape["rows"], shape["length"])).tolist()
    before = round(shape["length"] * (1 - share))
    return [Encoded(each, [-100] * before + each[before:], header=1) for each in ids]


def adapters(base_of: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """How each side is built."""
    method = MethodConfig(method="mops", experts=EXPERTS, prompts_per_expert=PROMPTS, init="random", null_expert=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=EXPERTS * PROMPTS)
    return {"mops": lambda: build(base_of(), method), "lora": lambda: get_peft_model(base_of(), lora),
            "prompt_tuning": lambda: get_peft_model(base_of(), prompts)}  # fmt: skip


def clocked(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, from an idle device to its end there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, after one for warmth."""
    return median([clocked(call, device) for _ in range(REPEATS + 1)][1:])


def generated(model: Any, ids: torch.Tensor, count: int, **gate: torch.Tensor) -> None:
    """Let the model generate so many tokens, greedily."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    model.generate(**given, **gate, min_new_tokens=count, max_new_tokens=count)


def training(model: Any, name: str, encoded: list[Encoded], device: torch.device) -> dict[str, float]:
    """One step, forward and backward: seconds, and the most memory that was taken."""
    model.train()
    if name == "mops":
        states = AnswerStates(model, encoded)
        batch: dict[str, Any] = send_to_device(states(range(len(encoded))), device)
    else:
        batch = {"input_ids": torch.tensor([row.input_ids for row in encoded], device=device),
                 "labels": torch.tensor([row.labels for row in encoded], device=device)}  # fmt: skip

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, device)
    return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0}


def inference(model: Any, shape: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds to read a row, and to generate a token in batches of 1 and 16."""
    model.eval()
    found = {}
    for batch in (1, 16):
        ids = torch.randint(3, shape["vocab_size"], (batch, shape["length"]), device=device)
        first, all_new = (timed(partial(generated, model, ids, count), device) for count in (1, NEW))
        found |= {f"prefill_{batch}": first, f"decode_{batch}": (all_new - first) / (NEW - 1)}
    return found


def serving(model: Any, shape: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds of reading the gate within a prefill, and of 16 rows whose gate is one expert's, or an expert's each."""
    ids = torch.randint(3, shape["vocab_size"], (16, shape["length"]), device=device)
    wrapper, spent = model.base_model.layer(), list[float]()
    read = wrapper.read

    def reading(*args: Any) -> None:
        spent.append(clocked(partial(read, *args), device))

    wrapper.read = reading
    timed(partial(generated, model, ids[:1], 1), device)
    wrapper.read = read
    experts = torch.arange(16, device=device) % EXPERTS
    given = {name: torch.nn.functional.one_hot(each, EXPERTS).float()
             for name, each in (("one", torch.zeros_like(experts)), ("mixed", experts))}  # fmt: skip
    return {"gate_read": median(spent[1:])} | {
        name: timed(partial(generated, model, ids, NEW, gate_weights=gate), device) for name, gate in given.items()
    }


def useful(shape: dict[str, Any], encoded: list[Encoded]) -> float:
    """Arithmetic that training all tokens of frozen weights needs at least: 2 forward and 2 backward a weight."""
    d, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv = shape.get("num_key_value_heads", shape["num_attention_heads"]) / shape["num_attention_heads"]
    weights = layers * ((2 + 2 * kv) * d * d + 3 * d * shape["intermediate_size"]) + d * shape["vocab_size"]
    return 4.0 * weights * sum(len(row.input_ids) for row in encoded)


def measure(shapes: dict[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Every shape and side; the file is written after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAK.items() if key in name), None)
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "peak": peak, "shapes": shapes, "rows": []}
    for title, shape in shapes.items():
        sides = adapters(lambda shape=shape: base(shape, device)) | {"bare": lambda shape=shape: base(shape, device)}
        for side, made in sides.items():
            model = made().to(device)
            row: dict[str, Any] = {"shape": title, "side": side, "training": {}}
            for said, share in SHARES.items() if side != "bare" else ():
                encoded = rows(shape, share)
                row["training"][said] = training(model, side, encoded, device) | {"flops": useful(shape, encoded)}
            if side in ("mops", "bare"):
                row["inference"] = inference(model, shape, device)
            if side == "mops":
                row["serving"] = serving(model, shape, device)
            found["rows"].append(row)
            (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def _against_lora(found: dict[str, Any]) -> list[str]:
    """What a step of MoPs takes of LoRA's, in a sentence for each shape."""
    of = {(row["shape"], row["side"]): row["training"] for row in found["rows"]}
    said = []
    for shape in found["shapes"]:
        if {(shape, "mops"), (shape, "lora")} <= of.keys():
            ours, lora = of[shape, "mops"], of[shape, "lora"]
            each = (f"{ours[share]['seconds'] / lora[share]['seconds']:.2f} of the time and "
                    f"{ours[share]['bytes'] / max(lora[share]['bytes'], 1):.2f} of the memory where answers are {share} of a row"
                    for share in ours)  # fmt: skip
            said += [f"At {shape}'s shape a step of MoPs takes {' and '.join(each)}, against LoRA's.", ""]
    return said


def page(out: Path) -> list[str]:
    """The page."""
    head = ["# On a GPU", "", "Written by `python benchmarks/gpu.py` from `gpu.json`."]
    if not (out / "gpu.json").is_file():
        return [*head, "", "**Unmeasured**: there is no `gpu.json`. On a machine with a GPU, `python benchmarks/gpu.py` measures "
                "a training step, prefill and decoding in bfloat16 beside PEFT and the bare model, MFU and peak memory, on "
                f"random Llamas of the shapes of {' and '.join(SHAPES)} at 512 tokens."]  # fmt: skip
    found = json.loads((out / "gpu.json").read_text())
    lines = [*head, "", *_against_lora(found), f"{found['device']}, torch {found['torch']}, bfloat16, random weights. MFU counts the arithmetic of all "
             "tokens through all layers for every side, so what MoPs need not compute counts for it.", "",
             "| shape | side | answers | ms a step | peak, GiB | MFU |", "|---|---|---|---|---|---|"]  # fmt: skip
    for row in found["rows"]:
        for said, each in row["training"].items():
            share = f"{each['flops'] / each['seconds'] / found['peak']:.2f}" if found["peak"] else "unknown"
            lines.append(f"| {row['shape']} | {row['side']} | {said} | {1e3 * each['seconds']:.1f} | "
                         f"{each['bytes'] / 2**30:.2f} | {share} |")  # fmt: skip
    measured = {(row["shape"], row["side"]) for row in found["rows"]}
    sides = (*adapters(dict), "bare")
    missing = [f"{shape} / {side}" for shape in found["shapes"] for side in sides if (shape, side) not in measured]
    if missing:
        lines += ["", f"**Not measured:** {', '.join(missing)}."]
    of = {(row["shape"], row["side"]): row["inference"] for row in found["rows"] if "inference" in row}
    lines += ["", "| shape | what | bare, ms | MoPs, ms | MoPs over bare |", "|---|---|---|---|---|"]
    for shape in found["shapes"]:
        if {(shape, "bare"), (shape, "mops")} <= of.keys():
            for what, bare in of[shape, "bare"].items():
                ours = of[shape, "mops"][what]
                lines.append(
                    f"| {shape} | {what.replace('_', ', batch ')} | {1e3 * bare:.2f} | {1e3 * ours:.2f} | {ours / bare:.2f} |"
                )
    lines.append("")
    for row in found["rows"]:
        if "serving" in row:
            each, prefill = row["serving"], row["inference"]["prefill_1"]
            lines.append(f"{row['shape']}: reading the gate takes {each['gate_read'] / prefill:.1%} of a prefill of one row; 16 "
                         f"rows that need different experts are answered at {each['one'] / each['mixed']:.2f} of the speed of "
                         "16 rows of one expert.\n")  # fmt: skip
    return lines


def main(words: list[str]) -> None:
    """As the file says."""
    out = Path(words[1]) if words[:1] == ["tiny"] else HERE
    if words[:1] != ["page"]:
        measure(TINY if words else SHAPES, out)
    (out / "gpu.md").write_text("\n".join(page(out)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
