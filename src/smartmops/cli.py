"""Command -> typed function. Every command is one importable function; this file only parses, checks and prints.

Options are checked before anything that takes time is imported, so commands import what they need within.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from smartmops.analysis.told import print_answers, print_data, print_suite
from smartmops.checks.limits import Options, check
from smartmops.ending import ending, quiet, unread
from smartmops.options.bench import BenchConfig
from smartmops.options.compression import CompressConfig
from smartmops.options.federation import ClientConfig, FederateConfig, KeysConfig, ServerConfig
from smartmops.options.finished.handover import ExportConfig, PushConfig
from smartmops.options.finished.reading import DataConfig, EvaluateConfig, InspectConfig, ReportConfig
from smartmops.options.finished.serving import ChatConfig, GenerateConfig, ServeConfig
from smartmops.options.finished.surgery import AdviseConfig, ExpertsConfig
from smartmops.options.method import Method
from smartmops.options.reproduce import ReproduceConfig
from smartmops.options.training import EMBEDDED_SETTING, CompareConfig, TrainConfig
from smartmops.progress.bars import bold, console
from smartmops.settings.line import asked
from smartmops.starting import start

# Adam's rates for so short a budget, tuned on a tenth of the training split: experiments/office/tuning.json.
QUICKSTART_RATES: dict[Method, float | None] = {"prompt-tuning": 3.0, "mops": 3.0}


def quickstart(
    out: Path = Path("runs/quickstart"), steps: int = 40, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, Any]:
    """Prune the embedded model, train recovery prompts, gate, ungated prompts and MoPs on seven tasks, write a report.

    Args:
        out: run folder; report.html is written into it
        steps: optimiser steps of each method
        seeds: of experts and training; the data split is the same for all
    """
    config = CompareConfig(
        model="tiny", data="office", dtype="float32", out=out, steps=steps, seeds=seeds, sparsity=0.5,
        methods=dict(QUICKSTART_RATES), save_every=10**9, log_every=5, samples_per_task=1, **EMBEDDED_SETTING,
    )  # fmt: skip
    metrics = compare_command(config)
    _print_comparison(metrics)
    _report([out], out / "report.html")
    return metrics


def compress_command(config: CompressConfig) -> dict[str, Any]:
    """Prune a model (SparseGPT, Wanda, magnitude), quantise it, or both, into a folder that transformers loads."""
    _ready(config)
    from smartmops.compression.compress import compress

    metrics = compress(config)
    table = Table("", "before", "after")
    if metrics["perplexity_before"] is not None:
        table.add_row("perplexity", f"{metrics['perplexity_before']:.3f}", f"{metrics['perplexity_after']:.3f}")
    table.add_row("zeros in linear layers", "", f"{metrics['sparsity']:.2%}")
    table.add_row("weights, MB", *(f"{metrics[key] / 1e6:.1f}" for key in ("bytes_before", "bytes_after")))
    console.print(table)
    console.print(f"{metrics['seconds']:.0f} s; the card is {config.out / 'README.md'}")
    return metrics


def train_command(config: TrainConfig) -> dict[str, Any]:
    """Adapt a frozen model to a data set and write a run folder."""
    _ready(config)
    from smartmops.flow.trainer import train

    metrics = train(config)
    _print_perplexity({"frozen": metrics["perplexity_frozen"], config.method: metrics["perplexity"]})
    if "answers" in metrics:
        print_answers(metrics["answers"])
    _print_verdict(metrics, "--steps")
    return metrics


def compare_command(config: CompareConfig) -> dict[str, Any]:
    """Evaluate the frozen base, train each method under each seed, write a run folder; returns its metrics."""
    _ready(config)
    from smartmops.flow.compare import compare

    return compare(config)


def federate_command(config: FederateConfig) -> dict[str, Any]:
    """Train one adapter over clients whose data stay with them, and write a run folder."""
    _ready(config)
    if config.engine == "flower-simulation":
        from smartmops.flower.simulation import simulate as run
    else:
        from smartmops.federated.federate import federate as run

    metrics = run(config)
    _print_perplexity({"frozen": metrics["perplexity_frozen"], config.method: metrics["perplexity"]})
    _print_verdict(metrics, "--rounds")
    if metrics["holdings"] and find_spec("matplotlib"):
        from smartmops.report.holdings import save_holdings

        save_holdings(metrics["holdings"]["table"], metrics["holdings"]["names"], config.out / "holdings.png")
        console.print(f"who holds what: {config.out / 'holdings.png'}")
    return metrics


def federate_server_command(config: ServerConfig) -> dict[str, Any]:
    """Train one adapter over clients on other machines, each running `smartmops federate-client`."""
    _ready(config)
    from smartmops.deployment.server import federate_server

    metrics = federate_server(config)
    _print_perplexity({"frozen": metrics["perplexity_frozen"], config.method: metrics["perplexity"]})
    _print_verdict(metrics, "--rounds")
    return metrics


def federate_client_command(config: ClientConfig) -> None:
    """Train on the data of this machine whenever the server asks; the data stay here."""
    _ready(config)
    from smartmops.deployment.client import federate_client

    if status := federate_client(config):
        sys.exit(status)


def federate_keys_command(config: KeysConfig) -> None:
    """Make the keys and certificates of a real federation."""
    _ready(config)
    from smartmops.deployment.keys import make_keys

    make_keys(config)


def reproduce_command(config: ReproduceConfig) -> dict[str, Any]:
    """A table or figure of the paper on a model and data of your own, beside the paper's numbers.

    Finished cells are kept as JSON under OUT/results and never run again; a killed grid goes on where it was, and
    several processes may work on one grid. `all` goes through every name, and writes report.html.
    """
    _ready(config)
    from smartmops.reproduce.reproduce import reproduce

    return reproduce(config)


def bench_command(config: BenchConfig) -> dict[str, Any]:
    """Measure speed and memory on a base, or on a random Llama, against PEFT and the bare model, all in one run."""
    _ready(config)
    from smartmops.bench.run import bench

    return bench(config)


def data_command(config: DataConfig) -> dict[str, Any]:
    """Show what `train` would read of DATA: counts, lengths in tokens, what is cut, what stands twice, examples.

    Name a model for all that concerns tokens; no weights of it are loaded.
    """
    _ready(config)
    from smartmops.analysis.preview import preview

    found = preview(config)
    print_data(found)
    return found


def evaluate_command(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run on its test split, on other data, or on tasks of EleutherAI's harness.

    The numbers are also written to RUN/evaluation.json.
    """
    _ready(config)
    from smartmops.analysis.finished import evaluate

    metrics = evaluate(config)
    if "suite" in metrics:
        print_suite(metrics["suite"])
        return metrics
    _print_perplexity({"adapted": metrics["perplexity"]})
    if "answers" in metrics:
        print_answers(metrics["answers"])
    return metrics


