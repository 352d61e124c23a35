"""Command -> typed function. Every command is one importable function; this file only parses and prints."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from smartmops.bench import bench
from smartmops.compression.compress import CompressConfig, compress
from smartmops.data.example import Example
from smartmops.data.template import Template
from smartmops.deployment.client import ClientConfig, federate_client
from smartmops.deployment.keys import KeysConfig, make_keys
from smartmops.deployment.server import ServerConfig, federate_server
from smartmops.federated.federate import FederateConfig, federate
from smartmops.federated.rounds import QuorumLost
from smartmops.flower.simulation import simulate
from smartmops.reproduce.reproduce import reproduce
from smartmops.training.answers import questions, score
from smartmops.training.baselines import Method, base_of, load_run, template_of
from smartmops.training.compare import CompareConfig, compare
from smartmops.training.evaluate import answer, evaluate
from smartmops.training.loop import EMBEDDED_SETTING
from smartmops.training.pretrain import Embedder
from smartmops.training.selection import TOLD
from smartmops.training.task import Task
from smartmops.training.trainer import TrainConfig, train
from smartmops.training.validation import verdict
from smartmops.tuner.gate import by_expert

console = Console()

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
    metrics = compare(config)
    _print_comparison(metrics)
    _report([out], out / "report.html")
    return metrics


def compress_command(config: CompressConfig) -> dict[str, Any]:
    """Prune a model (SparseGPT, Wanda, magnitude), quantise it, or both, into a folder that transformers loads."""
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
    metrics = train(config)
    _print_perplexity({"frozen": metrics["perplexity_frozen"], config.method: metrics["perplexity"]})
    if "answers" in metrics:
        _print_answers(metrics["answers"])
    if said := verdict(metrics):
        console.print(f"[bold yellow]{escape(said)}[/bold yellow]")
    return metrics


def federate_command(config: FederateConfig) -> dict[str, Any]:
    """Train one adapter over clients whose data stay with them, and write a run folder."""
    metrics = simulate(config) if config.engine == "flower-simulation" else federate(config)
    _print_perplexity({"frozen": metrics["perplexity_frozen"], config.method: metrics["perplexity"]})
    if metrics["holdings"] and find_spec("matplotlib"):
        from smartmops.analysis.holdings import save_holdings

        save_holdings(metrics["holdings"]["table"], metrics["holdings"]["names"], config.out / "holdings.png")
        console.print(f"who holds what: {config.out / 'holdings.png'}")
    return metrics


def federate_server_command(config: ServerConfig) -> dict[str, Any]:
    """Train one adapter over clients on other machines, each running `smartmops federate-client`."""
    metrics = federate_server(config)
    _print_perplexity({"frozen": metrics["perplexity_frozen"], config.method: metrics["perplexity"]})
    return metrics


def federate_client_command(config: ClientConfig) -> None:
    """Train on the data of this machine whenever the server asks; the data stay here."""
    if status := federate_client(config):
        sys.exit(status)


def federate_keys_command(config: KeysConfig) -> None:
    """Make the keys and certificates of a real federation."""
    make_keys(config)


@dataclass
class EvaluateConfig:
    """Perplexity of a run's adapter over response tokens, overall and per task; answers where asked for."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # run folder
    data: str | None = None  # None: the test split of the data the run was trained on
    max_length: int | None = None  # tokens; None: as in training
    batch_size: int = 32
    answers: int = 0  # examples of each task answered, frozen and adapted, and scored: ROUGE-L and exact match
    answer_tokens: int = 48  # at which an answer ends that has not ended itself


