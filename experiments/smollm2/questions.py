"""A page for each question, from results/: its first sentence is the answer, worked out from the numbers below it.

Knows files and numbers; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cells import FROZEN
from page import SETS, Found, devices, overall, spread

HARM = 0.005  # share by which the perplexity of text of no task may rise and still count as unharmed
LABELS = {
    "frozen": "frozen base",
    "frozen with a system prompt": "frozen base, a system prompt written by hand",
    "frozen with 4 examples": "frozen base, 4 examples of the task in front",
    "mops": "MoPs, the defaults",
    "mops shared half": "MoPs, half of the columns shared by all tasks",
    "mops seen by all": "MoPs, seen by instructions too",
    "mops separate seen by all from the first layer": "MoPs, a softmax of their own, seen by all, from the first layer",
    "mops top-1": "MoPs, the highest gate weight alone",
    "mops without null": "MoPs without null expert",
    "mops by clusters": "MoPs, no labels (clusters)",
    "oracle": "MoPs, told the task",
    "paper's literal": "MoPs as the paper writes them",
    "ungated": "ungated columns",
    "ungated seen by all": "ungated columns, seen by instructions too",
    "ungated separate seen by all from the first layer": "ungated columns, a softmax of their own, seen by all, from the first layer",
    "lora rate 0.003": "LoRA",
    "lora in all layers": "LoRA in all layers",
    "activated lora": "LoRA seen by answers alone (activated LoRA)",
    "one lora for each task": "a LoRA for each task, told the task",
    "one lora for each task behind our gate": "a LoRA for each task, chosen by our gate",
    "ia3 rate 0.01": "IA3",
    "input prompts rate 0.03": "prompt tuning (PEFT)",
    "prefix tuning rate 0.03": "prefix tuning (PEFT)",
    "mops top-2": "MoPs, top 2 of as many experts as tasks",
    "ungated 20 columns": "ungated, 20 columns",
    "lora as 20 columns": "LoRA of as many numbers as 20 columns",
}
GROWTH = {"mops top-2": "C0", "ungated 20 columns": "C7", "lora as 20 columns": "C1"}
BASES = {
    "": "dense",
    "50": "half of the weights",
    "75": "a quarter of the weights",
    "2-4": "2:4",
    "4-8": "4:8",
    "int8": "int8",
}
TOTAL = {"mops": "C0", "ungated": "C7", "lora rate 0.003": "C1"}
Runs = dict[str, Found]


def value(found: Runs, data: str, variant: str, part: str = "test") -> float | None:
    """The mean over seeds."""
    values = overall(found.get(data, {}).get(variant, {}), part)
    return mean(values) if values else None


def cell(found: Runs, data: str, variant: str, part: str = "test") -> str:
    runs = found.get(data, {}).get(variant, {})
    values = overall(runs, part)
    return f"{spread(values)} ({len(values)})" if values else "not run"


def table(found: Runs, columns: Sequence[tuple[str, str, str]], variants: Sequence[str]) -> Iterator[str]:
    """Rows of variants; a column is a data set, a part of it and its heading."""
    yield "| | " + " | ".join(heading for _, _, heading in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for variant in variants:
        if any(overall(found.get(data, {}).get(variant, {}), part) for data, part, _ in columns):
            shown = (cell(found, data, variant, part) for data, part, _ in columns)
            yield f"| {LABELS.get(variant, variant)} | " + " | ".join(shown) + " |"


def against(found: Runs, data: str, one: str, other: str, part: str = "test") -> str:
    """How far `one` is below or above `other`, in words, over the seeds that both have; the frozen base has no seed."""
    first, second = (found.get(data, {}).get(variant, {}) for variant in (one, other))
    both = [seed for seed in first if seed in second or other == "frozen"]
    if not both or not second:
        return "not measured"
    left = mean(overall({seed: first[seed] for seed in both}, part))
    right = mean(overall(second if other == "frozen" else {seed: second[seed] for seed in both}, part))
    return f"{abs(left / right - 1):.1%} {'below' if left < right else 'above'}"


def names(variants: Sequence[str]) -> str:
    return ", ".join(LABELS.get(variant, variant) for variant in variants)


def best(found: Runs, data: str, kept: Callable[[str], bool] = lambda _: True) -> str:
    """The variant with the lowest perplexity on validation data, of those that are shown and kept."""
    asked = [
        v for v in LABELS if v in found[data] and v not in FROZEN and kept(v) and value(found, data, v, "validation")
    ]
    return min(asked, key=lambda v: value(found, data, v, "validation") or 0.0)


def harmless(found: Runs, data: str) -> Callable[[str], bool]:
    """Whether a variant leaves text of no task no worse than the base."""
    base = value(found, data, "frozen", "unrelated") or 1.0
    return lambda v: (value(found, data, v, "unrelated") or float("inf")) / base - 1 <= HARM


def choices(found: Runs) -> Iterator[str]:
    main = [data for data in SETS if data in found]
    yield "# Gated experts, or what people would pick instead?\n"
    each = "; ".join(
        f"{data}: {LABELS[best(found, data)]}, and of what makes text of no task no worse (by more than {HARM:.1%}), "
        f"{LABELS[best(found, data, harmless(found, data))]}" for data in main
    )  # fmt: skip
    yield f"By perplexity on validation data the best choice is, {each}.\n"
    yield "![Test perplexity against damage to other text](choices.png)\n"
    yield (
        "Test perplexity over answers, mean ± spread over seeds (number of seeds). Rates were chosen on validation data "
        "for MoPs, ungated columns, LoRA, IA3 and prompt tuning from the values in the [ablation](README.md); MoPs, "
        "ungated columns and LoRA train as many numbers.\n"
    )
    yield "\n".join(table(found, [(data, "test", data) for data in main], list(LABELS))) + "\n"


def forgetting(found: Runs) -> Iterator[str]:
    main = [data for data in SETS if data in found]
    yield "# What happens to text of no task?\n"
    said = "; ".join(
        f"{data}: MoPs {against(found, data, 'mops', 'frozen', 'unrelated')} the base, LoRA "
        f"{against(found, data, 'lora rate 0.003', 'frozen', 'unrelated')}, ungated columns "
        f"{against(found, data, 'ungated', 'frozen', 'unrelated')}, MoPs without their null expert "
        f"{against(found, data, 'mops without null', 'frozen', 'unrelated')}"
        for data in main
    )
    yield f"Perplexity of encyclopedic text, which is of no task, after training: {said}.\n"
    yield (
        "Below is not better in itself: text near the training data (Dolly's contexts are encyclopedic) gains as text. "
        "`unseen` is text of tasks that nobody trained on. Mean ± spread over seeds (number of seeds).\n"
    )
    columns = [(data, part, f"{data}, {part}") for data in main for part in ("unrelated", "unseen")
               if value(found, data, "frozen", part)]  # fmt: skip
    yield "\n".join(table(found, columns, list(LABELS))) + "\n"
    gated = "one lora for each task behind our gate"
    nearest = [(data, "unseen, nearest", data) for data in main if value(found, data, gated, "unseen, nearest")]
    if nearest:
        yield (
            "## Tasks nobody trained on, and the nearest LoRA\n\nWhere no text may be left to the base, a text of an unseen task "
            "is answered by the LoRA whose task the gate finds nearest:\n"
        )
        yield "\n".join(table(found, nearest, [gated])) + "\n"


def growth(found: Runs) -> Iterator[str]:
    sizes = [size for size in (2, 4, 8, 16, 32) if "frozen" in found.get(f"growth-{size}", {})]
    yield "# What happens as tasks are added?\n"
    said = "; ".join(
        f"{size} tasks: {against(found, f'growth-{size}', 'mops top-2', 'ungated 20 columns')} ungated columns and "
        f"{against(found, f'growth-{size}', 'mops top-2', 'lora as 20 columns')} LoRA" for size in (sizes[0], sizes[-1])
    )  # fmt: skip
    yield f"With as many active columns, MoPs that keep their two highest gate weights are, at {said}.\n"
    yield "![Perplexity by the number of tasks](growth.png)\n"
    yield (
        "Tasks are drawn from Super-NaturalInstructions, each set within the next larger one, 60 training examples a task; "
        "100 steps of 8 examples and 10 more for each task, for every method. `MoPs, top 2`, 20 ungated columns and the "
        "smaller LoRA have 20 columns' worth of numbers active in a request, whatever the number of tasks; the other three "
        "train as many numbers as there are tasks times 10 columns. Mean ± spread over seeds (number of seeds).\n"
    )
    for part, title in (("test", "Test perplexity"), ("unrelated", "Text of no task")):
        columns = [(f"growth-{size}", part, f"{size} tasks") for size in sizes]
        yield f"## {title}\n\n" + "\n".join(table(found, columns, ["frozen", *GROWTH, *TOTAL])) + "\n"


def examples(found: Runs) -> Iterator[str]:
    yield "# How few examples are enough, and what do wrong labels cost?\n"
    yield (
        f"From 8 examples a task MoPs are {against(found, 'few-8', 'mops', 'frozen')} the frozen base (ungated columns "
        f"{against(found, 'few-8', 'ungated', 'frozen')}, LoRA {against(found, 'few-8', 'lora rate 0.003', 'frozen')}); "
        f"with a tenth of the training labels wrong they are {_moved(found, 'wrong-10', 'mops')} what right labels give, "
        f"and a LoRA for each task {_moved(found, 'wrong-10', 'one lora for each task')}; without labels, from clusters, "
        f"{against(found, 'mixture', 'mops by clusters', 'mops')}.\n"
    )
    yield "Test perplexity on the mixture, mean ± spread over seeds (number of seeds); steps: 40, 100, 200 (150 otherwise).\n"
    columns = [(f"few-{n}", "test", f"{n} a task") for n in (8, 32, 128)]
    columns[2:2] = [("mixture", "test", "60 a task")]
    yield "## Few examples\n\n" + "\n".join(table(found, columns, ["frozen", *TOTAL])) + "\n"
    wrong = [("mixture", "test", "right labels"), ("wrong-10", "test", "10 % wrong"), ("wrong-30", "test", "30 % wrong"),
             ("split", "test", "one task under two labels")]  # fmt: skip
    yield (
        "## Wrong labels\n\n"
        + "\n".join(table(found, wrong, ["mops", "mops by clusters", "one lora for each task"]))
        + "\n"
    )


def _moved(found: Runs, data: str, variant: str) -> str:
    """How far a variant is from what it reaches with right labels."""
    now, right = value(found, data, variant), value(found, "mixture", variant)
    if now is None or right is None:
        return "not measured against"
    return f"{abs(now / right - 1):.1%} {'below' if now < right else 'above'}"


def answers(found: Runs) -> Iterator[str]:
    sets = [data for data in ("mixture", "paper7") if found.get(f"{data}-answers")]
    yield "# How good are the answers themselves?\n"
    said = "; ".join(
        f"{data}: MoPs {_marks(found, data, 'mops', 'exact_match')} and {_marks(found, data, 'mops', 'rouge_l')}, seen by "
        f"instructions too {_marks(found, data, 'mops seen by all', 'exact_match')} and "
        f"{_marks(found, data, 'mops seen by all', 'rouge_l')}, LoRA {_marks(found, data, 'lora rate 0.003', 'exact_match')} "
        f"and {_marks(found, data, 'lora rate 0.003', 'rouge_l')}" for data in sets
    )  # fmt: skip
    yield f"Share of exact greedy answers and mean ROUGE-L to the first 15 test examples of each task: {said}.\n"
    yield (
        "Greedy answers of at most 48 tokens. Exact means the same once lowered and without punctuation; ROUGE-L is F1 over the "
        "longest common subsequence of words. Mean ± spread over seeds (number of seeds).\n"
    )
    yield "| | " + " | ".join(f"{data}, exact | {data}, ROUGE-L | {data}, perplexity" for data in sets) + " |"
    yield "|---|" + "---|---|---|" * len(sets)
    for variant, label in LABELS.items():
        if any("answers" in run for data in sets for run in found[f"{data}-answers"].get(variant, {}).values()):
            shown = (f"{_marks(found, data, variant, 'exact_match')} | {_marks(found, data, variant, 'rouge_l')} | "
                     f"{cell(found, f'{data}-answers', variant)}" for data in sets)  # fmt: skip
            yield f"| {label} | " + " | ".join(shown) + " |"
    yield "\n## Do the tasks want the same of the columns?\n"
    yield (
        "Cosine between the gradients of two tasks after training, from 8 training examples a task: its mean over all pairs, and "
        "the mean of its size without its sign. 0 means that tasks move different columns, or move them independently; what is "
        "below 0 is in conflict. Mean ± spread over seeds (number of seeds).\n"
    )
    yield "| | columns | " + " | ".join(f"{data}, cosine | {data}, size" for data in sets) + " |"
    yield "|---|---|" + "---|---|" * len(sets)
    for variant, label in LABELS.items():
        for part in ("routed", "shared"):
            runs = [[list(run["cosines"][part]["cosines"].values())
                     for run in found[f"{data}-answers"].get(variant, {}).values()
                     if part in run.get("cosines", {})] for data in sets]  # fmt: skip
            if any(runs):
                named = "all" if variant.startswith("ungated") else part
                yield f"| {label} | {named} | " + " | ".join(_sizes(own) for own in runs) + " |"


def _sizes(runs: Sequence[Sequence[float]]) -> str:
    """Two cells: mean cosine, and mean size."""
    if not runs:
        return "not run | not run"
    each = ([mean(run) for run in runs], [mean(abs(value) for value in run) for run in runs])
    return " | ".join(f"{mean(own):.3f} ± {stdev(own) if len(own) > 1 else 0:.3f} ({len(own)})" for own in each)


def _marks(found: Runs, data: str, variant: str, what: str) -> str:
    runs = found.get(f"{data}-answers", {}).get(variant, {}).values()
    values = [run["answers"][what]["overall"] for run in runs if "answers" in run]
    return f"{spread(values)} ({len(values)})" if values else "not run"


def bases(found: Runs) -> Iterator[str]:
    yield "# Does it hold on a compressed base?\n"
    there = {
        data: [base for base in BASES if "frozen" in found.get(_on(data, base), {})] for data in ("mixture", "paper7")
    }
    said = [f"{data}, {BASES[base]}: MoPs {against(found, _on(data, base), 'mops', 'ungated')} ungated columns and "
            f"{against(found, _on(data, base), 'mops', 'lora rate 0.003')} LoRA"
            for data, own in there.items() for base in own
            if base and all(v in found[_on(data, base)] for v in ("mops", "ungated", "lora rate 0.003"))]  # fmt: skip
    yield ("; ".join(said) or "Only the frozen bases are measured so far") + ".\n"
    yield (
        "SparseGPT on 32 sequences of 512 tokens of encyclopedic text; int8 is LLM.int8(). The same settings as on the dense "
        "base, rates chosen on that one. Test perplexity, mean ± spread over seeds (number of seeds).\n"
    )
    for data, own in there.items():
        columns = [(_on(data, base), "test", BASES[base]) for base in own]
        if len(columns) > 1:
            yield f"## {data}\n\n" + "\n".join(table(found, columns, ["frozen", *TOTAL])) + "\n"
        else:
            yield f"## {data}\n\nNot run on a compressed base.\n"


def _on(data: str, base: str) -> str:
    return f"{data}-{base}" if base else data


def draw_growth(found: Runs, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8))
    sizes = [size for size in (2, 4, 8, 16, 32) if "frozen" in found.get(f"growth-{size}", {})]
    for axis, part in zip(axes, ("test", "unrelated"), strict=True):
        for variants, style in ((GROWTH, "-"), (TOTAL, ":")):
            for variant, colour in variants.items():
                shares = [(s, v / f) for s in sizes
                          if (v := value(found, f"growth-{s}", variant, part)) is not None
                          and (f := value(found, f"growth-{s}", "frozen", part))]  # fmt: skip
                axis.plot(*zip(*shares, strict=True), style, marker="o", color=colour, label=LABELS[variant])
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("tasks")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity, share of the frozen base's")
    axes[0].set_title("test examples of the tasks")
    axes[1].set_title("text of no task")
    axes[1].set_yscale("log")
    axes[1].set_yticks([1, 2, 4], ["1", "2", "4"])
    axes[1].minorticks_off()
    figure.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(file, dpi=110)


def draw_choices(found: Runs, file: Path) -> None:
    from matplotlib import pyplot

    main = [data for data in SETS if data in found]
    figure, axes = pyplot.subplots(1, len(main), figsize=(5 * len(main), 4.6), squeeze=False)
    marks = {"mops": "o", "ungated": "s", "lora": "^"}
    shown = [v for v in LABELS if v not in (*FROZEN, "paper's literal", "prefix tuning rate 0.03")
             and any(value(found, data, v, "unrelated") for data in main)]  # fmt: skip
    for axis, data in zip(axes[0], main, strict=True):
        base = value(found, data, "frozen", "unrelated") or 1.0
        for number, variant in enumerate(shown):
            x, y = value(found, data, variant), value(found, data, variant, "unrelated")
            if x is None or y is None:
                continue
            kind = next((mark for name, mark in marks.items() if name in variant), "D")
            axis.plot([x], [y / base], kind, color=f"C{number % 10}", alpha=0.85, label=LABELS[variant])
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
        axis.minorticks_off()
        axis.set_title(data)
        axis.set_xlabel("test perplexity of the tasks, less is better")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("text of no task, share of the base's perplexity")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.24, 1, 1))
    figure.savefig(file, dpi=110)


def how(found: Runs) -> str:
    return (
        "\n---\nSmolLM2-135M-Instruct, float32, chat template; cells that are not run say so. Written by `python "
        "experiments/smollm2/run.py page`; cells run with `python experiments/smollm2/grid.py --sets mixture paper7 dolly "
        f"growth-2 growth-4 growth-8 growth-16 growth-32 few-8 few-32 few-128 wrong-10 wrong-30 split mixture-answers paper7-answers mixture-50 paper7-50`, and so on for 75, 2-4, 4-8 and int8. All cells: {devices(found)}.\n"
    )


def write(folder: Path, found: dict[str, Any]) -> None:
    draw_choices(found, folder / "choices.png")
    draw_growth(found, folder / "growth.png")
    for name, lines in (("choices", choices), ("forgetting", forgetting), ("growth", growth), ("examples", examples),
                        ("answers", answers), ("bases", bases)):  # fmt: skip
        (folder / f"{name}.md").write_text("\n".join(lines(found)) + how(found))
