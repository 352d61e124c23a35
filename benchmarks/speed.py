"""Speed and memory side by side, from what `smartmops bench` measured.

python benchmarks/speed.py DIR [NOTE]    copies DIR/metrics.json, writes speed.md and growth.png beside itself

Of a base that was named, training is measured as `smartmops bench` starts, and generating with OMP_WAIT_POLICY=active.

Of a random Llama the numbers go to speed.json, of a base that was named to speed_MODEL_DATA.json (where `--only quality`
was measured, over more rows, to speed_MODEL_DATA_quality.json); the page has them all. NOTE says what else there is to know of the measurement.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

HERE = Path(__file__).parent
NAMES = {"mops": "MoPs, cached and packed", "padded": "MoPs, padded and uncached", "prompt_tuning": "PEFT prompt tuning",
         "lora": "PEFT LoRA, r=2, query and value", "prefix_tuning": "PEFT prefix tuning", "fill": "filling the cache"}  # fmt: skip


BASE = {"mops": "MoPs, states cached"}  # where a base was named


def main(folder: Path, out: Path = HERE, note: str = "") -> None:
    """Write all three files; the picture only where growth was measured."""
    found = json.loads((folder / "metrics.json").read_text())
    named = found["setting"].get("model")
    found |= {"note": note} if note else {}
    kind = "_spinning" if found["machine"].get("waiting") == "active" else "_quality" * ([*found["raw"]] == ["quality"])
    name = "speed" if named is None else f"speed_{Path(named).stem}_{Path(found['setting']['data']).stem}{kind}"
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    if "growth" in found:
        picture(found["growth"], out / "growth.png")
    (out / "speed.md").write_text("\n".join(page(out)) + "\n")


def page(out: Path) -> Iterator[str]:
    """Every base that was named, and the random Llama."""
    yield "# Speed and memory\n"
    yield "Written by `python benchmarks/speed.py DIR` from `speed*.json`, which `smartmops bench` measured.\n"
    for file in sorted(out.glob("speed_*.json")):
        yield from named(json.loads(file.read_text()))
    if (file := out / "speed.json").is_file():
        yield from lines(json.loads(file.read_text()))


def named(found: dict[str, Any]) -> Iterator[str]:
    """A base that was named: its targets, and the seconds that the ratios are made of."""
    s, machine, examples = found["setting"], found["machine"], found["examples"]
    spins = machine.get("waiting") == "active"
    waits = (
        "spin where they wait for each other, as `generate` and `serve` have it"
        if spins
        else "soon sleep where they wait for each other, as `train` has it"
    )
    quality = found["raw"].get("quality")
    about = ", generating" if spins else ", until the quality of LoRA" if quality else ""
    yield f"## {s['model']} on {Path(s['data']).stem}{about}\n"
    yield (
        f"`smartmops bench {s['model']} --data {s['data']}`: {examples['count']} examples of at most {s['max_length']} tokens in "
        f"batches of {s['batch_size']}, {examples['tokens']} tokens, {examples['predicted_tokens']} of them answers; {s['experts']} experts of "
        f"{s['prompts_per_expert']} prompts, keys and values seen by answers, states cached. {machine['cores']} cores, "
        f"{machine['threads']} threads, torch {machine['torch']}. Threads {waits}. Sides take turns in one process; medians of {s['repeats']} repeats or "
        "more after a warm-up.\n"
    )
    yield from targets(found)
    yield f"\n{found['note']} On a GPU: {found['gpu']}." if "note" in found else f"\nOn a GPU: {found['gpu']}."
    groups = {name: raw for name, raw in found["raw"].items() if name.startswith("train")}
    if groups:
        sides = list(next(iter(groups.values()))["median_seconds"])
        yield (
            "\n| rows | tokens an example | answers | "
            + " | ".join(f"{BASE.get(side) or NAMES[side]}, examples/s" for side in sides)
            + " |"
        )
        yield "|---|---|---|" + "---|" * len(sides)
        for name, raw in groups.items():
            rates = " | ".join(f"{raw['examples_per_second'][side]:.2f}" for side in sides)
            tokens, answers = (raw[key] / raw["examples"] for key in ("tokens", "predicted_tokens"))
            yield f"| {name.removeprefix('train').strip('_') or 'as drawn'} | {tokens:.0f} | {answers:.0f} | {rates} |"
    if quality:
        runs = ", ".join(
            f"{run['validation_nats']:.3f} after {run['steps']} ({run['seconds']:.0f} s)" for run in quality["mops"]
        )
        yield (f"\nNats a token on {quality['validation_examples']} validation examples: {quality['validation_nats_before']:.3f} "
               f"before, {quality['lora_validation_nats']:.3f} after {quality['lora_steps']} steps of LoRA "
               f"({quality['lora_seconds']:.0f} s); MoPs, each run a schedule of its own from the same start, {runs}; "
               f"{quality['preparing_seconds']:.1f} s of preparing and {quality['states_seconds']:.1f} s of states come before "
               "it.")  # fmt: skip
    if slow := found["raw"].get("busy_neighbour"):
        times = slow["times_slower"]
        yield (f"\nBeside a process that takes one core a step takes {times['mops']:.2f} times as long, LoRA's {times['lora']:.2f} "
               "times.")  # fmt: skip
    yield ""


def targets(found: dict[str, Any]) -> Iterator[str]:
    """Each ratio, and whether it is what it should be."""
    yield "| ratio | what | measured | target | |"
    yield "|---|---|---|---|---|"
    for name, target in found["targets"].items():
        value, bound = found["ratios"][name], ""
        met = {True: "met", False: "**not reached**", None: "" if value is not None else "not measured"}[target["met"]]
        if target["value"] is not None:
            bound = f"{'at least' if target['at_least'] else 'at most'} {target['value']:g}"
        yield f"| {name} | {target['what']} | {'' if value is None else f'{value:.3g}'} | {bound} | {met} |"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The random Llama."""
    yield "## A random Llama\n"
    yield from setting(found)
    yield from targets(found)
    yield f"\nOn a GPU: {found['gpu']}."
    raw = found["raw"]
    for name, section in (("training", training), ("memory", memory), ("matrix_peak", arithmetic)):
        if raw.get(name):
            yield from section(raw[name])
    for name in ("inference", "mixed_batch"):
        if name in raw:
            yield from inference(name, raw[name])
    if "growth" in found:
        yield from growth(found["growth"])


