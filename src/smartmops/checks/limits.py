"""What values an option may have, declared beside it, and the one check of all of them.

A limit stands in the annotation of a field of a config: `batch_size: Count = 16`, where `Count` is
`Annotated[int, Number("1 or more", 1)]`. What concerns several options, a config's own `problems` says. Knows limits,
and how options are typed; knows no option.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import tyro

from smartmops.checks.errors import ConfigError, RunError, SmartmopsError, WrongType

logger = logging.getLogger(__name__)

FLAG = re.compile(r"--([a-z][a-z0-9-]*)")
GIVEN = re.compile(rf"^{FLAG.pattern} ([^\s:,]+)(?=[:,])", re.MULTILINE)  # a line that opens with a value
LARGEST = 2**31 - 1  # of a count: what every library takes
LONGEST_NAME = 100  # characters


@runtime_checkable
class Limit(Protocol):
    """What an option must be."""

    def wrong(self, value: Any) -> str | None:
        """What is wrong with `value`, and the way out, as it stands behind option and value; None: nothing."""


@dataclass(frozen=True)
class Number:
    """A finite number in a range; `above` and `below` leave out the ends themselves."""

    words: str  # behind "choose"
    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False

    def wrong(self, value: Any) -> str | None:
        """As `Limit`."""
        high = value < self.high if self.below else value <= self.high
        low = value > self.low if self.above else value >= self.low
        if low and high and math.isfinite(value):
            return None
        too_large = self.high == LARGEST and value > self.high
        return f": choose {f'at most {LARGEST}' if too_large else self.words}"


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def wrong(self, value: Any) -> str | None:
        """As `Limit`."""
        return None if value in self.words else f": choose {listed(self.words)}"


@dataclass(frozen=True)
class Text:
    """Words that are not blank."""

    what: str

    def wrong(self, value: Any) -> str | None:
        """As `Limit`."""
        if not value.strip():
            return f" is blank: give {self.what}"
        return " holds a null character: leave it out" if "\0" in value else None


AUTO, BASE = "auto", "base"  # what a server calls the gate's own choice, and the base without any expert


@dataclass(frozen=True)
class Unreserved(Text):
    """Words that name nothing else yet."""

    def wrong(self, value: Any) -> str | None:
        """As `Limit`."""
        if value in (AUTO, BASE):
            return f" is what a server calls the {'gate' if value == AUTO else 'base'}: choose another"
        return super().wrong(value)


@dataclass(frozen=True)
class Fresh(Unreserved):
    """A new name that can be typed again wherever it is asked for, `RUN:NAME` and addresses of a server among them."""

    def wrong(self, value: Any) -> str | None:
        """As `Limit`."""
        if (said := super().wrong(value)) is not None:
            return said
        if value != value.strip():
            return " begins or ends with a blank: leave that out"
        if bad := next((each for each in value if each in ":/" or not each.isprintable()), None):
            return f" holds {bad!r}, by which names could not be told from what stands around them: leave it out"
        return f" has {len(value)} characters: choose {LONGEST_NAME} at most" if len(value) > LONGEST_NAME else None


@dataclass(frozen=True)
class Several:
    """One at least, each once."""

    what: str

    def wrong(self, value: Any) -> str | None:
        """As `Limit`."""
        if not value:
            return f" is given nothing: name at least one, such as {self.what}"
        twice = [each for number, each in enumerate(value) if each in value[:number]]
        return f": {twice[0]} is named twice, name each once" if twice else None


Count = Annotated[int, Number("1 or more", 1, LARGEST)]
Whole = Annotated[int, Number("0 or more", 0, LARGEST)]
Seed = Annotated[int, Number("0 to 4294967295", 0, 2**32 - 1)]
Port = Annotated[int, Number("1 to 65535", 1, 65535)]
Rate = Annotated[float, Number("a finite rate of 0 or more", 0)]
Positive = Annotated[float, Number("a finite number above 0", 0, above=True)]
NotNegative = Annotated[float, Number("a finite number of 0 or more", 0)]
Share = Annotated[float, Number("a share between 0 and 1, such as 0.1", 0, 1, above=True, below=True)]


def listed(words: Any) -> str:
    """`a, b or c`."""
    texts = [str(word) for word in words]
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def typed(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


class Options:
    """What a config of a command is asked beside the limits of its fields.

    Attributes:
        from_file: What a file of options gave, which may serve several methods: there an option may do nothing.
        common: Options that may stand in the same command for several methods, though some have no use for them.
    """

    from_file: ClassVar[Mapping[str, Any]] = {}
    common: ClassVar[tuple[str, ...]] = ()

    def problems(self) -> Iterator[str]:
        """What is wrong with several options together; asked once each is right by itself."""
        yield from ()

    def idle(self) -> Iterator[str]:
        """Which options were given and do nothing; asked where a user gives them, not of settings that code tries."""
        yield from ()

    def taken(self) -> RunError | None:
        """Why nothing can be written where it is to be written, or gone on with there; None: it can."""
        return None


def unused(config: Any, names: Iterable[str], acts: bool, why: str) -> Iterator[str]:
    """Those of some options that are not as they are by default, and `why` that does nothing; none where it `acts`."""
    by_default = {each.name: each.default for each in fields(config)}
    for name in () if acts else names:
        value = getattr(config, name)
        spared = name in config.common or (name in config.from_file and config.from_file[name] == value)
        layer = name.endswith("_layer")  # counted from 0, which is one; a count or a rate of 0 is none, as comes of it
        nothing = type(value) in (int, float) and value == 0 and not layer
        if value != by_default[name] and not spared and not nothing:
            if isinstance(by_default[name], bool):
                yield f"{typed(name if value else f'no_{name}')} {why}"
            else:
                yield f"{typed(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value} {why}"


def check(config: Options, *, given: bool = False) -> None:
    """Whether every option of a config is within its limits, and whether what it writes has a place.

    Args:
        config: Options of a command.
        given: Whether a user gave them, so that none may do nothing.

    Raises:
        ConfigError: some are not; one line for each, with its value, its limit and the way out (a `WrongType` where
            all are of another type).
        RunError: the place alone is wrong: taken already, or not there where it is to be gone on with.
    """
    found = list(dict.fromkeys(_each(config)))
    mistyped = [line for line in found if line.endswith(GIVE)]
    found = found or list(dict.fromkeys([*config.problems(), *(_idle(config) if given else ())]))
    place = None if any(line.startswith(("--out ", "--out:")) for line in found) else config.taken()
    if place is not None:
        if not found:
            raise place
        found = [*found, str(place)]
    if found:
        raise (WrongType if found == mistyped else ConfigError)("\n".join(found))


def _idle(config: Options) -> list[str]:
    """Which options that were typed do nothing; of common ones and those out of a file it is said, and no more.

    So it is of all where a run is resumed, for they must be those that it was begun with.
    """
    told, bare = [] if getattr(config, "resume", False) else _one_each(config.idle()), copy.copy(config)
    bare.from_file, bare.common = {}, ()  # type: ignore[misc]
    for line in _one_each(bare.idle()):
        if line not in told:
            logger.warning("passed over: %s", line)
    return told


def _one_each(lines: Iterable[str]) -> list[str]:
    """The first line of each option: where it does nothing for two reasons, the way out of the second is none."""
    return list({line.split()[0]: line for line in reversed([*lines])}.values())[::-1]


def check_given(kind: type, **values: Any) -> None:
    """Whether arguments of a function in Python are within the limits of the options of those names.

    Raises:
        WrongType, ConfigError: one is not.
    """
    hints = hints_of(kind)
    for name, value in values.items():
        for item, wrong in _wrong(hints[name], value):
            raise (WrongType if wrong in GIVE else ConfigError)(f"{name}={item!r}{wrong}")


def check_named(config: Options) -> None:
    """`check` for options that a user gave in Python.

    Raises:
        ConfigError: as `check`, with the options as Python writes them.
    """
    with named_in_python(config):
        check(config, given=True)


@contextmanager
def named_in_python(config: Options) -> Iterator[None]:
    """Errors raised inside the block name the options of `config` as Python writes them."""
    try:
        yield
    except SmartmopsError as error:
        error.args = (in_python(str(error), config), *error.args[1:])
        raise


def in_python(message: str, config: Options) -> str:
    """A message with the options of `config` as Python writes them: `--batch-size 0: ...` is `batch_size=0: ...`."""
    names = hints_of(config.__class__)  # type: ignore[arg-type]

    def written(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name + found[0][2 + len(name) :].replace(" ", "=", 1) if name in names else found[0]

    return FLAG.sub(written, GIVEN.sub(written, message))


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a config's fields, limits included."""
    assert is_dataclass(kind)
    found = get_type_hints(kind, include_extras=True)
    return {each.name: found[each.name] for each in fields(kind)}


