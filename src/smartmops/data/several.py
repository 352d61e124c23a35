"""DATA as it is named: one name or several, what each is called, and what the names of a folder's files say.

Reads names, never what stands in a file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smartmops.checks.errors import DataError
from smartmops.rows.example import Example
from smartmops.rows.faults import some

from .files import SUFFIXES, ending, under

log = logging.getLogger(__name__)

Names = str | Path | Sequence[str | Path]
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # files about data, without any
PROSE = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|citation|changelog|contributing)\b|.*\.(md|rst)$", re.I
)  # files that are read by people
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing)?)|test(?:ing)?|eval(?:uation)?|val(?:id(?:ation)?)?|dev)(?![a-z])", re.I
)
SHARD = re.compile(
    r"[-_.]?\d+(?:[-_.]of[-_.]\d+(?:[-_.][0-9a-f]{8,})?)?$", re.I
)  # as `datasets` numbers them, or shorter


def names_of(data: Names) -> tuple[str, ...]:
    """Each name by itself.

    Raises:
        DataError: it is no name, and no list of names.
    """
    if not isinstance(data, str | Path | Iterable):
        raise DataError(f"data={data!r} names no data: give office, a file, a folder or a hub id, or a list of them")
    names = (data,) if isinstance(data, str | Path) else tuple(data)
    if wrong := [each for each in names if not isinstance(each, str | Path)]:
        raise DataError(f"data={wrong[0]!r} names no data: give office, a file, a folder or a hub id")
    return tuple(map(str, names))


def held(data: Names) -> str | tuple[str, ...]:
    """One name, or several as a config holds them."""
    return str(data) if isinstance(data, str | Path) else names_of(data)


def as_typed(data: Names) -> str:
    """The names as they are typed."""
    return " ".join(names_of(data))


def labels(names: Sequence[str]) -> list[str]:
    """A short word for each: a file's or folder's own name; as it was given where two would be called alike."""
    short = [_short(name) for name in names]
    return [own if short.count(own) == 1 else name for own, name in zip(short, names, strict=True)]


def labelled(examples: Iterable[Example], label: str) -> Iterator[Example]:
    """Examples with the label for a source where they have none, and for a task where they have none."""
    for example in examples:
        yield replace(example, category=example.category or label, source=example.source or label)


def _short(name: str) -> str:
    path = Path(name)
    return (path.stem if ending(path) in SUFFIXES else path.name) or name


@dataclass(frozen=True)
class Named:
    """What the name of a file in a folder says."""

    file: Path
    split: str  # train, held, or nothing
    rest: str  # its own name without the split's and a shard's number
    place: tuple[str, ...]  # the folders between, but for those that are called as a split
    plain: bool  # whether the file or a folder is called as the split and no more

    @classmethod
    def of(cls, file: Path, folder: Path) -> Named:
        """By its own name and those of the folders between."""
        *around, own = file.relative_to(folder).with_suffix("").parts
        bare = SHARD.sub("", own)
        found = [each for part in (*around, bare) if (each := SPLIT.search(part))]
        split = "train" if any(each["train"] for each in found) else "held" if found else ""
        inside = any(SPLIT.fullmatch(part) for part in around)
        rest = bare if inside else SPLIT.sub("", bare, 1).strip("-_. ")
        place = tuple(part for part in around if not SPLIT.fullmatch(part))
        return cls(file, split, rest, place, inside or SPLIT.fullmatch(bare) is not None)


def files_of(folder: Path, every_split: bool) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The files of a folder that are read, each with the task that its name tells (or none), and those that are not.

    Names tell splits where each file's does, where one is called as the training split and no more, or where a file
    for training and one held out are called alike beside it. Then the training split alone is read, unless
    `every_split` is, and what else is in a name is its task, if there are several. Otherwise a file is a task.

    Files of several folders that are called alike are tasks of their own, named for their folders too.

    Raises:
        DataError: there is no file of a known form, or a compressed one; or two tasks cannot be told apart by name.
    """
    files = [file for file in under(folder) if file.name not in ABOUT]
    packed = [file for file in files if file.suffix.lower() in PACKED and ending(file.with_suffix("")) in SUFFIXES]
    if packed:
        raise DataError(f"data={str(folder)!r} holds {packed[0].relative_to(folder)}, which is compressed: unpack it, "
                        "or take it out of the folder")  # fmt: skip
    named = [Named.of(file, folder) for file in files if ending(file) in SUFFIXES]
    if not named:
        raise DataError(f"data={str(folder)!r} holds no file ending in {', '.join(SUFFIXES)}: choose another folder")
    train = [each for each in named if each.split == "train"]
    alike = {each.rest for each in train} & {each.rest for each in named if each.split == "held"}
    told = all(each.split for each in named) or any(each.plain for each in train) or bool(alike)
    if not told:
        named = [replace(each, rest=each.file.stem, place=each.file.relative_to(folder).parts[:-1]) for each in named]
        return list(_tasks(folder, named)), []
    chosen = train if train and not every_split else named
    several = len({(each.rest, each.place) for each in chosen}) > 1
    left = [each.file for each in named if each not in chosen]
    return list(_tasks(folder, chosen)) if several else [(each.file, "") for each in chosen], left


def _tasks(folder: Path, named: Sequence[Named]) -> Iterator[tuple[Path, str]]:
    """Files, each with the task that its name tells, and its folders' names where another one's is called alike."""
    first, held = dict[str, Named](), dict[str, Named]()
    apart = [(each, first.setdefault(each.rest, each)) for each in named]
    alike = {each.rest: (other.file, each.file) for each, other in apart if each.place != other.place}
    for one, another in alike.values():
        log.info("%s: %s and %s are called alike, so where rows name no task, these are named for their folders too",
                 folder, one.relative_to(folder), another.relative_to(folder))  # fmt: skip
    for each in named:
        task = "-".join((*(each.place if each.rest in alike else ()), *filter(None, [each.rest]))) or folder.name
        other = held.setdefault(task, each)
        if (other.place, other.rest) != (each.place, each.rest) and {other.rest, each.rest} & alike.keys():
            both = f"{other.file.relative_to(folder)} and {each.file.relative_to(folder)}"
            raise DataError(f"data={str(folder)!r}: {both} would both be task {task!r}: rename one")
        yield each.file, task


def tell_unread(folder: Path, files: Iterable[Path]) -> None:
    """Say that these `files` of a folder are not read, but for those that tell of data, to people or to programs."""
    left = [file.relative_to(folder).as_posix() for file in files
            if file.name not in ABOUT and not PROSE.match(file.name)]  # fmt: skip
    if left:
        log.warning("%s: %d files of other forms are not read (%s)", folder, len(left), some(left))


def others(folder: Path) -> Iterator[Path]:
    """Files of a folder that have no form that is read."""
    return (file for file in under(folder) if ending(file) not in SUFFIXES)
