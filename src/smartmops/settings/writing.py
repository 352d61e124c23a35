"""Options into a YAML file, nested by group, from which the same run starts again; and what it was run with."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from smartmops.options.bench import BenchConfig
from smartmops.options.compression import CompressConfig
from smartmops.options.federation import FederateConfig
from smartmops.options.reproduce import ReproduceConfig
from smartmops.options.training import CompareConfig, TrainConfig

from .described import described

KINDS: dict[str, type] = {
    "train": TrainConfig, "compare": CompareConfig, "federate": FederateConfig, "compress": CompressConfig,
    "reproduce": ReproduceConfig, "bench": BenchConfig,
}  # fmt: skip
NAME = "config.yaml"  # in a run folder
PACKAGES = ("torch", "transformers", "peft", "smartmops")


def resolved(command: str, arguments: Mapping[str, Any]) -> str:
    """The file's text: every option of a command with its value, defaults included."""
    found: dict[str, Any] = {}
    for each in described(KINDS[command]):
        if each.name != "resume" and each.name in arguments:
            place = found.setdefault(each.group, {}) if each.group else found
            place[each.name] = _plain(arguments[each.name])
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=100)
    return f"# smartmops {command} --config {NAME} --out ANOTHER_FOLDER starts this run again.\n{text}"


def _plain(value: Any) -> Any:
    """As YAML has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers; one that is not installed reads `absent`."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in packages}


def version_of(package: str, absent: str = "absent") -> str:
    """Of a package, or `absent` where it is not installed, as our own is not where it runs from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return absent
