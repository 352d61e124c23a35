"""What compression costs the embedded base: three ways to prune, eight patterns, three calibration seeds, int8 and NF4.

python experiments/compression/run.py prune [--text wiki]   perplexity of every cell; resumes -> results.json
python experiments/compression/run.py train                        MoPs on quantised against dequantised bases
python experiments/compression/run.py forms                        disk, memory and speed of each form -> results.json
python experiments/compression/run.py table                        README.md and picture from the results files
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import write
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from smartmops.base import load_base
from smartmops.compression import calibration, layerwise
from smartmops.compression.solvers import Pattern
from smartmops.flow.trainer import TrainConfig, train
from smartmops.options.training import EMBEDDED_SETTING
from smartmops.runs.folder import write_text
from smartmops.tiny import BASE

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
TEXTS = {"wiki": str(HERE.parents[2] / "shared/data/text/wiki_en.txt.xz")}  # more kinds of text may be added
SETTINGS = ("0.5", "0.75", "0.85", "0.9", "7:8", "3:4", "2:4", "4:8")  # the paper's seven, and 50 %
METHODS = ("sparsegpt", "wanda", "magnitude")
SEEDS = (0, 1, 2)  # of the draw of calibration sequences
SEQUENCES, LENGTH, ROWS = 128, 256, 128  # calibration sequences, tokens of each, rows of held-out text
QUANTISATIONS = ("int8", "int8-torchao", "nf4")


def put(section: str, key: str, value: Any) -> None:
    """Add one result, whole or not at all."""
    found = results()
    found.setdefault(section, {})[key] = value
    write_text(RESULTS, json.dumps(found, indent=1) + "\n")


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def parse(setting: str) -> Pattern:
    return Pattern.parse(pattern=setting) if ":" in setting else Pattern.parse(float(setting))


def perplexity(model: Any, held_out: list[dict[str, torch.Tensor]]) -> float:
    total, count = layerwise.nats(model, held_out)
    return math.exp(total / count)


def quantised(model: Any, tokenizer: Any, held_out: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {name: perplexity(load_base(folder, "stored", name)[0], held_out) for name in QUANTISATIONS}


def prune(name: str) -> None:
    """Every cell of one text that is not there yet."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = calibration.load(TEXTS[name], base="tiny")
    held_out = calibration.held_out_batches(text, tokenizer, LENGTH, most=ROWS)
    done = results().get(name, {})
    if "dense" not in done:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto").eval()
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in held_out)
        put(name, "dense", {"perplexity": perplexity(model, held_out), "held_out_tokens": tokens}
            | quantised(model, tokenizer, held_out))  # fmt: skip
    for seed in SEEDS:
        rows = calibration.calibration_rows(text, tokenizer, SEQUENCES, LENGTH, seed)
        for setting in SETTINGS:
            for method in METHODS:
                key = f"{method}/{setting}/{seed}"
                if key in done or (method == "magnitude" and seed > 0):  # which sees no calibration text
                    continue
                started = time.perf_counter()
                model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto").eval()
                stats = layerwise.prune(model, list(rows.split(8)), parse(setting), method)
                cell = {
                    "seconds": time.perf_counter() - started,
                    "perplexity": perplexity(model, held_out),
                    "sparsity": exact(model, parse(setting)),
                    "error": statistics.mean(found["error"] for found in stats.values()),
                }
                if method == "sparsegpt":
                    cell |= quantised(model, tokenizer, held_out)
                put(name, key, cell)
                print(name, key, {k: round(v, 4) for k, v in cell.items()}, flush=True)


def exact(model: Any, pattern: Pattern) -> float:
    """The share of zeros over all pruned layers; every group of every layer has its n zeros, or this fails."""
    zeros = total = 0
    for name, module in layerwise.linears(model).items():
        gone = layerwise.matrix(module) == 0
        if pattern.m and not (gone.view(-1, pattern.m).sum(1) == pattern.n).all():
            raise AssertionError(f"{name} leaves the pattern {pattern}")
        zeros, total = zeros + int(gone.sum()), total + gone.numel()
    return zeros / total


