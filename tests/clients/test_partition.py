"""Partitions: nothing lost, nothing twice, the skew of the paper as exactly as whole examples allow."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartmops.clients.partition import (
    Partition,
    PartitionConfig,
    partition,
    proportional_sizes,
    read_clients,
    skewed_sizes,
)
from smartmops.data.tasks import DOLLY_TASKS, read, sample
from smartmops.rows.example import Example

READINGS = ("each", "rest")


def made_up(*labels: tuple[str, str]) -> list[Example]:
    return [Example(f"question {number}", "", "answer", *label) for number, label in enumerate(labels)]


def of_sizes(**sizes: int) -> list[Example]:
    return made_up(*((category, "") for category, size in sizes.items() for _ in range(size)))


labels = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", "z"])), min_size=1, max_size=120)
skews = st.one_of(st.just(15.0), st.floats(1, 1e4))
configs = st.builds(
    PartitionConfig,
    clients=st.integers(1, 40),
    partition=st.sampled_from(["skewed", "dirichlet", "source"]),
    skew=skews,
    skew_of=st.sampled_from(READINGS),
    dirichlet_alpha=st.floats(1e-3, 1e3),
)


# ------------------------------------------------------------------------------------------------------------ all kinds
@given(labels, configs, st.integers(0, 2**32))
def test_a_partition_loses_and_repeats_nothing(labels: list[Any], config: PartitionConfig, seed: int) -> None:
    examples = made_up(*labels)
    config = replace(config, clients=min(config.clients, len(examples)))
    found = partition(examples, config, seed)
    assert sorted(index for held in found.holdings for index in held) == list(range(len(examples)))
    assert all(held == sorted(held) for held in found.holdings)
    clients = len({source for _, source in labels}) if config.partition == "source" else config.clients
    assert len(found.holdings) == len(found.names) == len(set(found.names)) == clients
    assert found.names == sorted(found.names)
    assert found.empty == [client for client in range(clients) if len(found.holdings[client]) == 0]


@given(labels, configs, st.integers(0, 2**32))
def test_the_table_counts_what_each_client_holds(labels: list[Any], config: PartitionConfig, seed: int) -> None:
    examples = made_up(*labels)
    found = partition(examples, replace(config, clients=min(config.clients, len(examples))), seed)
    table = found.table(examples)
    assert list(table) == sorted({category for category, _ in labels})
    for client, held in enumerate(found.holdings):
        own = Counter(examples[index].category for index in held)
        assert {category: row[client] for category, row in table.items() if row[client]} == own
    with pytest.raises(ValueError, match=f"{len(examples) + 1} examples, but {len(examples)} were shared out"):
        found.table([*examples, *made_up(("a", "x"))])


@pytest.mark.parametrize("kind", ["skewed", "dirichlet"])
def test_the_seed_decides(kind: Any) -> None:
    examples, config = of_sizes(a=60, b=60), PartitionConfig(10, kind)
    assert partition(examples, config, 7) == partition(examples, config, 7)
    found = [partition(examples, config, seed).holdings for seed in range(20)]
    assert all(found[i] != found[j] for i in range(20) for j in range(i))


@pytest.mark.parametrize(
    ("kind", "fingerprint"),
    [("skewed", "ff0dc87a6ddd8f22"), ("dirichlet", "ffb6de59c8c9609f")],
)
def test_a_partition_is_the_same_everywhere(kind: Any, fingerprint: str) -> None:
    """Fails where a platform or a version of numpy draws other numbers: runs before and after could not be compared."""
    found = partition(of_sizes(a=500, b=300, c=7), PartitionConfig(20, kind), 11)
    assert hashlib.sha256(json.dumps(found.holdings).encode()).hexdigest()[:16] == fingerprint


def test_the_order_of_the_other_categories_does_not_matter() -> None:
    """Categories are taken in sorted order, not in the order in which the data have them."""
    examples, config = of_sizes(a=40, b=30), PartitionConfig(5)
    swapped = examples[40:] + examples[:40]
    first, second = partition(examples, config, 3), partition(swapped, config, 3)
    assert first.table(examples) == second.table(swapped)


def test_names_sort_as_numbers_do() -> None:
    names = partition(of_sizes(a=1001), PartitionConfig(1001), 0).names
    assert names == sorted(names) and (names[0], names[-1]) == ("client 0000", "client 1000")
    assert partition(of_sizes(a=100), PartitionConfig(100), 0).names[7] == "client 07"
    assert partition(of_sizes(a=3), PartitionConfig(1), 0).names == ["client 0"]


# --------------------------------------------------------------------------------------------------------------- skewed
@given(st.integers(1, 5000), st.integers(1, 300), skews, st.sampled_from(READINGS))
def test_one_part_has_the_skew_up_to_one_example(count: int, clients: int, skew: float, reading: Any) -> None:
    largest, *others = skewed_sizes(count, clients, skew, reading)
    assert largest + sum(others) == count and len(others) == clients - 1
    assert largest >= max(others, default=0) and min(others, default=0) >= 0
    assert max(others, default=0) - min(others, default=0) <= 1
    if others:
        s, rest = Fraction(skew), sum(others)
        excess, limit = (
            (largest - s * Fraction(rest, clients - 1), 1 + s / (clients - 1))
            if reading == "each"
            else (largest - s * rest, 1 + s)
        )
        assert 0 <= excess < limit


@given(st.integers(1, 40), st.integers(2, 100))
def test_the_skew_is_exact_where_whole_examples_allow_it(small: int, clients: int) -> None:
    """Both readings of "15 times more samples than the rest partitions"."""
    assert skewed_sizes(small * (15 + clients - 1), clients, 15.0, "each") == [15 * small] + [small] * (clients - 1)
    others = small * (clients - 1)
    assert skewed_sizes(16 * others, clients, 15.0, "rest") == [15 * others] + [small] * (clients - 1)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((0, 3, 15.0, "each"), [0, 0, 0]),
        ((1, 3, 15.0, "each"), [1, 0, 0]),
        ((10, 1, 15.0, "rest"), [10]),
        ((10, 4, 1.0, "each"), [3, 3, 2, 2]),
        ((10, 4, 1.0, "rest"), [5, 2, 2, 1]),
        ((17, 3, 15.0, "each"), [15, 1, 1]),
        ((18, 3, 15.0, "each"), [16, 1, 1]),
    ],
)
def test_skewed_sizes_by_example(arguments: tuple[Any, ...], sizes: list[int]) -> None:
    assert skewed_sizes(*arguments) == sizes


@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=5), st.integers(1, 30), st.sampled_from(READINGS), st.integers(0)
)
def test_each_client_gets_one_part_of_each_category(counts: list[int], clients: int, reading: Any, seed: int) -> None:
    examples = of_sizes(**{f"c{number}": count for number, count in enumerate(counts)})
    config = PartitionConfig(min(clients, len(examples)), skew_of=reading)
    table = partition(examples, config, seed).table(examples)
    for number, count in enumerate(counts):
        parts = skewed_sizes(count, config.clients, config.skew, reading)
        assert sorted(table[f"c{number}"]) == sorted(parts)


def test_parts_go_to_clients_at_random() -> None:
    """Over many seeds every client is the largest holder of a category about equally often, and of two independently."""
    examples, config = of_sizes(a=40, b=40), PartitionConfig(4)
    tables = [partition(examples, config, seed).table(examples) for seed in range(800)]
    pairs = Counter(tuple(row.index(max(row)) for row in table.values()) for table in tables)
    assert len(pairs) == 16 and all(25 <= count <= 80 for count in pairs.values())  # 50 are expected, sd 6.8
    firsts = Counter(partition(examples, config, seed).holdings[0][0] for seed in range(200))
    assert len(firsts) > 5


@pytest.mark.parametrize("reading", READINGS)
def test_dolly_as_in_appendix_a(shared_data: Path, reading: Any) -> None:
    examples = sample(read(str(shared_data / "dolly15k/dolly-15k.jsonl")), 5000)
    config = PartitionConfig(skew_of=reading)
    found = partition(examples, config, 0)
    table = found.table(examples)
    assert set(table) == set(DOLLY_TASKS) and sum(map(sum, table.values())) == 5000
    for row in table.values():
        *others, largest = sorted(row)
        rest = sum(others) / (99 if reading == "each" else 1)
        assert 0 <= largest - 15 * rest < 1 + 15 / (99 if reading == "each" else 1)
    assert len({row.index(max(row)) for row in table.values()}) > 3
    assert reading == "rest" or not found.empty


# ------------------------------------------------------------------------------------------------- dirichlet and source
@given(st.integers(0, 3000), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_sizes_are_within_one_of_their_proportions(count: int, weights: list[float]) -> None:
    proportions = [weight / sum(weights) for weight in weights]
    sizes = proportional_sizes(count, proportions)
    assert sum(sizes) == count
    assert all(abs(size - count * share) < 1 + 1e-9 for size, share in zip(sizes, proportions, strict=True))


def test_largest_remainders_get_what_is_left() -> None:
    assert proportional_sizes(10, [0.25, 0.25, 0.5]) == [3, 2, 5]
    assert proportional_sizes(7, [0.5, 0.1, 0.4]) == [3, 1, 3]
    assert proportional_sizes(0, [0.5, 0.5]) == [0, 0]


def test_alpha_decides_how_uneven_a_category_is_held() -> None:
    examples = of_sizes(a=400, b=400)

    def most(alpha: float) -> float:
        """Mean share of a category that its largest holder has."""
        config = PartitionConfig(10, "dirichlet", dirichlet_alpha=alpha)
        tables = [partition(examples, config, seed).table(examples) for seed in range(20)]
        return sum(max(row) for table in tables for row in table.values()) / (20 * 2 * 400)

    shares = [most(alpha) for alpha in (1e-300, 0.01, 0.5, 5.0, 1e4, 1e6)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    assert shares[1] > 0.9 and 0.25 < shares[2] < 0.6 and shares[-1] < 0.11


def test_each_source_is_a_client() -> None:
    examples = made_up(("a", "y"), ("b", "x"), ("a", "x"), ("a", "y"))
    found = partition(examples, PartitionConfig(100, "source"), 0)
    assert found == Partition([[1, 2], [0, 3]], ["x", "y"])
    assert found.table(examples) == {"a": [1, 2], "b": [1, 0]} and found.empty == []
    assert partition(examples, PartitionConfig(0, "source"), 5) == found


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clients": 0}, "clients=0: choose 1 or more"),
        ({"clients": 11}, "clients=11, but there are 10 examples: choose 1 to 10, or give more examples"),
        ({"skew": 0.5}, "skew=0.5: choose 1 or more (15 in the paper)"),
        ({"skew": float("nan")}, "skew=nan: choose 1 or more (15 in the paper)"),
        ({"skew": float("inf")}, "skew=inf: choose 1 or more (15 in the paper)"),
        ({"skew_of": "all"}, "skew_of='all': choose each or rest"),
        ({"partition": "even"}, "partition='even': choose skewed, dirichlet or source"),
        (
            {"partition": "dirichlet", "dirichlet_alpha": 0.0},
            "dirichlet_alpha=0.0: choose a number above 0 and at most 1e+06, such as 0.5",
        ),
        (
            {"partition": "dirichlet", "dirichlet_alpha": 1.7e308},
            "dirichlet_alpha=1.7e+308: choose a number above 0 and at most 1e+06, such as 0.5",
        ),
        (
            {"partition": "source"},
            "partition='source', but 4 of 10 examples have no source: give every line of the data a `source` (or "
            "`client`), or choose skewed or dirichlet",
        ),
    ],
)
def test_a_bad_setting_is_named(setting: dict[str, Any], message: str) -> None:
    examples = made_up(*[("a", "x")] * 6, *[("a", "")] * 4)
    config = PartitionConfig(5)
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        partition(examples, config, 0)


def test_no_examples_and_a_negative_seed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^0 examples to share out among clients: give one at least$"):
        partition([], PartitionConfig(), 0)
    with pytest.raises(ValueError, match=r"^seed=-1: choose 0 or more$"):
        partition(of_sizes(a=3), PartitionConfig(2), -1)


# -------------------------------------------------------------------------------------------------------------- folders
def write(file: Path, *rows: dict[str, str]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_each_file_of_a_folder_is_a_client(tmp_path: Path) -> None:
    row = {"instruction": "i", "response": "r", "category": "a"}
    write(tmp_path / "paris.v2.jsonl", row | {"source": "elsewhere"}, row)
    write(tmp_path / "berlin.jsonl", row)
    write(tmp_path / ".hidden.jsonl", {"broken": ""})
    (tmp_path / "notes.txt").write_text("not read")
    (tmp_path / "folder.jsonl").mkdir()
    examples = read_clients(tmp_path)
    assert examples == read_clients(str(tmp_path))
    assert [example.source for example in examples] == ["berlin", "paris.v2", "paris.v2"]
    found = partition(examples, PartitionConfig(partition="source"), 0)
    assert found == Partition([[0], [1, 2]], ["berlin", "paris.v2"])


def test_a_folder_without_clients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file ending in \.jsonl: write one for each client"):
        read_clients(tmp_path)
    with pytest.raises(ValueError, match="missing' does not exist: give a folder with one JSONL file for each client"):
        read_clients(tmp_path / "missing")
    write(tmp_path / "a.jsonl", {"instruction": "i"})
    with pytest.raises(ValueError, match=r"a\.jsonl' is a file: give a folder"):
        read_clients(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no column `response`"):
        read_clients(tmp_path)


def test_clients_may_have_columns_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "berlin.jsonl").write_text('{"question": "How many?", "response": "Two."}\n')
    (found,) = read_clients(tmp_path, ("instruction=question",))
    assert (found.instruction, found.response, found.source) == ("How many?", "Two.", "berlin")


def test_files_of_clients_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("berlin.ndjson", "paris.JSONL", "rome.csv", "README.md", ".hidden.jsonl"):
        (tmp_path / name).write_text('{"instruction": "i", "response": "r"}\n')
    assert [example.source for example in read_clients(tmp_path)] == ["berlin", "paris"]
    assert f"{tmp_path}: 1 files of other forms are not read (rome.csv)" in caplog.messages
