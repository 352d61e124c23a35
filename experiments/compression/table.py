"""README.md and perplexity.png of this folder, from results.json and reference.json. Computes nothing new."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METHODS = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "magnitude": "magnitude"}
ORDER = ("0.9", "0.85", "0.75", "7:8", "3:4", "2:4", "4:8", "0.5")  # the paper's, then 50 %
COLOURS = {"sparsegpt": "#2f9e77", "wanda": "#5b8cc0", "magnitude": "#d9a441"}


def write(here: Path) -> None:
    found = json.loads((here / "results.json").read_text())
    reference = json.loads((here / "reference.json").read_text())
    (here / "README.md").write_text("\n".join(_lines(found, reference)) + "\n")
    _picture(found, here / "perplexity.png")


def _name(setting: str) -> str:
    return setting if ":" in setting else f"{float(setting):.0%}"


def _cells(found: dict[str, Any], text: str, method: str, setting: str, key: str = "perplexity") -> list[float]:
    return [
        cell[key]
        for name, cell in sorted(found[text].items())
        if name.startswith(f"{method}/{setting}/") and key in cell
    ]


def _told(values: list[float], digits: int = 1) -> str:
    if not values:
        return "not measured"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _lines(found: dict[str, Any], reference: dict[str, Any]) -> Iterator[str]:
    yield "# What compression costs the embedded base\n"
    yield "Written by `python experiments/compression/run.py table` from `results.json` and `reference.json`.\n"
    yield (
        "Mean and sample standard deviation over three draws of 128 calibration sequences of 256 tokens; magnitude looks "
        "at no text. n:m prunes n of every m, checked in every group of every layer. Weights are stored in bfloat16.\n"
    )
    yield "![perplexity by pattern](perplexity.png)\n"
    for text, what in (
        ("wiki", "held-out Wikipedia text (all tokens)"),
        ("office", "held-out office examples (response tokens)"),
    ):
        if text in found:
            yield from _perplexity(found, text, what)
    yield from _verdict(found)
    if "train" in found:
        yield from _training(found["train"])
    if "forms" in found:
        yield from _forms(found["forms"])
    yield from _solvers(reference)


def _perplexity(found: dict[str, Any], text: str, what: str) -> Iterator[str]:
    dense = found[text]["dense"]
    digits = 1 if dense["perplexity"] > 20 else 2
    yield f"## Perplexity on {what}\n"
    yield f"{dense['held_out_tokens']} tokens, calibrated on the same kind of text, never the same text.\n"
    yield "| | " + " | ".join(METHODS.values()) + " | SparseGPT + int8 | + int8 (torchao) | + NF4 |"
    yield "|---" * 7 + "|"
    quantised = [f"{dense[key]:.{digits}f}" for key in ("int8", "int8-torchao", "nf4")]
    yield f"| dense | {dense['perplexity']:.{digits}f} | | | " + " | ".join(quantised) + " |"
    for setting in ORDER:
        cells = [_told(_cells(found, text, method, setting), digits) for method in METHODS]
        cells += [
            _told(_cells(found, text, "sparsegpt", setting, key), digits) for key in ("int8", "int8-torchao", "nf4")
        ]
        yield f"| {_name(setting)} | " + " | ".join(cells) + " |"
    yield ""


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    """What was to be shown, counted."""
    yield "## Orders\n"
    for text in ("wiki", "office"):
        if text not in found:
            continue
        ladder = [[found[text]["dense"]["perplexity"]] * 3] + [
            _cells(found, text, "sparsegpt", s) for s in ("0.5", "0.75", "0.85", "0.9")
        ]
        rising = sum(all(a < b for a, b in itertools.pairwise(run)) for run in zip(*ladder, strict=True))
        below = {
            other: sum(
                mine < theirs
                for setting in ORDER
                for mine, theirs in zip(
                    _cells(found, text, "sparsegpt", setting),
                    _cells(found, text, other, setting) * (3 if other == "magnitude" else 1),
                    strict=True,
                )
            )
            for other in ("wanda", "magnitude")
        }
        total = len(ORDER) * 3
        yield (
            f"- {text}: dense < 50 % < 75 % < 85 % < 90 % in {rising} of 3 draws; SparseGPT below Wanda in "
            f"{below['wanda']} of {total} cells, below magnitude in {below['magnitude']} of {total}."
        )
    yield ""


def _training(train: dict[str, Any]) -> Iterator[str]:
    yield "## MoPs on quantised bases\n"
    yield (
        "Office tasks, 40 steps of 16 examples, three seeds; the same weights quantised, and dequantised to bfloat16 before "
        "training. Perplexity over response tokens.\n"
    )
    yield "| base | frozen | MoPs | frozen, dequantised | MoPs, dequantised | MoPs, quantised / dequantised |"
    yield "|---" * 6 + "|"
    for setting in ("dense", "0.75"):
        for kind in ("int8", "nf4"):
            runs = [[cell for name, cell in sorted(train.items()) if name.startswith(f"{setting}/{form}/")]
                    for form in (kind, f"{kind}, dequantised")]  # fmt: skip
            if not all(runs):
                continue
            cells = [_told([c[key] for c in run], 3) for run in runs for key in ("frozen", "perplexity")]
            ratio = mean(c["perplexity"] for c in runs[0]) / mean(c["perplexity"] for c in runs[1])
            name = kind if setting == "dense" else f"{kind} + {_name(setting)}"
            yield f"| {name} | " + " | ".join(cells) + f" | {ratio:.4f} |"
    yield ""


def _forms(forms: dict[str, Any]) -> Iterator[str]:
    some = next(iter(forms.values()))
    yield "## Disk, memory, speed\n"
    yield (
        f"A random Llama of {some['parameters'] / 1e6:.0f} M parameters (hidden size 1,024, 4 layers), 4 rows of 128 tokens, "
        f"{some['threads']} CPU threads, medians of 7, sides alternating. Zeros save nothing in dense kernels; int8 and NF4 save "
        "memory and disk, and no time against bfloat16. Memory is what transformers counts, which for torchao's int8 is the outer "
        "dtype. 2:4 kernels of GPUs: not measured, there was no GPU.\n"
    )
    yield "| | disk, MB | memory, MB | forward, ms | forward and backward, ms |\n|---|---|---|---|---|"
    for name, form in forms.items():
        yield (
            f"| {name} | {form['disk_bytes'] / 1e6:.0f} | {form['memory_bytes'] / 1e6:.0f} | {form['forward_ms']:.0f} | "
            f"{form['forward_and_backward_ms']:.0f} |"
        )
    yield ""


def _solvers(reference: dict[str, Any]) -> Iterator[str]:
    yield "## Our solver against others\n"
    runs = reference["rows"]
    ratios = [run["ours"] / run["theirs"] for run in runs]
    dense = [run["ours"] / run["textbook"] for run in runs]
    yield (
        f"||(W' - W) X||² / ||W X||² on correlated inputs, {len(runs)} cases (layers, seeds, patterns). Ours / llmcompressor's own "
        f"solver ({reference['versions']['llmcompressor']}): {min(ratios):.4f} to {max(ratios):.4f}. Ours / the method as the paper "
        f"writes it, with an inverse at every column in float64: {min(dense):.4f} to {max(dense):.4f}."
    )


def _picture(found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    texts = [text for text in ("wiki", "office") if text in found]
    figure, axes = plt.subplots(1, len(texts), figsize=(6 * len(texts), 3.8), constrained_layout=True, squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        dense = found[text]["dense"]["perplexity"]
        for i, (method, label) in enumerate(METHODS.items()):
            values = [_cells(found, text, method, setting) for setting in ORDER]
            at = [place + 0.25 * (i - 1) for place in range(len(ORDER))]
            spread = [stdev(v) if len(v) > 1 else 0 for v in values]
            axis.bar(
                at, [mean(v) for v in values], 0.23, yerr=spread, color=COLOURS[method], label=label, ecolor="#333"
            )
        axis.axhline(dense, color="#9aa3ad", lw=1, label="dense")
        axis.set_yscale("log")
        ticks = [n for n in (100, 150, 200, 300, 400, 600, 1000) if n < 1.1 * max(mean(v) for v in values)]
        axis.set_yticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_ylim(dense * 0.9)
        axis.set_xticks(range(len(ORDER)), [_name(s) for s in ORDER])
        axis.set(xlabel="pruned", ylabel="perplexity, log scale")
        axis.set_title("Wikipedia, all tokens" if text == "wiki" else "office tasks, response tokens", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