def setting(found: dict[str, Any]) -> Iterator[str]:
    s, machine, examples = found["setting"], found["machine"], found["examples"]
    yield (
        f"A random-weight Llama of {s['layers']} layers, hidden {s['hidden']}, vocabulary {s['vocabulary']}, injection layer "
        f"{s['injection_layer']}, {s['experts']} experts of {s['prompts_per_expert']} prompts, float32. {examples['count']} "
        f"examples of {s['data']} in batches of {s['batch_size']}: {examples['tokens']} tokens (the longest "
        f"{examples['longest']}), {examples['predicted_tokens']} of them predicted, {examples['padded_tokens']} if padded in "
        f"that order. {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}. Sides take turns in "
        f"one process; medians of {s['repeats']} repeats or more after a warm-up.\n"
    )


def training(raw: dict[str, Any]) -> Iterator[str]:
    yield "\n### Training\n"
    yield "Under Hugging Face's `Trainer`, the same batches in the same order; tokens without padding.\n"
    yield "| side | seconds for all examples | examples/s | tokens/s |"
    yield "|---|---|---|---|"
    for name, seconds in raw["median_seconds"].items():
        rates = [raw[key][name] for key in ("examples_per_second", "tokens_per_second")]
        yield f"| {NAMES.get(name, name)} | {seconds:.2f} | {rates[0]:.2f} | {rates[1]:.0f} |"
    yield f"\nThe cache takes {raw['bytes_of_cache'] / 2**20:.1f} MiB."


def memory(raw: dict[str, Any]) -> Iterator[str]:
    yield "\n### Memory\n"
    yield "Resident memory in MiB (2^20 bytes), each side in fresh processes; the model's weights count, the libraries do not.\n"
    yield "| side | before the model | at the peak | taken |"
    yield "|---|---|---|---|"
    for name, taken in raw["bytes_taken"].items():
        ranges = [span(raw[key][name]) for key in ("bytes_before", "bytes_at_peak")]
        yield f"| {NAMES.get(name, name)} | {ranges[0]} | {ranges[1]} | {taken / 2**20:.0f} |"