def _each(config: Any) -> Iterator[str]:
    for name, hint in hints_of(config.__class__).items():
        value = getattr(config, name)
        for item, wrong in _wrong(hint, value):
            said = " ".join(map(str, item)) if isinstance(item, tuple) else str(item)
            said = said if said.isprintable() else repr(said)  # a fault is told in one line
            yield " ".join(filter(None, (_shown(name, hint), said))) + wrong


def _shown(name: str, hint: Any) -> str:
    """As it is typed; what has no name on the command line, by its place there."""
    positional = get_origin(hint) is Annotated and tyro.conf.Positional in hint.__metadata__
    return name.upper() if positional else typed(name)


def _wrong(hint: Any, value: Any) -> Iterator[tuple[Any, str]]:
    """What of a value is wrong, and why."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = list(_wrong(inner[0], value))
        limits = [each for each in hint.__metadata__ if isinstance(each, Limit)]
        yield from found or ((value, said) for limit in limits if (said := limit.wrong(value)) is not None)
    elif origin in (Union, types.UnionType):
        if value is not None or type(None) not in inner:
            kinds = [each for each in inner if each is not type(None)]
            kinds = [each for each in kinds if _of_several(each) == isinstance(value, list | tuple)] or kinds
            answers = [list(_wrong(each, value)) for each in kinds]
            yield from [] if [] in answers else answers[0]
    elif origin is Literal:
        if value not in inner:
            yield value, f": choose {listed(inner)}"
    elif origin is tuple and (isinstance(value, str) or not isinstance(value, Iterable)):
        yield value, ": give a list"
    elif origin is tuple:
        for each in value:
            yield from _wrong(inner[0], each)
    elif origin in (dict, Mapping):
        for key, each in value.items():
            yield from _wrong(inner[0], key)
            yield from ((f"{key} {item}", said) for item, said in _wrong(inner[1], each))
    elif isinstance(hint, type) and not _is(hint, value):
        yield value, f": give {NAMES.get(hint, hint.__name__)}"


def _of_several(hint: Any) -> bool:
    """Whether a type is a list of values."""
    return get_origin(get_args(hint)[0] if get_origin(hint) is Annotated else hint) is tuple


NAMES = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "True or False"}
GIVE = tuple(f": give {each}" for each in (*NAMES.values(), "a list"))  # how a line ends that is of a type


def _is(kind: type, value: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, (int,) if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)
