"""Results in, pictures out: perplexity by round, and gate weights before, during and after training. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import NAMES

COLOURS = {"fedprompt": "#8a8a8a", "prompt-tuning": "#8a8a8a", "mops": "#0072b2", "mops-expert-weighted": "#d55e00",
           "fedlora": "#009e73", "lora": "#009e73"}  # fmt: skip


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'smartmops[report]'") from error
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
