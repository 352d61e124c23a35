"""Results in, pictures out: perplexity by round, and gate weights before, during and after training. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smartmops.checks.errors import MissingExtra
from smartmops.traits import BY_NAME

from .tables import NAMES

COLOURS = {name: each.colour for name, each in BY_NAME.items() if each.colour}
COLOURS["mops-expert-weighted"] = "#d55e00"  # no method, but a way to average one


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib: pip install 'smartmops[report]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "smartmops"  # so that the same results give the same bytes
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """As PNG and SVG."""
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)


def rounds(results: Sequence[Mapping[str, Any]], bases: Sequence[str], data: str, path: Path) -> None:
    """Test perplexity by round: one panel a base, one line a method and seed."""
    plt = _pyplot()
    own = [each for each in results if each["data"] == data and each["base"] in bases]
    here = [base for base in bases if any(each["base"] == base for each in own)]
    figure, axes = plt.subplots(1, len(here), figsize=(3.4 * len(here), 3.4), constrained_layout=True, squeeze=False)
    for base, axis in zip(here, axes[0], strict=True):
        labelled: set[str] = set()
        for each in sorted(own, key=lambda r: (r["method"], r["seed"])):
            if each["base"] != base:
                continue
            seen = [(r["round"], r["perplexity"]["overall"]) for r in each["metrics"]["rounds"] if "perplexity" in r]
            name = NAMES.get(each["method"], each["method"])
            axis.plot(*zip(*seen, strict=True), color=COLOURS.get(each["method"]), lw=1.4, marker="o", ms=2.5,
                      alpha=0.85, label=None if name in labelled else name)  # fmt: skip
            labelled.add(name)
        axis.set(title=f"{data}, {base}", xlabel="round (0: before training)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test perplexity over response tokens")
    axes[0][-1].legend(frameon=False, fontsize=8)
    save(figure, path)


def gates(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Mean gate weights, tasks down and experts across, before, during and after training (paper, figures 5 to 11)."""
    plt = _pyplot()
    stages = [stage for stage in ("before", "during", "after") if found.get(stage)]
    highest = max(w for stage in stages for row in found[stage].values() for w in row)
    figure, axes = plt.subplots(1, len(stages), figsize=(2.2 + 3.3 * len(stages), 3.9), constrained_layout=True,
                                squeeze=False, sharey=True)  # fmt: skip
    for stage, axis in zip(stages, axes[0], strict=True):
        tasks = list(found[stage])
        axis.imshow([found[stage][task] for task in tasks], vmin=0, vmax=highest, cmap="Blues", aspect="auto")
        for y, task in enumerate(tasks):
            for x, weight in enumerate(found[stage][task]):
                axis.text(x, y, f"{weight:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                          color="white" if weight > 0.6 * highest else "#333333")  # fmt: skip
        names = [str(name).replace("_", " ")[:24] for name in found["experts"]]
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axis.set_yticks(range(len(tasks)), [task.replace("_", " ")[:30] for task in tasks], fontsize=7)
        axis.set_title(stage, fontsize=10)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _gains(results: Sequence[Mapping[str, Any]], data: str, base: str) -> dict[str, list[float]]:
    """Percent below the first method, paired by seed, by every other method."""
    own = [each for each in results if (each["data"], each["base"]) == (data, base)]
    first = {each["seed"]: each["metrics"]["perplexity"]["overall"] for each in own
             if each["method"] == results[0]["method"]}  # fmt: skip
    found: dict[str, list[float]] = {}
    for each in own:
        if each["method"] != results[0]["method"] and each["seed"] in first:
            value = 100 * (1 - each["metrics"]["perplexity"]["overall"] / first[each["seed"]])
            found.setdefault(each["method"], []).append(value)
    return found


def bases(results: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    """Gains over the first method: one panel a data set, bases across, a dot for each seed and a dash for the mean."""
    plt = _pyplot()
    datas = list(dict.fromkeys(each["data"] for each in results))
    methods = [m for m in dict.fromkeys(each["method"] for each in results)][1:]
    figure, axes = plt.subplots(1, len(datas), figsize=(1.4 + 4.6 * len(datas), 3.6), constrained_layout=True,
                                squeeze=False)  # fmt: skip
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for data, axis in zip(datas, axes[0], strict=True):
        axis.axhline(0, color="#999999", lw=0.8)
        for number, method in enumerate(methods):
            offset = (number - (len(methods) - 1) / 2) * 0.8 / max(len(methods), 1)
            colour = COLOURS.get(method, colours[number % len(colours)])
            for place, base in enumerate(names):
                values = _gains(results, data, base).get(method, [])
                if values:
                    axis.plot([place + offset] * len(values), values, "o", ms=4, color=colour, alpha=0.7,
                              label=NAMES.get(method, method) if place == 0 else None)  # fmt: skip
                    axis.plot(place + offset, sum(values) / len(values), "_", ms=14, color=colour)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(data, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"perplexity below {NAMES.get(results[0]['method'], results[0]['method'])}, %")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def variants(results: Sequence[Mapping[str, Any]], labels: Sequence[str], data: str, base: str, path: Path) -> None:
    """Perplexity of each variant, best at the top; a dot for each seed, a line at the first variant's mean."""
    plt = _pyplot()
    found: dict[str, list[float]] = {}
    for each in results:
        if (each["data"], each["base"]) == (data, base):
            found.setdefault(each["method"], []).append(each["metrics"]["perplexity"]["overall"])
    order = sorted((name for name in labels if name in found), key=lambda m: -sum(found[m]) / len(found[m]))
    figure, axis = plt.subplots(figsize=(7.2, 1 + 0.27 * len(order)), constrained_layout=True)
    for place, name in enumerate(order):
        colour = COLOURS.get(name, "#555555")
        axis.plot(found[name], [place] * len(found[name]), "o", ms=4, color=colour, alpha=0.7)
        axis.plot(sum(found[name]) / len(found[name]), place, "|", ms=12, color=colour)
    if labels[0] in found:
        axis.axvline(sum(found[labels[0]]) / len(found[labels[0]]), color=COLOURS.get(labels[0]), lw=0.8, ls=":")
    axis.set_yticks(range(len(order)), [NAMES.get(name, name) for name in order], fontsize=8)
    axis.set(xlabel="test perplexity over response tokens", title=f"{data}, {base}")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def curve(values: Mapping[tuple[str, str, str], Mapping[int, float]], lines: Mapping[str, Mapping[int, str]],
          where: tuple[str, str], axis_words: str, path: Path) -> None:  # fmt: skip
    """Perplexity over a quantity: a line a method through the means, a dot for each seed."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.6), constrained_layout=True)
    for method, by in lines.items():
        found = {at: list(values.get((*where, variant), {}).values()) for at, variant in by.items()}
        known = {at: runs for at, runs in found.items() if runs}
        colour = COLOURS.get(method, "#555555")
        axis.plot(list(known), [sum(runs) / len(runs) for runs in known.values()], color=colour, lw=1.4,
                  label=NAMES.get(method, method))  # fmt: skip
        for at, runs in known.items():
            axis.plot([at] * len(runs), runs, "o", ms=3.5, color=colour, alpha=0.7)
    axis.set(xlabel=axis_words, ylabel="test perplexity over response tokens", title=", ".join(where))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)
