"""Limits stand beside every option, and one check serves command line and Python alike."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import tyro

from smartmops import cli
from smartmops.checks.limits import Count, Limit, Number, Options, Rate, Several, check, hints_of
from smartmops.options.training import TrainConfig

FREE = {"hold_out", "context", "methods", "rates", "do"}  # any words; a category, a table's line; a change has its own


@dataclass
class Some(Options):
    model: Annotated[str, tyro.conf.Positional]
    size: Count = 1
    sizes: Annotated[tuple[Count, ...], Several("1 2")] = (1,)
    rates: dict[str, Rate | None] = field(default_factory=dict)
    word: Literal["a", "b"] = "a"
    flag: bool = False

    def problems(self) -> Any:
        if self.flag and self.size > 5:
            yield f"--size {self.size} and --flag do not go together"


def some(**changes: Any) -> Some:
    made = Some("m")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(("changes", "said"), [
    ({"size": 0}, "--size 0: choose 1 or more"),
    ({"size": 2**40}, "--size 1099511627776: choose at most 2147483647"),
    ({"size": 1.5}, "--size 1.5: give a whole number"),
    ({"size": True}, "--size True: give a whole number"),
    ({"size": "3"}, "--size 3: give a whole number"),
    ({"sizes": ()}, "--sizes is given nothing: name at least one, such as 1 2"),
    ({"sizes": (1, -2)}, "--sizes -2: choose 1 or more"),
    ({"sizes": (3, 3)}, "--sizes 3 3: 3 is named twice, name each once"),
    ({"rates": {"a": float("nan")}}, "--rates a nan: choose a finite rate of 0 or more"),
    ({"rates": {"a": float("inf")}}, "--rates a inf: choose a finite rate of 0 or more"),
    ({"word": "c"}, "--word c: choose a or b"),
    ({"model": 3}, "MODEL 3: give text"),
    ({"size": 6, "flag": True}, "--size 6 and --flag do not go together"),
    ({"size": 0, "word": "c"}, "--size 0: choose 1 or more\n--word c: choose a or b"),
])  # fmt: skip
def test_what_is_outside_its_limits_is_named_as_it_is_typed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(some(**changes))
    assert str(refused.value) == said


def test_what_is_within_them_passes() -> None:
    check(some(size=2**31 - 1, sizes=(1, 2), rates={"a": None, "b": 0.0, "c": 3}, word="b"))


@pytest.mark.parametrize(("limit", "good", "bad"), [
    (Number("x", 0, 1), (0, 1, 0.5), (-0.1, 1.1, float("nan"))),
    (Number("x", 0, 1, above=True), (1, 1e-300), (0, -0.0)),
    (Number("x", 0, 1, below=True), (0, 0.999), (1, 1.0)),
    (Number("x", 0), (0, 1e308), (float("inf"), float("-inf"))),
])  # fmt: skip
def test_a_number_is_finite_and_in_its_range(limit: Number, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    assert [value for value in good if limit.wrong(value)] == []
    assert [value for value in bad if not limit.wrong(value)] == []


def limited(hint: Any) -> bool:
    """Whether a hint leaves no value unlooked at: words of a choice, True or False, or a limit on all that it holds."""
    origin, inner = get_origin(hint), [each for each in get_args(hint) if each is not type(None)]
    if hint is bool or origin is Literal:
        return True
    if origin is Annotated:
        return any(isinstance(each, Limit) for each in hint.__metadata__) or limited(inner[0])
    if origin is dict:
        return limited(inner[1])
    return origin in (Union, tuple, type(int | None)) and all(limited(each) for each in inner if each is not ...)


def configs() -> list[type]:
    found = [typing.get_type_hints(command).get("config") for command in cli.COMMANDS.values()]
    return [kind for kind in found if kind is not None]


@pytest.mark.parametrize("kind", configs())
def test_every_option_of_every_command_has_limits(kind: type) -> None:
    assert issubclass(kind, Options)
    assert [name for name, hint in hints_of(kind).items() if not limited(hint) and name not in FREE] == []


def test_every_command_but_one_takes_a_config() -> None:
    assert len(configs()) == len(cli.COMMANDS) - 1, "quickstart makes one of what it takes"


def test_a_taken_place_is_said_with_the_rest_and_by_its_kind_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds files of something else \(mine.txt\)"):
        check(TrainConfig(model="tiny", data="office", out=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"--steps -1: choose 0 or more\n--out .* exists and holds"):
        check(TrainConfig(model="tiny", data="office", out=tmp_path / "run", steps=-1))
