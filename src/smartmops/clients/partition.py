"""Which client holds which example: the skew of the paper's appendix A, Dirichlet, or as the data say.

Knows the category and the source of examples. Knows no text, no tokens and nothing of how clients train.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from numpy.random import Generator, SeedSequence, default_rng

from smartmops.checks.errors import ConfigError, DataError
from smartmops.data.files import client_files
from smartmops.data.several import tell_unread
from smartmops.data.tasks import of_clients
from smartmops.options.federation import LARGEST_ALPHA, PartitionConfig
from smartmops.rows.example import Example

STREAMS = {"skewed": 1, "dirichlet": 2}  # of random numbers: kinds with the same seed have nothing in common


@dataclass(frozen=True)
class Partition:
    """Who holds what.

    Attributes:
        holdings: Per client, the indices of its examples, ascending. Every example has exactly one holder.
        names: Of clients, all different, sorted as text.
    """

    holdings: list[list[int]]
    names: list[str]

    @property
    def empty(self) -> list[int]:
        """Numbers of the clients that hold nothing."""
        return [client for client, held in enumerate(self.holdings) if not held]

    def table(self, examples: Sequence[Example]) -> dict[str, list[int]]:
        """How many examples of each category each client holds; categories sorted.

        Raises:
            ConfigError: There are more or fewer examples than were shared out.
        """
        if (shared := sum(map(len, self.holdings))) != len(examples):
            raise ValueError(f"{len(examples)} examples, but {shared} were shared out: give the same ones")
        counts = {category: [0] * len(self.holdings) for category in _by_category(examples)}
        for client, held in enumerate(self.holdings):
            for index in held:
                counts[examples[index].category][client] += 1
        return counts


def partition(examples: Sequence[Example], config: PartitionConfig, seed: int) -> Partition:
    """Share out examples among clients; the same seed gives the same partition.

    Categories are taken in sorted order, and the examples of each are shuffled and cut into one part a client:

    - skewed (appendix A): sizes as `skewed_sizes`; every client gets one part of every category, at random.
    - dirichlet: sizes as `proportional_sizes`, the clients' proportions drawn from Dirichlet(alpha) per category.
    - source: each client holds the examples of one source. Nothing is random.

    A client may end with no examples (`Partition.empty`).

    Raises:
        ConfigError: There are no examples or fewer than clients, a setting is out of its range, the seed is negative,
            or with `partition="source"` an example has no source.
    """
    _check(len(examples), config, seed)
    if config.partition == "source":
        return _by_source(examples)
    generator = default_rng(SeedSequence((seed, STREAMS[config.partition])))
    sizes = {"skewed": _random_skewed, "dirichlet": _random_dirichlet}[config.partition]
    holdings = _share_out(examples, lambda count: sizes(count, config, generator), generator)
    width = len(str(config.clients - 1))
    return Partition(holdings, [f"client {number:0{width}}" for number in range(config.clients)])


def read_clients(folder: str | Path, columns: Sequence[str] = ()) -> list[Example]:
    """One client a JSONL file: the examples of all of them, `source` being the file's name without its ending.

    Files are read in the order of their names; hidden files and folders within the folder are not.

    Raises:
        ConfigError, DataError: There is no such folder, it holds no .jsonl file, or one is broken (see `read_jsonl`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"clients={str(folder)!r} {problem}: give a folder with one JSONL file for each client")
    visible = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    files = client_files(folder)
    if not files:
        raise DataError(f"clients={str(folder)!r} holds no file ending in .jsonl: write one for each client, such as "
                        "berlin.jsonl")  # fmt: skip
    tell_unread(folder, (file for file in visible if file not in files))
    return of_clients(folder, columns)


