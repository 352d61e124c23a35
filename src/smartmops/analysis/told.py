"""What is said on a terminal of data, of scored answers and of tasks: tables from results. Knows no model."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from smartmops.progress.bars import bold, console


def print_data(found: dict[str, Any]) -> None:
    """Two tables with a line for each task; then repeated texts, and examples with what is trained on in brackets."""
    table = Table("examples", *found["examples"])
    for task, counts in found["tasks"].items():
        table.add_row(task or "no task", *map(str, counts.values()))
    table.add_section()
    table.add_row("all", *map(str, found["examples"].values()))
    console.print(table)
    if "tokens" in found:
        table = Table("tokens", "row", "longest", "answer", "longest", "shortened", "dropped")
        for task, own in found["tokens"].items():
            table.add_row(task or "no task", *(f"{value:g}" for value in own.values()))
        console.print(table)
        console.print(f"row and answer: median numbers of tokens; a row may have {found['max_length']}. A longer one "
                      "loses the end of its context, and is dropped where that does not do.")  # fmt: skip
        for said in (*found["lost"], *found["controls"]):
            console.print(said)
    if found["sources"]:
        console.print(f"sources: {found['sources']}")
    again = found["repeated"]
    console.print(f"training examples that stand twice: {again['train']}; with another answer: {again['answers']}; "
                  f"questions also trained on: {again['test']} of the test split, {again['validation']} of the "
                  "validation part")  # fmt: skip
    for each in again["shown"]:
        console.print(f"  {each['part']}: {each['text'][:100]!r}")
    for each in found.get("rendered", []):
        console.rule(each["task"] or "no task")
        console.print(f"{each['prompt']}⟦{each['answer']}⟧", highlight=False)
    if found.get("rendered"):
        console.rule("trained on is what stands in ⟦ ⟧")


def print_suite(found: dict[str, Any]) -> None:
    """Metrics of each task down, the frozen and the adapted model across, with standard errors where there are any."""
    table = Table(found["suite"], "metric", "questions", "frozen", "adapted")
    for task, metrics in found["adapted"].items():
        for name in (each for each in metrics if not each.endswith("_stderr")):
            cells = []
            for side in (found["frozen"][task], metrics):
                error = side.get(f"{name}_stderr")
                cells.append(f"{side[name]:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
            table.add_row(task, name, str(found["questions"].get(task, "")), *cells)
    console.print(table)
    if found["shortened"]:
        console.print(f"{found['shortened']} texts lost their beginning, for the base's positions are too few")


def print_answers(found: dict[str, Any]) -> None:
    """Tasks down, scores of the frozen and the adapted model across."""
    sides = (("frozen", found["frozen"]), ("adapted", found))
    scores = [side[key] for key in ("rouge_l", "exact_match") for _, side in sides]
    table = Table("answers", "", *(f"{words}, {name}" for words in ("ROUGE-L", "exact match") for name, _ in sides))
    for task, count in found["count"].items():
        table.add_row(task, str(count), *(f"{each['per_task'][task]:.3f}" for each in scores))
    table.add_section()
    table.add_row("overall", str(sum(found["count"].values())), *(bold(f"{s['overall']:.3f}") for s in scores))
    console.print(table)