def train_all() -> None:
    """MoPs, 40 steps on the office tasks: int8 and int8 + 75 % against the same weights dequantised."""
    work = HERE / "work"
    for setting in ("dense", "0.75"):
        folder = work / f"base-{setting}"
        if not (folder / "config.json").exists():
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(BASE, dtype="auto"),
                AutoTokenizer.from_pretrained(BASE),
            )
            if setting != "dense":
                text = calibration.load("office", base="tiny")
                rows = calibration.calibration_rows(text, tokenizer, SEQUENCES, LENGTH, 0)
                layerwise.prune(model.eval(), list(rows.split(8)), parse(setting))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        for kind in ("int8", "nf4"):
            _quantised_and_dequantised(folder, work, setting, kind)
            for form in (kind, f"{kind}, dequantised"):
                for seed in SEEDS:
                    key = f"{setting}/{form}/{seed}"
                    if key in results().get("train", {}):
                        continue
                    base = work / f"base-{setting}-{form.replace(', ', '-')}"
                    out = work / f"run-{key.replace('/', '-')}"
                    run = train(TrainConfig(model=str(base), data="office", out=out, steps=40, prompt_lr=3.0,
                                            seed=seed, samples_per_task=0, resume=out.exists(),
                                            recovery_prompts=0, dtype="float32", **EMBEDDED_SETTING))  # fmt: skip
                    put("train", key, {"perplexity": run["perplexity"]["overall"],
                                       "frozen": run["perplexity_frozen"]["overall"]})  # fmt: skip


def _quantised_and_dequantised(folder: Path, work: Path, setting: str, kind: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (work / f"base-{setting}-{kind}-dequantised" / "tokenizer.json").exists():
        return
    model, _ = load_base(str(folder), "stored", kind)
    for name, each in ((kind, model), (f"{kind}-dequantised", None)):
        if each is None:
            each = model.dequantize(torch.bfloat16)
        each.save_pretrained(work / f"base-{setting}-{name}")
        tokenizer.save_pretrained(work / f"base-{setting}-{name}")


def forms() -> None:
    """Disk, memory and speed of each form of a random Llama whose matrices are large enough for kernels to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=3072, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
                         num_attention_heads=16, max_position_embeddings=512)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, tuple[Path, Any, Any]] = {}
        for name, pattern in (("dense", None), ("75 %", Pattern.parse(0.75)), ("2:4", Pattern.parse(pattern="2:4"))):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            if pattern:
                layerwise.prune(model, [], pattern, "magnitude")
            path = Path(folder) / name.replace(" ", "").replace(":", "-")
            model.save_pretrained(path)
            AutoTokenizer.from_pretrained(BASE).save_pretrained(path)
            made |= {f"{name}, float32": (path, torch.float32, None), f"{name}, bfloat16": (path, torch.bfloat16, None)}
        for kind in QUANTISATIONS:
            made |= {f"dense, {kind}": (Path(folder) / "dense", torch.bfloat16, kind)}
            made |= {f"75 %, {kind}": (Path(folder) / "75%", torch.bfloat16, kind)}
        ids = torch.randint(0, 3072, (4, 128))
        loaded = {name: load_base(str(path), dtype, kind)[0] for name, (path, dtype, kind) in made.items()}
        times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in made}
        for _ in range(7):  # alternating, so that a slow minute of the machine hits all alike
            for name, model in loaded.items():
                for what, call in (("forward", _forward(model, ids)), ("backward", _backward(model, ids))):
                    started = time.perf_counter()
                    call()
                    times[name][what].append(time.perf_counter() - started)
        for name, model in loaded.items():
            with tempfile.TemporaryDirectory() as saved:
                model.save_pretrained(saved)
                disk = sum(file.stat().st_size for file in Path(saved).glob("*.safetensors"))
            put("forms", name, {
                "disk_bytes": disk, "memory_bytes": model.get_memory_footprint(),
                "forward_ms": 1e3 * statistics.median(times[name]["forward"]),
                "forward_and_backward_ms": 1e3 * statistics.median(times[name]["backward"]),
                "parameters": sum(p.numel() for p in loaded["dense, float32"].parameters()),
                "threads": torch.get_num_threads(),
            })  # fmt: skip


def _forward(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return call


def _backward(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=inputs, use_cache=False).logits.float().logsumexp(-1).sum().backward()

    return call


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "prune":
        for each in [sys.argv[3]] if len(sys.argv) > 3 else list(TEXTS):
            prune(each)
    elif command == "train":
        train_all()
    elif command == "forms":
        forms()
    elif command == "table":
        write(HERE)
    else:
        sys.exit(__doc__)
