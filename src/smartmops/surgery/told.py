"""What is said of experts on a terminal: tables and sentences from results. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from smartmops.options.finished.surgery import (
    AddConfig,
    AdviseConfig,
    CalibrateConfig,
    DropConfig,
    ExpertsConfig,
    FreezeConfig,
    ListConfig,
    MergeConfig,
    RenameConfig,
)

from . import add
from . import change as changes

SHOWN = 0.01  # shares below this are not worth a word


def change(config: ExpertsConfig, console: Console) -> dict[str, Any]:
    """Do what is asked of a run's experts, and say what came of it."""
    kinds: dict[type, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any], Console], None]]] = {
        ListConfig: (changes.listed, _listed), AddConfig: (add.add, _added), DropConfig: (changes.drop, _dropped),
        MergeConfig: (changes.merge, _merged), RenameConfig: (changes.rename, _renamed),
        FreezeConfig: (changes.freeze, _frozen), CalibrateConfig: (changes.calibrate, _calibrated),
    }  # fmt: skip
    do, say = kinds[type(config.do)]
    found = do(config.run, config.do)
    say(found, console)
    if "out" in found:
        console.print(f"written: {found['out']}", soft_wrap=True)
    return found


def advice(config: AdviseConfig, console: Console) -> dict[str, Any]:
    """One sentence, then the numbers behind it."""
    found = add.advise(config)
    console.print(found["advice"], style="bold")
    table = Table("expert", "mean gate weight")
    for name, weight in sorted(found["gate"].items(), key=lambda pair: -pair[1]):
        table.add_row(name, f"{weight:.3f}")
    table.add_row("left to the base", f"{found['left_to_base']:.1%} of instructions")
    console.print(table)
    values = {name: value for name, value in found["perplexity"].items() if value is not None}
    console.print("perplexity: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items())
                  + f" ({found['examples']['measured']} examples that the trial did not see)")  # fmt: skip
    if found["rule"] is not None:
        console.print(_rule(found["rule"]))
    return found


def _listed(found: dict[str, Any], console: Console) -> None:
    table = Table("expert", "chosen by", "tasks", "share", "nearest", "perplexity without it")
    for name, each in found["experts"].items():
        near = ", ".join(f"{other} {value:.2f}" for other, value in each["nearest"].items())
        cost = each.get("cost")
        words = "" if cost is None else f"{cost['before']:.3f} → {cost['after']:.3f}"
        tasks = ", ".join(each.get("tasks", []))
        table.add_row(name + (" (frozen)" if each["frozen"] else ""), each["chosen_by"], tasks,
                      f"{each['share']:.1%}" if "share" in each else "", near, words)  # fmt: skip
    console.print(table)
    for name, each in found["experts"].items():
        used = {task: weight for task, weight in each.get("usage", {}).items() if weight >= SHOWN}
        if used:
            words = ", ".join(f"{task} {weight:.2f}" for task, weight in used.items())
            console.print(f"{name}: {words}", soft_wrap=True)
    if found["unread"]:
        console.print(f"Neither usage nor cost can be told: {found['unread']}; give instructions that the run serves "
                      "by --old DATA", soft_wrap=True)  # fmt: skip
    else:
        console.print(f"on {found['rows']} {found['part']} examples; usage is the mean gate weight, of each task")


def _added(found: dict[str, Any], console: Console) -> None:
    old, new = found["old"], found["new"]
    if said := _nothing_gained(found):
        console.print(f"Nothing was gained: {said}.", style="bold yellow")
    if new and "agreement" not in found:
        console.print(f"new: perplexity {_pair(new['before'], new['after'])} on {new['rows']} test examples (frozen "
                      f"{new['frozen']:.3f}, the new expert alone {new['alone']:.3f})")  # fmt: skip
    if "agreement" in found:
        _distilled(found, console)
    console.print(f"old: perplexity {_pair(old['before'], old['after'])}; {old['untouched']:.1%} of instructions have "
                  "the same weights as before, bit for bit")  # fmt: skip
    for name, share in old["added"].items():
        console.print(f"added before: {share:.1%} of the instructions of {name!r} are answered as they were")
    if old["unchecked"] and found["rule"] is not None:
        names = ", ".join(map(repr, old["unchecked"]))
        console.print(f"not checked: {names}, added before, of whose instructions none were kept; see by `evaluate "
                      "--data` whether they are answered as they were", style="bold yellow")  # fmt: skip
    if found["rule"] is None:
        console.print(f"{found['name']!r} answers where it is asked for by name: the gate never chooses it")
    else:
        console.print(_rule(found["rule"]))