# --------------------------------------------------------------------------------------------------------------- sizes
def skewed_sizes(count: int, clients: int, skew: float, skew_of: Literal["each", "rest"]) -> list[int]:
    """Sizes of the parts of a category of `count` examples, the largest first.

    Exactly, without rounding errors: the largest part is due `count * s / (s + clients - 1)` examples where `s`, the
    skew, is of each other part, `count * s / (s + 1)` where it is of the rest together, and all with one client. That
    is rounded up; the remainder is dealt out one by one, so that the other parts differ by one example at most.
    Hence the largest part, L, never has less than the skew and exceeds it by less than one example of its own: with M
    the mean of the others, `0 <= L - s * M < 1 + s / (clients - 1)`, and with R their sum, `0 <= L - s * R < 1 + s`.
    With fewer examples than clients, parts are empty.
    """
    exact, others = Fraction(skew), clients - 1
    share = exact / (exact + (others if skew_of == "each" else 1)) if others else Fraction(1)
    largest = math.ceil(count * share)
    each, over = divmod(count - largest, max(1, others))
    return [largest, *(each + (number < over) for number in range(others))]


def proportional_sizes(count: int, proportions: Sequence[float]) -> list[int]:
    """Sizes that sum to `count` and lie within one example of their proportions (which sum to 1).

    Each is rounded down; what is left goes, one by one, to the largest remainders, of equals to the first.
    """
    due = [count * proportion for proportion in proportions]
    sizes = [math.floor(each) for each in due]
    by_remainder = sorted(range(len(due)), key=lambda client: sizes[client] - due[client])
    for client in by_remainder[: count - sum(sizes)]:
        sizes[client] += 1
    return sizes


def _random_skewed(count: int, config: PartitionConfig, generator: Generator) -> list[int]:
    sizes = skewed_sizes(count, config.clients, config.skew, config.skew_of)
    return [sizes[part] for part in generator.permutation(config.clients).tolist()]


def _random_dirichlet(count: int, config: PartitionConfig, generator: Generator) -> list[int]:
    return proportional_sizes(count, generator.dirichlet([config.dirichlet_alpha] * config.clients).tolist())


# --------------------------------------------------------------------------------------------------------------- parts
def _share_out(
    examples: Sequence[Example], sizes_of: Callable[[int], list[int]], generator: Generator
) -> list[list[int]]:
    parts: list[list[list[int]]] = []
    for members in _by_category(examples).values():
        shuffled = generator.permutation(members).tolist()
        cuts = accumulate(sizes_of(len(members)), initial=0)
        parts.append([shuffled[start:stop] for start, stop in pairwise(cuts)])
    return [sorted(index for part in held for index in part) for held in zip(*parts, strict=True)]


def _by_source(examples: Sequence[Example]) -> Partition:
    if nameless := sum(not example.source for example in examples):
        raise DataError(f"partition='source', but {nameless} of {len(examples)} examples have no source: give every "
                        "line of the data a `source` (or `client`), or choose skewed or dirichlet")  # fmt: skip
    held = _grouped(example.source for example in examples)
    return Partition(list(held.values()), list(held))


def _by_category(examples: Sequence[Example]) -> dict[str, list[int]]:
    return _grouped(example.category for example in examples)


def _grouped(labels: Iterable[str]) -> dict[str, list[int]]:
    """Indices of each label, labels sorted."""
    members = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    return dict(sorted(members.items()))


def _check(examples: int, config: PartitionConfig, seed: int) -> None:
    kind, clients = config.partition, config.clients
    if not examples:
        raise ConfigError("0 examples to share out among clients: give one at least")
    if kind not in ("source", *STREAMS):
        raise ConfigError(f"partition={kind!r}: choose skewed, dirichlet or source")
    if seed < 0:
        raise ConfigError(f"seed={seed}: choose 0 or more")
    if kind == "source":
        return
    if clients < 1:
        raise ConfigError(f"clients={clients}: choose 1 or more")
    if clients > examples:
        raise ConfigError(f"clients={clients}, but there are {examples} examples: choose 1 to {examples}, or give more "
                          "examples")  # fmt: skip
    if kind == "skewed" and config.skew_of not in ("each", "rest"):
        raise ConfigError(f"skew_of={config.skew_of!r}: choose each or rest")
    if kind == "skewed" and not 1 <= config.skew < math.inf:
        raise ConfigError(f"skew={config.skew}: choose 1 or more (15 in the paper)")
    if kind == "dirichlet" and not 0 < config.dirichlet_alpha <= LARGEST_ALPHA:
        raise ConfigError(f"dirichlet_alpha={config.dirichlet_alpha}: choose a number above 0 and at most "
                          f"{LARGEST_ALPHA:g}, such as 0.5")  # fmt: skip
