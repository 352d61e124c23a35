"""docs/evidence.md from results/: every claim of the paper beside what was measured, counted and not argued.

python experiments/evidence/words.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from run import HERE, config
from scipy.stats import spearmanr

from smartmops.evidence import paper, tables
from smartmops.evidence.tables import gains
from smartmops.flow.trainer import TrainConfig
from smartmops.reproduce.reproduce import plan_of
from smartmops.reproduce.studies import STUDIES

Results = list[dict[str, Any]]
Row = tuple[str, str, str, str]


def read() -> dict[str, Results]:
    """Finished cells of every study."""
    plans = {name: plan_of(config("all"), name) for name in STUDIES}
    return {name: list(plan.grid.read(plan.cells()).values()) for name, plan in plans.items()}


def paired(found: Results, first: str, second: str, data: str, base: str | None = None) -> list[float]:
    """Percent by which the second is below the first, run by run."""
    values = tables.perplexities(found)
    return [gain for (d, b, m), runs in values.items() if (d, m) == (data, second) and base in (None, b)
            for gain in gains(values.get((d, b, first), {}), runs).values()]  # fmt: skip


def verdict(found: Sequence[float]) -> str:
    """By count and mean, without a look at the paper."""
    if not found:
        return "not run"
    lower = sum(gain > 0 for gain in found)
    if lower == len(found):
        return "holds"
    if lower == 0:
        return "**does not hold**"
    return "mostly" if lower >= 0.75 * len(found) else "**mixed**" if lower > 0.25 * len(found) else "**mostly not**"


def said(found: Sequence[float], what: str = "runs") -> str:
    """How often, and how much."""
    if not found:
        return "not run"
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"lower in {sum(g > 0 for g in found)} of {len(found)} {what}, by {statistics.mean(found):+.1f}{spread} %"


def printed_gains(table: dict[str, dict[str, tuple[float, ...]]], first: str) -> str:
    """Range of the paper's gains, as reductions of the baseline's perplexity and as printed (over MoPs')."""
    pairs = [(a, b) for rows in table.values() for a, b in zip(rows[first], rows["mops"], strict=True)]
    ours, theirs = [100 * (1 - b / a) for a, b in pairs], [100 * (a / b - 1) for a, b in pairs]
    return (
        f"{min(ours):.1f} to {max(ours):.1f} % (divided by the smaller number, as printed: {min(theirs):.1f} to "
        f"{max(theirs):.1f} %)"
    )


def claims(found: dict[str, Results]) -> Iterator[Row]:
    """Claim, the paper's number, ours, and how it went."""
    for data in ("dolly", "superni"):
        own = paired(found["table2"], "prompt-tuning", "mops", data)
        yield (
            f"Gating lowers perplexity, central training, {data}",
            printed_gains({data: paper.TABLE2[data]}, "prompt-tuning"),
            said(own),
            verdict(own),
        )
    for data in ("dolly", "superni"):
        own = paired(found["table3"], "fedprompt", "mops", data)
        yield (
            f"Gating lowers perplexity, 100 skewed clients, {data}",
            printed_gains({data: paper.TABLE3[data]}, "fedprompt"),
            said(own),
            verdict(own),
        )
    for data in ("dolly", "superni"):
        yield more_under_skew(found, data)
    for data in ("dolly", "superni"):
        yield more_when_compressed(found["table2"], data)
    for first, words in (
        ("lora", "LoRA as the paper set it"),
        ("lora, tuned", "LoRA, tuned"),
        ("lora, tuned, same memory", "LoRA, tuned, at MoPs' memory"),
        ("ia3, tuned", "IA3, tuned"),
    ):
        own = paired(found["table4"], first, "mops", "dolly")
        yield f"MoPs reach {words}, dolly", "level with LoRA and IA3 up to 85 %", said(own), verdict(own)
    own = paired(found["table8"], "lora, tuned", "mops over lora", "dolly")
    yield (
        "MoPs on top of a trained LoRA go below it, dolly",
        f"{100 * (1 - paper.TABLE8['mops over lora'] / paper.TABLE8['lora']):.1f} % (Phi-2)",
        said(own),
        verdict(own),
    )
    yield curve(found["figure3"], "injection_layer", "Earlier injection is better", 1)
    yield curve(found["figure4"], "prompts_per_expert", "More prompts of an expert are better", -1)
    for data in ("dolly", "superni"):
        own = paired(found["ablation"], "gate acts on hidden states", "mops", data)
        yield (
            f"Our reading: the gate acts on attention, not on hidden states, {data}",
            "hidden states",
            said(own),
            verdict(own),
        )
    for data in ("dolly", "superni"):
        own = paired(found["ablation"], "gate not pretrained", "mops", data)
        yield f"Pretraining the gate helps, {data}", "done, not measured", said(own), verdict(own)
    for data in ("dolly", "superni"):
        yield unseen(found["unseen"], data)
    own = [
        gain for data in ("dolly", "superni") for gain in paired(found["table3"], "mops", "mops-expert-weighted", data)
    ]
    yield "Ours: averaging each expert by its use beats FedAvg", "–", said(own), verdict(own)


def more_under_skew(found: dict[str, Results], data: str) -> Row:
    central, federated = tables.perplexities(found["table2"]), tables.perplexities(found["table3"])
    points = []
    for d, base, method in federated:
        if (d, method) == (data, "mops") and (d, base, "mops") in central:
            here = gains(central[d, base, "prompt-tuning"], central[d, base, "mops"])
            there = gains(federated[d, base, "fedprompt"], federated[d, base, "mops"])
            points += [there[seed] - here[seed] for seed in here.keys() & there.keys()]
    words = (
        "not run"
        if not points
        else (
            f"larger in {sum(p > 0 for p in points)} of {len(points)} pairs of runs, by "
            f"{statistics.mean(points):+.1f} points"
        )
    )
    return f"Gating gains more under skew, {data}", "larger in nearly every column", words, verdict(points)


def more_when_compressed(found: Results, data: str) -> Row:
    frozen = {base: value for (d, base), value in tables.frozen_of(found).items() if d == data}
    means = {
        base: statistics.mean(own) for base in frozen if (own := paired(found, "prompt-tuning", "mops", data, base))
    }
    if len(means) < 3:
        return f"Gating gains more on more compressed bases, {data}", "yes", "not run", "not run"
    rank = float(spearmanr([frozen[base] for base in means], list(means.values())).statistic)
    return (
        f"Gating gains more on more compressed bases, {data}",
        "yes",
        f"rank correlation of gain and frozen perplexity over {len(means)} bases: {rank:+.2f}",
        "holds" if rank > 0.5 else "**does not hold**" if rank < 0.2 else "**mixed**",
    )


def curve(found: Results, setting: str, claim: str, sign: int) -> Row:
    own = [each for each in found if each["settings"]["method"] == "mops"]
    if not own:
        return f"{claim}, dolly", "yes", "not run", "not run"
    at = [each["settings"][setting] for each in own]
    values = [each["metrics"]["perplexity"]["overall"] for each in own]
    rank = float(spearmanr(at, values).statistic)
    best = at[values.index(min(values))]
    return (
        f"{claim}, dolly",
        "yes",
        f"best at {best} of {min(at)} to {max(at)}; rank correlation with perplexity {rank:+.2f}",
        "holds" if sign * rank > 0.5 else "**does not hold**" if sign * rank < 0.2 else "**mixed**",
    )


def unseen(found: Results, data: str) -> Row:
    def at(method: str) -> dict[tuple[str, int], float]:
        return {
            (each["settings"]["hold_out"], each["seed"]): each["metrics"]["perplexity"]["per_task"][
                each["settings"]["hold_out"]
            ]
            for each in found
            if (each["data"], each["settings"]["method"]) == (data, method)
        }

    first, own = at("prompt-tuning"), at("mops")
    pairs = [100 * (1 - own[key] / first[key]) for key in own if key in first]
    return (
        f"Just in time: lower perplexity on a task never trained on, {data}",
        "claimed, not measured",
        said(pairs),
        verdict(pairs),
    )


def best_rows(found: Results) -> Iterator[str]:
    """The ablation's choices against its first row, best first, and whether `train` makes the best one by default."""
    values = tables.perplexities(found)
    barred = {"gate reads the response too", "the paper to the letter", "told the task"}
    datas = [data for data in ("dolly", "superni") if (data, "dense", "mops") in values]
    rows = []
    for variant in STUDIES["ablation"].variants[1:]:
        name = variant.label
        by = {data: gains(values[data, "dense", "mops"], values.get((data, "dense", name), {})) for data in datas}
        if all(by.values()) and name not in barred:
            means = [statistics.mean(own.values()) for own in by.values()]
            counts = [(sum(g > 0 for g in own.values()), len(own)) for own in by.values()]
            rows.append((statistics.mean(means), variant, means, counts))
    rows.sort(key=lambda row: row[0], reverse=True)
    if rows:
        default = TrainConfig(model="", data="", out=HERE)
        best = next(variant for _, variant, *_ in rows if "fewer_steps" not in variant.settings)
        yes = all(getattr(default, name) == value for name, value in best.settings.items())
        yield (f"Best of what a user can choose, over both data sets: **{tables.label(best.label)}**. `smartmops train` "
               f"{'does so' if yes else 'does **not** do so'} by default.\n")  # fmt: skip
    yield "| choice | " + " | ".join(f"below MoPs on {data}, %" for data in datas) + " | mean |"
    yield "|---" * (len(datas) + 2) + "|"
    for mean, variant, means, counts in rows:
        cells = " | ".join(f"{m:+.1f} ({won} of {n} seeds)" for m, (won, n) in zip(means, counts, strict=True))
        yield f"| {tables.label(variant.label)} | {cells} | {mean:+.1f} |"


def interference(found: Results) -> Iterator[str]:
    for data in ("dolly", "superni"):
        for method in ("prompt-tuning", "mops"):
            own = [
                each["metrics"]["interference"]
                for each in found
                if (each["data"], each["settings"]["method"]) == (data, method)
            ]
            if own:
                cosines = " to ".join(
                    f"{statistics.mean(e[stage]['mean_cosine'] for e in own):.3f}" for stage in ("before", "after")
                )
                below = " to ".join(
                    f"{100 * statistics.mean(e[stage]['conflicting'] for e in own):.0f} %"
                    for stage in ("before", "after")
                )
                yield f"- {data}, {tables.label(method)}: mean cosine {cosines} over training, pairs that conflict {below}"


def page() -> None:
    """Write docs/evidence.md."""
    found = read()
    any_ = found["table2"][0]["settings"]
    rows = list(claims(found))
    lines = [
        "# What holds of the paper, and what does not\n",
        "Written by `python experiments/evidence/words.py` from `experiments/evidence/results/`; the tables, curves and heatmaps "
        "behind each line are in [experiments/evidence](../experiments/evidence), and together in its `report.html`.\n",
        "All of it was measured on **one small base**, the embedded model of 6 M parameters, dense and compressed, where the "
        f"paper has Llama-7B: {any_['steps']} steps of {any_['batch_size']} example in central training, at most "
        f"{any_['max_length']} tokens, {any_['limit']:,} examples drawn. Rates (and LoRA's rank) are chosen on a part of the "
        "training split, per data set, for every method alike. So this page says what the method does to a model that reads "
        "its context poorly; it does not refute a number of the paper, and no number here confirms one.\n",
        "## Claims, counted\n",
        "A pair of runs shares data, base and seed. `holds` is every pair, `mostly` three quarters of them.\n",
        "| claim | paper | here | |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "## The paper's arithmetic\n",
        "The paper divides its gains by MoPs' perplexity. As reductions of the baseline's perplexity, which is what this project "
        f"reports, they are: central {printed_gains(paper.TABLE2, 'prompt-tuning')}; federated "
        f"{printed_gains(paper.TABLE3, 'fedprompt')}; int8 {printed_gains(paper.TABLE5, 'fedprompt')}. Two cells do not agree with "
        f"themselves: table 2, Dolly, 4:8 prints {paper.TABLE2['dolly']['prompt-tuning'][6]} and {paper.TABLE2['dolly']['mops'][6]} "
        f"with a gain of 0.17; table 5, 2:4 is a loss ({paper.TABLE5['dolly']['fedprompt'][5]} to {paper.TABLE5['dolly']['mops'][5]}) "
        "printed as a gain. The paper ran each cell once.\n",
        "## Does the default win the ablation?\n",
        "Choices of the [ablation](../experiments/evidence/ablation.md) against MoPs as in all tables, without recovery prompts "
        "(left out: what sees the answer, and what is told the task). Recovery prompts are 10 prompts at the input, trained for 20 "
        "steps before the others; `same steps` takes those off the rest. They are 10 more prompts, whichever way steps are counted.\n",
        *best_rows(found["ablation"]),
        "",
        "## Interference\n",
        "Cosines between the tasks' gradients on the prompts they share ([page](../experiments/evidence/interference.md)):\n",
        *interference(found["interference"]),
        "",
        "## What the data are\n",
        "Dolly-15k is whole. Of the paper's seven Super-NaturalInstructions tasks two are exact, four rebuilt from their sources and "
        "one regenerated by rule; the instruction of the seventh (task 1429) alone is longer than the limit of tokens, so six are "
        "trained on. Test splits are small (see each page), which is why pairs are counted.\n",
        "## Model size\n",
        "Not measured: one size was trained. A base that infers nothing from its context leaves soft prompts nothing to steer "
        "(LOG.md, first trials), so gains on a model of the paper's size may differ in either direction. "
        "`smartmops reproduce table2 --model MODEL --data DATA` runs the same table on yours.",
    ]  # fmt: skip
    (HERE.parents[1] / "docs/evidence.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    page()