def span(values: list[int]) -> str:
    low, high = (f"{each / 2**20:.0f}" for each in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def arithmetic(raw: dict[str, Any]) -> Iterator[str]:
    parts, total = raw["flops_per_epoch"], sum(raw["flops_per_epoch"].values())
    yield "\n### Arithmetic\n"
    yield (
        f"All batches once take {total / 1e9:.0f} GFLOP ({', '.join(f'{name} {value / 1e9:.0f}' for name, value in parts.items())}) "
        f"and {raw['seconds_per_epoch']:.2f} s: {total / raw['seconds_per_epoch'] / 1e9:.0f} GFLOP/s, Trainer included. The best "
        f"of square float32 products of size {', '.join(raw['matmul_flops_per_second'])} reaches "
        f"{raw['peak_flops_per_second'] / 1e9:.0f} GFLOP/s, at which the arithmetic alone would take "
        f"{raw['floor_seconds_per_epoch']:.2f} s. [Where the time goes](step_profile.md), by profile.\n"
    )
    yield inspect.cleandoc(raw["formula"])


SIDES = {"bare": "bare model", "bare_in_place": "bare, cache in place", "mops": "MoPs", "lora": "PEFT LoRA for each row",
         "lora_in_place": "the same, cache in place"}  # fmt: skip


def inference(name: str, raw: dict[str, Any]) -> Iterator[str]:
    yield f"\n### {name.replace('_', ' ').capitalize()}\n"
    sections = raw if name == "inference" else {name: raw}
    sides = list(dict.fromkeys(side for values in sections.values() for side in values["tokens_per_second"]))
    yield f"| tokens/s | {' | '.join(SIDES[side] for side in sides)} |"
    yield "|---|" + "---|" * len(sides)
    for each, values in sections.items():
        rates = [
            f"{values['tokens_per_second'][side]:.1f}" if side in values["tokens_per_second"] else "–" for side in sides
        ]
        yield f"| {each} | {' | '.join(rates)} |"
    yield from (like_for_like if name == "inference" else mixed)(raw)


def like_for_like(raw: dict[str, Any]) -> Iterator[str]:
    """What the method alone costs in decoding."""
    rates = {name: values["tokens_per_second"] for name, values in raw.items()}
    costs = [
        f"{name}, {rate['bare_in_place'] / rate['mops']:.3f}" for name, rate in rates.items() if "bare_in_place" in rate
    ]
    if costs:
        yield (
            "\n`generate` under MoPs writes keys and values where they lie; transformers' own cache is copied at every "
            f"step. Against a bare model that is given such a cache, the ratios are: {'; '.join(costs)}. That is the prefix: "
            "its keys and values are read once a step, and its products are added to each attention."
        )


def mixed(raw: dict[str, Any]) -> Iterator[str]:
    """Where the difference comes from."""
    rates, lengths = raw["tokens_per_second"], raw["instruction_tokens"]
    yield (
        f"\nWhole generations. The instructions have {', '.join(map(str, lengths))} tokens, {sum(lengths)} of "
        f"{len(lengths) * max(lengths)} with padding: MoPs reads the real ones only (`tuner/prefill.py`), which PEFT's mixed "
        "batches cannot, since their rows are told apart by place. Against LoRA with a cache in place the ratio is "
        f"{rates['mops'] / rates['lora_in_place']:.2f}, against the bare model with one "
        f"{rates['mops'] / rates['bare_in_place']:.2f}."
    )


def growth(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "\n### Growth\n"
    yield "![Step time and memory over experts, length and data](growth.png)\n"
    yield "A step is forward and backward of one batch from cached activations; memory is what resident memory rises by.\n"
    yield "| experts | prompts of each | ms a step | MiB |"
    yield "|---|---|---|---|"
    for point in found["experts"]:
        yield f"| {point['experts']} | {point['prompts_per_expert']} | {step(point)} |"
    yield "\n| tokens of each row | ms a step | MiB |"
    yield "|---|---|---|"
    for point in found["length"]:
        yield f"| {point['length']} | {step(point)} |"
    yield ""
    yield "| examples | s to fill the cache, on disk | ms to fetch a batch | MiB |"
    yield "|---|---|---|---|"
    for point in found["data"]:
        yield (
            f"| {point['examples']} | {point['fill_seconds']:.1f} | {1e3 * point['batch_seconds']:.2f} | {point['bytes'] / 2**20:.0f} |"
        )


def step(point: dict[str, Any]) -> str:
    if "left_out" in point:
        return f"left out: {point['left_out']} | "
    taken = point["peak_bytes"]
    return f"{1e3 * point['seconds']:.0f} | {'' if taken is None else round(taken / 2**20)}"


def picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three panels, both axes logarithmic: a straight line of slope one is growth in proportion."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    panels = [
        ("experts", "experts", ("seconds", 1e3, "ms a step"), ("peak_bytes", 2**-20, "MiB above the model")),
        ("length", "length", ("seconds", 1e3, "ms a step"), ("peak_bytes", 2**-20, "MiB above the model")),
        ("data", "examples", ("fill_seconds", 1, "s to fill the cache"), ("batch_seconds", 1e3, "ms to fetch a batch")),
    ]
    for left, (panel, x, *series) in zip(axes, panels, strict=True):
        points = [point for point in found[panel] if "left_out" not in point]
        right = left.twinx()
        for axis, (key, scale, label), colour, marker in zip((left, right), series, ("C0", "C1"), "os", strict=True):
            drawn = [point for point in points if point[key]]
            axis.plot([p[x] for p in drawn], [scale * p[key] for p in drawn], colour, marker=marker, markersize=4)
            axis.set(xscale="log", yscale="log")
            values = [scale * p[key] for p in drawn] or [1]
            axis.set_ylim(min(values) / 2, 2 * max(values))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_ylabel(label, color=colour)
        left.set_xlabel({"experts": "experts", "length": "tokens of each row", "examples": "examples"}[x])
        left.set_xticks([p[x] for p in points], [f"{p[x]:g}" for p in points], rotation=30)
        left.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), note=" ".join(sys.argv[2:]))