def evaluate_command(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run; the numbers are also written to RUN/evaluation.json."""
    model, tokenizer, run = load_run(config.run)
    arguments = run.config["arguments"]
    if arguments.get("method") in TOLD:
        raise ValueError(f"method {arguments['method']!r} is told which expert to use: it is a mark for tables, "
                         f"and its perplexity is in {config.run / 'metrics.json'}")  # fmt: skip
    again = TrainConfig(
        model=base_of(run), out=config.run, data=config.data or arguments["data"],
        data_seed=arguments.get("data_seed", arguments["seed"]),
        limit=None if config.data else arguments["limit"], test_share=arguments["test_share"],
        max_length=config.max_length or arguments["max_length"], embedder=arguments.get("embedder"),
        validation_share=0.0, template=template_of(run),
        columns=() if config.data else tuple(arguments.get("columns", ())),
    )  # fmt: skip
    task = Task.load(again, model, tokenizer)
    rows = [*task.train, *task.test] if config.data else task.test
    examples = [*task.train_examples, *task.test_examples] if config.data else task.test_examples
    metrics = evaluate(model, rows, task.collator, config.batch_size, progress=True).metrics()
    _print_perplexity({"adapted": metrics["perplexity"]})
    if config.answers:
        asked = questions(model, tokenizer, examples, config.answers, config.answer_tokens, task.template)
        metrics["answers"] = score(
            model,
            tokenizer,
            [examples[i] for i in asked],
            [rows[i] for i in asked],
            config.answer_tokens,
            task.template,
        )
        _print_answers(metrics["answers"])
    run.write_evaluation(metrics | {"data": again.data})
    return metrics


@dataclass
class InspectConfig:
    """Which experts fire, and how much, for an instruction."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # run folder
    text: str  # instruction
    context: str = ""
    max_new_tokens: int = 48


def inspect_command(config: InspectConfig) -> dict[str, Any]:
    """Show gate weights and the frozen and adapted answers for one instruction.

    Weights sum to one, together with what a null expert leaves to the base.

    Raises:
        ValueError: the run's method has no gate.
    """
    model, tokenizer, run = load_run(config.run)
    if not hasattr(model.base_model, "last_gate"):
        raise ValueError(f"{config.run} was trained with method {run.config.get('method')!r}, which has no gate: "
                         "inspect a run of --method mops")  # fmt: skip
    mops = model.peft_config["default"]
    example = Example(config.text, config.context, "")
    template = Template.of(template_of(run), tokenizer)
    inputs = {}
    if mops.embedder:
        inputs["gate_embedding"] = torch.tensor(Embedder(mops.embedder)([config.text]))
    adapted = answer(model, tokenizer, [example], config.max_new_tokens, template, **inputs)[0]
    weights = by_expert(model.base_model.last_gate, mops.num_experts)[0].tolist()
    lost = model.base_model.last_null
    with model.disable_adapter():
        frozen = answer(model, tokenizer, [example], config.max_new_tokens, template)[0]
    names = mops.expert_names or [f"expert {i}" for i in range(mops.num_experts)]
    table = Table("expert", "gate weight", "")
    rows = sorted(zip(names, weights, strict=True), key=lambda pair: -pair[1])
    left = 0.0 if lost is None else float(lost[0])
    rows += [] if lost is None else [("left to the base", left)]
    for name, weight in rows:
        table.add_row(name, f"{weight:.3f}", "█" * round(30 * weight))
    console.print(table)
    console.print("[bold]frozen[/bold] ", escape(frozen))  # an answer's own [brackets] are no markup
    console.print("[bold]adapted[/bold]", escape(adapted))
    gate = dict(zip(names, weights, strict=True))
    return {"gate": gate, "left_to_base": left, "frozen": frozen, "adapted": adapted}


@dataclass
class ReportConfig:
    """One self-contained report.html of one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]  # run folders
    out: Path | None = None  # None: report.html in the first run folder


def report_command(config: ReportConfig) -> Path:
    """Write the report and say where it is."""
    if not config.runs:
        raise ValueError("0 run folders given: name at least one, such as runs/quickstart")
    return _report(list(config.runs), config.out or config.runs[0] / "report.html")


def _report(runs: list[Path], out: Path) -> Path:
    from smartmops.analysis.report import report

    path = report(runs, out)
    console.print(f"report: {path}")
    return path


def _print_comparison(metrics: dict[str, Any]) -> None:
    found = {name: {"overall": metrics["perplexity"][name], "per_task": metrics["per_task"][name]}
             for name in metrics["perplexity"]}  # fmt: skip
    _print_perplexity(found)


def _print_perplexity(found: dict[str, dict[str, Any]]) -> None:
    """Tasks down, methods across; perplexity over response tokens."""
    table = Table("perplexity", *(name.replace("_", " ") for name in found))
    tasks = next(iter(found.values()))["per_task"]
    for task in tasks:
        table.add_row(task, *(f"{values['per_task'][task]:.2f}" for values in found.values()))
    table.add_section()
    table.add_row("overall", *(f"[bold]{values['overall']:.2f}[/bold]" for values in found.values()))
    console.print(table)


def _print_answers(found: dict[str, Any]) -> None:
    """Tasks down, scores of the frozen and the adapted model across."""
    sides = (("frozen", found["frozen"]), ("adapted", found))
    scores = [side[key] for key in ("rouge_l", "exact_match") for _, side in sides]
    table = Table("answers", "", *(f"{words}, {name}" for words in ("ROUGE-L", "exact match") for name, _ in sides))
    for task, count in found["count"].items():
        table.add_row(task, str(count), *(f"{each['per_task'][task]:.3f}" for each in scores))
    table.add_section()
    table.add_row("overall", str(sum(found["count"].values())), *(f"[bold]{s['overall']:.3f}[/bold]" for s in scores))
    console.print(table)


COMMANDS: dict[str, Any] = {
    "quickstart": quickstart,
    "compress": compress_command,
    "train": train_command,
    "compare": compare,
    "federate": federate_command,
    "federate-keys": federate_keys_command,
    "federate-server": federate_server_command,
    "federate-client": federate_client_command,
    "evaluate": evaluate_command,
    "inspect": inspect_command,
    "report": report_command,
    "reproduce": reproduce,
    "bench": bench,
}


def main() -> None:
    """Entry point; an error of the user's is one line on stderr and exit status 2."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("smartmops.data").setLevel(
        logging.INFO
    )  # which form the data have, and what was left out of them
    disable_progress_bar()  # of transformers' loading and saving: ours say what takes time
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="smartmops", description="Mixture of Prompts: one frozen model, many tasks.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except QuorumLost as error:
        Console(stderr=True).print(f"[red]stopped:[/red] {escape(str(error))}", highlight=False)
        sys.exit(3)
