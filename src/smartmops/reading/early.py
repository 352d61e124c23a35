"""What data and a base's shape tell of options, before anything that takes time is imported, loaded or trained.

Reads text files of a moderate size and, where it lies on this machine, the base's `config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from smartmops.base.names import is_converted, local
from smartmops.checks.errors import ConfigError, DataError, SmartmopsError
from smartmops.checks.limits import Options, Unreserved
from smartmops.checks.resources import listening
from smartmops.data.asked import read_rows
from smartmops.data.files import SUFFIXES, ending, under
from smartmops.data.several import Names, as_typed, names_of
from smartmops.data.tasks import is_stored, splits
from smartmops.options.bench import BenchConfig
from smartmops.options.compression import TEXT_ENDINGS, CompressConfig, numbers_of, undivided, uneven
from smartmops.options.federation import ClientConfig, FederateConfig
from smartmops.options.finished.reading import DataConfig, EvaluateConfig
from smartmops.options.finished.serving import GenerateConfig, ServeConfig
from smartmops.options.finished.surgery import AdviseConfig, ExpertsConfig
from smartmops.options.method import unmet_by_shape
from smartmops.options.reproduce import ReproduceConfig
from smartmops.options.training import TaskConfig
from smartmops.rows.ahead import ahead
from smartmops.rows.example import Example
from smartmops.traits import METHODS

from .held_out import left_to_train

LOOKED_AT = 32_000_000  # bytes of a file of examples that is read to see whether options fit it
TABLES = (".csv", ".tsv", ".parquet")  # are read by libraries that take time to import
UNLABELLED = 7  # experts by default where nothing tells tasks: as many as the paper has
MOST_TASKS = 64  # that get an expert each by default; more are rather a column of something else
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what families call them

Tasked = TypeVar("Tasked", bound=TaskConfig)


def look_at(config: Options) -> None:
    """`look` for every command, as far as it has data or a base.

    Raises:
        ConfigError: options do not fit the data or the base.
        OSError: there is no such data or base.
    """
    if isinstance(config, TaskConfig):
        look(config)
    elif isinstance(config, CompressConfig):
        look_at_compression(config)
    elif isinstance(config, EvaluateConfig | BenchConfig):
        look_at_data(config.data, config.columns)
    elif isinstance(config, AdviseConfig | ExpertsConfig):
        asked = config.do if isinstance(config, ExpertsConfig) else config
        for name in ("data", "inputs", "old"):
            look_at_data(getattr(asked, name, None), getattr(asked, "columns", ()))
    elif isinstance(config, ReproduceConfig | ClientConfig | DataConfig) and config.model is not None:
        look_at_model(config.model)
    elif isinstance(config, GenerateConfig) and config.file is not None:
        read_rows(config.file)
    elif isinstance(config, ServeConfig):
        listening(config.host, config.port).close()
    if isinstance(config, DataConfig):
        look_at_data(config.data, config.columns, config.limit)


def look_at_data(data: Names | None, columns: Sequence[str], limit: int | None = None) -> None:
    """Read data that are read in a moment, so that what is wrong with them is told before anything else is done.

    Raises:
        DataError: they cannot be read; the message names file, lines and way out.
        OSError: there are no such data.
    """
    if data is not None and at_hand(data):
        with ahead():
            splits(data, limit, columns=columns)


def look(config: TaskConfig) -> None:
    """Whether options fit the data and the base, as far as both can be known at once.

    Raises:
        ConfigError: they do not, or there is no such data or base; one line for each.
    """
    found = [*_heard(lambda: _base_says(config)), *_heard(lambda: _data_say(config))]
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError("\n".join(dict.fromkeys(map(str, found))))


def _heard(ask: Callable[[], Iterator[str]]) -> list[SmartmopsError]:
    """What it says, or raises."""
    try:
        return [ConfigError(said) for said in ask()]
    except SmartmopsError as error:
        return [error]


def look_at_model(model: str) -> Path | None:
    """The folder of a base, where it is on this machine and nothing has to be fetched or converted.

    Raises:
        OSError: there is no such model, or it cannot be asked for.
        ConfigError: it is no model.
    """
    if is_converted(model):
        return None
    folder = Path(local(model))
    return folder if (folder / "config.json").is_file() else None


def _base_says(config: TaskConfig) -> Iterator[str]:
    folder = look_at_model(config.model)
    layers = layers_of(folder) if folder is not None else None
    if layers:
        yield from unmet_by_shape(config, config.trained(), layers)


def look_at_compression(config: CompressConfig) -> None:
    """Whether options of a compression fit the base and the text.

    Raises:
        OSError: there is no such model, or it cannot be asked for.
        ConfigError: they do not fit, or what is named is no model.
    """
    folder = look_at_model(config.model)
    shape = {} if folder is None else shape_of(folder)
    config.check_positions(shape.get("max_position_embeddings"))
    if config.pattern and (pair := numbers_of(config.pattern)):
        for columns in (shape.get("hidden_size"), shape.get("intermediate_size")):
            if isinstance(columns, int) and (said := undivided(columns, pair[1], "a layer of this model")):
                raise ConfigError(f"--pattern {config.pattern}, but {said}")
        if config.method == "sparsegpt" and (said := uneven(config.block_size, pair[1])):
            raise ConfigError(f"--block-size {config.block_size}{said}")
    if config.calibration and not config.calibration.endswith(TEXT_ENDINGS) and at_hand(config.calibration):
        with ahead():
            splits(config.calibration, config.limit, config.test_share, config.data_seed, columns=config.columns)


def shape_of(folder: Path) -> dict[str, Any]:
    """The numbers of a base's `config.json`, those of its text part where it has several; empty where it is broken."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = found.get("text_config", found)
        return text if isinstance(text, dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}  # who loads it says what is wrong