def inspect_command(config: InspectConfig) -> dict[str, Any]:
    """Show gate weights and the frozen and adapted answers for one instruction.

    Weights sum to one, together with what a null expert leaves to the base.
    """
    _ready(config)
    from smartmops.analysis.finished import inspect

    found = inspect(config)
    rows = sorted(found["gate"].items(), key=lambda pair: -pair[1])
    rows += [] if found["left_to_base"] is None else [("left to the base", found["left_to_base"])]
    table = Table("expert", "gate weight", "")
    for name, weight in rows:
        table.add_row(name, f"{weight:.3f}", "█" * round(30 * weight))
    console.print(table)
    console.print(bold("frozen "), found["frozen"])
    console.print(bold("adapted"), found["adapted"])
    return found


def generate_command(config: GenerateConfig) -> list[dict[str, Any]]:
    """Answer one instruction, or each row of a JSONL file."""
    _ready(config)
    from smartmops.serving.terminal import generate

    return generate(config)


def chat_command(config: ChatConfig) -> None:
    """Talk with a run: several turns, as they come; /expert NAME, /auto, /base, /new, /quit."""
    _ready(config)
    from smartmops.serving.terminal import chat

    chat(config)


def serve_command(config: ServeConfig) -> None:
    """Answer HTTP requests in OpenAI's form; tasks of all kinds in one batch."""
    _ready(config)
    from smartmops.web.server import serve

    serve(config, lambda words: print(words, flush=True))