def _nothing_gained(found: dict[str, Any]) -> str:
    """Why the new expert is of no use; empty where it is.

    One made of a prompt is held to the base under the prompt, not to the answers of examples; one that answers by name
    only, to what it does alone.
    """
    if "agreement" in found:
        after, before = found["agreement"]["nats"], found["agreement_without"]["nats"]
        return "" if after < before else (f"{after:.3f} nats from the base under the prompt with the expert, "
                                          f"{before:.3f} without it")  # fmt: skip
    new = found["new"]
    reached = "alone" if found["rule"] is None else "after"
    if not new or new[reached] < min(new["frozen"], new["before"]):
        return ""
    return f"{_pair(new['before'], new[reached])} on new examples, the frozen base {new['frozen']:.3f}"


def _distilled(found: dict[str, Any], console: Console) -> None:
    after, before = found["agreement"], found["agreement_without"]
    held = found["questions"]["held out"]
    where = f"{held} questions it was not trained on" if held else "the questions it was trained on"
    console.print(f"agreement with the base under the prompt, on {where}: {after['greedy']:.1%} of greedy tokens, "
                  f"{after['nats']:.3f} nats (without prompt and expert {before['greedy']:.1%}, "
                  f"{before['nats']:.3f})")  # fmt: skip
    console.print(f"tokens saved per request: {found['tokens_saved']:.0f}")


def _rule(rule: dict[str, float]) -> str:
    words = (f"the gate sends it {rule['sent']:.1%} of its own and {rule['taken']:.1%} of the other instructions (on "
             "halves that the rule was not fitted on)")  # fmt: skip
    if rule["sent"] < 0.5:
        words += ": its instructions look like those of other experts; ask for it by name"
    return words


def _dropped(found: dict[str, Any], console: Console) -> None:
    _perplexity(found["perplexity"], console)
    goes = ", ".join(f"{name} {share:.0%}" for name, share in found["goes_to"].items())
    unused = "nothing of these data went to it, so what it did was not measured: --old DATA names what it serves"
    console.print(f"what went to it goes to: {goes}" if goes else unused, soft_wrap=True)


def _merged(found: dict[str, Any], console: Console) -> None:
    _perplexity(found["perplexity"], console)
    console.print(f"{found['name']}: untrained, with half of either's columns, {found['untrained']:.3f}")


def _renamed(found: dict[str, Any], console: Console) -> None:
    console.print(f"experts: {', '.join(found['experts'])}")


def _frozen(found: dict[str, Any], console: Console) -> None:
    console.print(f"frozen: {', '.join(found['frozen']) or 'none'}")


def _calibrated(found: dict[str, Any], console: Console) -> None:
    console.print(f"text is left to the base from a null weight of {found['threshold']:.4g}")
    table = Table("answered by experts", "before", "after")
    for name, words in (("unrelated", "your texts"), ("own", "the run's own instructions")):
        table.add_row(words, *(f"{found['let_through'][when][name]:.1%}" for when in ("before", "after")))
    console.print(table)
    _perplexity(found["perplexity"], console)


def _perplexity(found: dict[str, Any], console: Console) -> None:
    console.print(f"perplexity: {_pair(found['before'], found['after'])}")
    for task, pair in found["tasks"].items():
        console.print(f"  {task}: {_pair(*pair)}")


def _pair(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"