def layers_of(folder: Path) -> int | None:
    """How many decoder layers a base has; None where its `config.json` does not say."""
    shape = shape_of(folder)
    return next((shape[name] for name in LAYERS if isinstance(shape.get(name), int)), None)


def at_hand(data: Names) -> bool:
    """Whether DATA are text files, or folders of them, that are read in a moment, or none at all."""
    return all(_at_hand(name) for name in names_of(data))


def _at_hand(data: str) -> bool:
    path = Path(data)
    if data == "office":
        return True
    if path.is_file():  # one of no form that is known is refused by its name
        return ending(path) not in TABLES and path.stat().st_size <= LOOKED_AT
    if path.is_dir():  # of files, not what `datasets` stores
        files = [file for file in under(path) if ending(file) in SUFFIXES and file.is_file()]
        small = sum(file.stat().st_size for file in files) <= LOOKED_AT
        return small and bool(files) and not is_stored(path) and not any(ending(file) in TABLES for file in files)
    return not path.exists() and (ending(path) in SUFFIXES or data.startswith((".", "/")))


def _data_say(config: TaskConfig) -> Iterator[str]:
    if not at_hand(config.data):
        return
    with ahead():
        train, test = splits(config.data, config.limit, config.test_share, config.data_seed, config.validation,
                             columns=config.columns)  # fmt: skip
    if config.hold_out is not None:
        check_hold_out(config.hold_out, {example.category for example in train})
    check_parts(config.data, len(train), len(test))
    left = left_to_train(train, config)
    if not isinstance(config, FederateConfig):
        check_split(config, left, len(test), 1)
    elif config.shares_data_out and config.clients > left:
        yield (f"--clients {config.clients}, but there are {left} training examples: choose 1 to {left}, or give more "
               "examples")  # fmt: skip
    yield from _tasks_say(config, train)


def _tasks_say(config: TaskConfig, train: Sequence[Example]) -> Iterator[str]:
    """Whether there is an expert for every task, where tasks decide which expert an instruction is meant for."""
    gated = [METHODS[method] for method in config.trained() if METHODS[method].by_task]
    told = any(method.told for method in gated)
    tasks = sorted({example.category for example in train} - {config.hold_out})
    if config.experts is None:
        if len(tasks) > MOST_TASKS and _one_for_each(config, tasks):
            yield (f"there are {len(tasks)} tasks, and each gets an expert where they are {MOST_TASKS} at most: choose "
                   f"--experts {len(tasks)}, or fewer with --gate-pretraining clusters")  # fmt: skip
            return
        config = counted(config, train)
        yield from config.problems()
    if not gated or not config.several or (config.gate_pretraining != "labels" and not told):
        return
    if tasks == [""]:
        if isinstance(config, FederateConfig):
            yield "--gate-pretraining labels, but no example has a category: add one, or choose clusters"
        elif told:
            yield "--method oracle is told the category, but no example has one: add it, or choose mops"
        return
    if config.expert_names is not None and (unknown := [task for task in tasks if task not in config.expert_names]):
        yield (f"--expert-names {' '.join(config.expert_names)} lack category {unknown[0]!r}: name an expert for it, "
               "leave its examples out, or choose --gate-pretraining clusters")  # fmt: skip
    for task in tasks:
        if wrong := Unreserved("a name").wrong(task):
            yield f"a task is called {task!r}, which{wrong}"
    if len(tasks) > config.number:
        yield (f"--experts {config.number}, but there are {len(tasks)} tasks: choose {len(tasks)}, or "
               "--gate-pretraining clusters")  # fmt: skip