def export_command(config: ExportConfig) -> dict[str, Any]:
    """Write a run's experts, or its gate, in a form that other programs load; each is compared with the run first."""
    _ready(config)
    from smartmops.handover.export import export

    found = export(config)
    sides = found["experts"] if config.format != "router" else {"gate": found}
    table = Table("compared with the run", "same", "of", "largest difference")
    for name, each in sides.items():
        count = each.get("tokens", each.get("texts"))
        table.add_row(name, str(each["same"]), str(count), f"{each['largest_difference']:.1e}")
    console.print(table)
    console.print(f"{config.out}: README.md says how it is loaded")
    return found


def push_command(config: PushConfig) -> dict[str, Any]:
    """Put a run's adapter and its card on the hub; --dry-run only lists what would go there."""
    _ready(config)
    from smartmops.handover.hub import push

    found = push(config)
    table = Table(f"{'would be ' if config.dry_run else ''}pushed to {found['repo']}", "bytes")
    for name, size in found["files"].items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    if found["url"]:
        console.print(found["url"])
    return found


def experts_command(config: ExpertsConfig) -> dict[str, Any]:
    """List, add, drop, merge, rename, freeze or calibrate the experts of a run; the others stay as they are."""
    _ready(config)
    from smartmops.surgery.told import change

    return change(config, console)


def advise_command(config: AdviseConfig) -> dict[str, Any]:
    """Say whether a new task needs an expert of its own: how the gate sees it, perplexity, a short trial."""
    _ready(config)
    from smartmops.surgery.told import advice

    return advice(config, console)


def report_command(config: ReportConfig) -> Path:
    """Write the report and say where it is."""
    _ready(config)
    return _report(list(config.runs), config.page)


def _report(runs: list[Path], out: Path) -> Path:
    from smartmops.report.report import report

    path = report(runs, out)
    console.print(f"report: {path}")
    return path


def _ready(config: Options) -> None:
    """All that can be known of options, of data and of the base before anything that takes time."""
    check(config, given=True)
    from smartmops.reading.early import look_at

    look_at(config)
    quiet()


def _print_comparison(metrics: dict[str, Any]) -> None:
    found = {name: {"overall": metrics["perplexity"][name], "per_task": metrics["per_task"][name]}
             for name in metrics["perplexity"]}  # fmt: skip
    _print_perplexity(found)


def _print_verdict(metrics: dict[str, Any], longer: str) -> None:
    """That nothing was gained, where nothing was."""
    from smartmops.fitting.validation import verdict

    if said := verdict(metrics, longer):
        console.print(bold(said, "yellow"))


def _print_perplexity(found: dict[str, dict[str, Any]]) -> None:
    """Tasks down, methods across; perplexity over response tokens."""
    table = Table("perplexity", *(name.replace("_", " ") for name in found))
    tasks = next(iter(found.values()))["per_task"]
    for task in tasks:
        table.add_row(task, *(f"{values['per_task'][task]:.2f}" for values in found.values()))
    table.add_section()
    table.add_row("overall", *(bold(f"{values['overall']:.2f}") for values in found.values()))
    console.print(table)


COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": quickstart,
    "compress": compress_command,
    "train": train_command,
    "compare": compare_command,
    "federate": federate_command,
    "federate-keys": federate_keys_command,
    "federate-server": federate_server_command,
    "federate-client": federate_client_command,
    "data": data_command,
    "evaluate": evaluate_command,
    "inspect": inspect_command,
    "generate": generate_command,
    "chat": chat_command,
    "serve": serve_command,
    "export": export_command,
    "push": push_command,
    "experts": experts_command,
    "advise": advise_command,
    "report": report_command,
    "reproduce": reproduce_command,
    "bench": bench_command,
}


def main() -> None:
    """Entry point; an error that the user can mend is a line for each fault on stderr, and exit status 2."""
    start(next(iter(sys.argv[1:]), None))
    logging.basicConfig(format="%(message)s")
    # Which form the data have, and what was left out of them.
    logging.getLogger("smartmops.data").setLevel(logging.INFO)
    with unread():
        with ending():
            call, config = asked(COMMANDS, sys.argv[1:])
        with ending(config):
            call()
