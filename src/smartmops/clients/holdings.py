"""Which client trains on which rows of one task, and why one may have none.

Knows examples, their sources and what of them was left out. Knows no adapter and no rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smartmops.checks.errors import DataError
from smartmops.options.federation import FederateConfig
from smartmops.options.training import TaskConfig
from smartmops.reading.task import Task
from smartmops.rows.example import Example, of_examples
from smartmops.runs.folder import CLIENT_FILES

from .partition import partition, read_clients


@dataclass
class Holdings:
    """The clients' rows, in one task over the server's base, and who holds which."""

    task: Task
    rows: list[list[int]]  # numbers of each client's rows in `task.train`
    names: list[str]
    table: dict[str, list[int]]  # examples of each category that each client holds
    files: str = ""  # fingerprint of the clients' files as they were read; empty where they have none


def holdings_of(config: FederateConfig, task: Task) -> Holdings:
    """Partition the server's training rows, or read one file per client.

    Raises:
        DataError: a client has nothing to train on; the message names one, the cause and the way out.
    """
    files = ""
    if config.clients_data is not None:
        given = read_clients(config.clients_data, config.columns)
        files = of_examples(given)
        task = client_task(config, task.base, task.tokenizer, given)
        names, rows = _by_source(task, {example.source for example in given})
    elif config.partition == "source":
        partition(task.train_examples, config, config.seed)  # which checks that every example has a source
        names, rows = _by_source(task, _sources(task))
    else:
        names, rows = _shared_out(config, task)
    empty = [name for name, own in zip(names, rows, strict=True) if not own]
    some = [number for number, own in enumerate(rows) if own]
    if empty and not (config.skip_empty and some):
        why = _not_enough(config, task) if config.shares_data_out else _left_out(config, task, empty[0])
        raise DataError(f"{len(empty)} of {len(names)} clients have nothing to train on, such as {empty[0]!r}: {why}"
                        + (", or leave them out with --skip-empty" if some else ""))  # fmt: skip
    categories = sorted({example.category for example in task.train_examples})
    table = {c: [sum(task.train_examples[i].category == c for i in rows[n]) for n in some] for c in categories}
    return Holdings(task, [rows[n] for n in some], [names[n] for n in some], table, files)


def inputs_of_clients(held: Holdings) -> dict[str, str]:
    """What tells the clients, and what each of them trains on, from any others: fingerprints by what they are of."""
    examples = held.task.train_examples
    found = {f"file of client {name!r}": of_examples([examples[i] for i in rows])
             for name, rows in zip(held.names, held.rows, strict=True)}  # fmt: skip
    return found | {"list of clients": of_examples(held.names), CLIENT_FILES: held.files}


def client_task(config: TaskConfig, base: Any, tokenizer: Any, examples: Sequence[Example]) -> Task:
    """A task that has rows to train on and none to test."""
    return Task.of(base, tokenizer, examples, [], config)


def _sources(task: Task) -> set[str]:
    """Of all examples, those included that are not trained on."""
    kept = {example.source for part in (task.train_examples, task.test_examples) for example in part}
    return kept | {each.source for each in task.lost.examples} | set(task.held_out)


def _by_source(task: Task, sources: set[str]) -> tuple[list[str], list[list[int]]]:
    """Names, and the numbers of each one's rows."""
    rows: dict[str, list[int]] = {name: [] for name in sorted(sources)}
    for number, example in enumerate(task.train_examples):
        rows[example.source].append(number)
    return list(rows), list(rows.values())


def _shared_out(config: FederateConfig, task: Task) -> tuple[list[str], list[list[int]]]:
    try:
        found = partition(task.train_examples, config, config.seed)
    except ValueError as error:
        raise DataError(f"{error}{_note(task)}") from error
    return found.names, found.holdings


def _note(task: Task) -> str:
    """How many rows there would be more, if they were not too long."""
    lengths = task.lost.lengths(part="train")
    return f" ({task.limit.cause(lengths, len(lengths) + len(task.train))})" if lengths else ""


def _not_enough(config: FederateConfig, task: Task) -> str:
    """Why a client got nothing when rows were shared out, and the way out."""
    even = "a smaller --skew" if config.partition == "skewed" else "a larger --dirichlet-alpha"
    return (f"{len(task.train)} rows are shared out among {config.clients}{_note(task)}: choose fewer --clients, "
            f"{even}, more data")  # fmt: skip


def _left_out(config: FederateConfig, task: Task, name: str) -> str:
    """Why nothing is left of what a client holds, and the way out."""
    lengths = task.lost.lengths(name)
    held, tested = task.held_out.get(name, 0), sum(example.source == name for example in task.test_examples)
    of, causes, ways = len(lengths) + held + tested, list[str](), list[str]()
    if lengths:
        causes.append(task.limit.cause(lengths, of))
        ways.append(task.limit.way_out(lengths))
    if held:
        causes.append(f"{held} of {of} rows are of the category that --hold-out {config.hold_out} leaves out")
        ways.append("leave --hold-out away")
    if tested:
        causes.append(f"{tested} of {of} rows are in the test split")
        ways.append("give it more rows, or choose a smaller --test-share")
    return f"{' and '.join(causes)}: {'; '.join(ways)}"