def counted(config: Tasked, train: Iterable[Example]) -> Tasked:
    """The options with a number of experts: where they leave it open, of the tasks that are trained on."""
    if config.experts is not None:
        return config
    tasks = {example.category for example in train} - {config.hold_out}
    if config.expert_names is not None:
        return replace(config, experts=len(config.expert_names))
    return replace(config, experts=len(tasks) if _one_for_each(config, tasks) else UNLABELLED)


def _one_for_each(config: TaskConfig, tasks: Collection[str | None]) -> bool:
    """Whether rows name tasks, and these, no clusters, are what experts are meant for."""
    by_task = any(METHODS[method].told and METHODS[method].by_task for method in config.trained())
    return set(tasks) != {""} and (by_task or config.gate_pretraining != "clusters") and config.expert_names is None


def check_tasks(config: TaskConfig, train: Sequence[Example]) -> None:
    """Whether there is an expert for every task of these training examples, where labels decide.

    Raises:
        ConfigError: there is not; the message names the options and the way out.
    """
    if found := list(_tasks_say(config, train)):
        raise ConfigError("\n".join(found))


def check_split(config: Any, train: int, test: int, world: int) -> None:
    """What can be known once the data are read.

    Args:
        config: A `TaskConfig`.
        train: Examples that are trained on, so without those held out for validation.
        test: Test examples.
        world: Processes that train together.

    Raises:
        ConfigError: a batch is larger than the training split, or there is nothing to train on or to test on.
    """
    check_parts(config.data, train, test)
    if config.batch_size * world > train:
        who = f" in each of {world} processes" if world > 1 else ""
        raise ConfigError(f"--batch-size {config.batch_size}{who}, but there are {train} training examples: choose 1 "
                          f"to {max(1, train // world)}")  # fmt: skip


def check_parts(data: Names, train: int, test: int) -> None:
    """Whether so many training and test examples are enough to train on and to test on.

    Raises:
        DataError: there are none of either.
    """
    if not train or not test:
        raise DataError(f"--data {as_typed(data)}: {train} training and {test} test examples. Every category is split "
                        "by itself, and one with a single example has none to test on: give two or more")  # fmt: skip


def check_hold_out(category: str, found: set[str]) -> None:
    """Whether a category to train nothing on is one of those `found` in the training split, and not the only one.

    Raises:
        ConfigError: it is not.
    """
    if category not in found:
        raise ConfigError(f"--hold-out {category} is no category of the training split: choose one of {sorted(found)}")
    if len(found) == 1:
        raise ConfigError(f"--hold-out {category} is the only category of the training split, so nothing is left to "
                          "train on: give data of several tasks, or leave --hold-out away")  # fmt: skip


def check_base(method: Any, name: str) -> None:
    """Whether the method's settings fit a base whose `config.json` lies in the folder `name`; nothing where none does.

    Raises:
        ConfigError: a layer is named that the base has not got.
    """
    layers = layers_of(Path(name))
    methods = method.trained() if hasattr(method, "trained") else [method.method]
    if layers and (found := list(unmet_by_shape(method, methods, layers))):
        raise ConfigError("\n".join(found))


def warn_of_calibration(config: Any, folder: str, console: Console) -> None:
    """Say so where the base was compressed on examples that are about to be tested on."""
    record = Path(folder) / "compression.json"
    text = json.loads(record.read_text())["calibration"] if record.is_file() else None
    names = names_of(config.data)
    if not text or not text["sequences"] or text["data"] not in names:
        return
    split = {"seed": config.data_seed, "limit": config.limit, "test_share": config.test_share}
    if text["split"] != split or len(names) > 1:
        console.print(
            f"{config.model} was calibrated on another split of {as_typed(names)} ({text['split']}, here {split}), so "
            "on examples of this test split: compress again with --data-seed, --limit and --test-share as here"
        )
