"""smartmops: one frozen language model, many tasks, many data sources. Importing it enters the method into PEFT.

It does so once PEFT is imported, at the latest with the first name that is taken from here: PEFT and all it brings take
seconds, and a command whose options are wrong says so without them.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smartmops.checks.errors import (
        AdapterError,
        BaseModelError,
        ConfigError,
        DataError,
        FederationError,
        MissingExtra,
        ResourceError,
        RunError,
        SmartmopsError,
    )
    from smartmops.flow.prepare import Prepared, prepare
    from smartmops.options.finished.handover import ExportConfig, PushConfig
    from smartmops.options.finished.reading import DataConfig, EvaluateConfig, InspectConfig
    from smartmops.rows.example import Example

    from .analysis.finished import LoadedRun
    from .base import load_base
    from .data.tasks import read
    from .door import (
        add_expert,
        advise,
        calibrate,
        compare,
        compress,
        drop_expert,
        evaluate,
        export,
        federate,
        freeze_expert,
        inspect,
        list_experts,
        load_run,
        merge_experts,
        preview,
        push,
        rename_expert,
        train,
    )
    from .options.compression import CompressConfig
    from .options.federation import FederateConfig
    from .options.training import CompareConfig, TrainConfig
    from .tokens import render
    from .tuner import MoPsConfig, MoPsModel

# peft imports the first two where they are installed, and each then reports the optional kernels it has not got; torch
# the third, to say that torchao registers what newer versions of torch know by themselves.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
# Each public name and the module it is imported from when it is first asked for.
_FROM = {
    "MoPsConfig": "tuner", "MoPsModel": "tuner", "render": "tokens", "Example": "rows", "read": "data.tasks",
    "load_base": "base", "prepare": "flow.prepare", "Prepared": "flow.prepare",
    "TrainConfig": "options.training", "CompareConfig": "options.training", "CompressConfig": "options.compression",
    "FederateConfig": "options.federation", "LoadedRun": "analysis.finished",
    **dict.fromkeys(("SmartmopsError", "ConfigError", "DataError", "BaseModelError", "AdapterError", "RunError",
                     "FederationError", "MissingExtra", "ResourceError"), "checks.errors"),
    "ExportConfig": "options.finished.handover", "PushConfig": "options.finished.handover",
    **dict.fromkeys(("DataConfig", "EvaluateConfig", "InspectConfig"), "options.finished.reading"),
    **dict.fromkeys(("train", "compare", "federate", "compress", "evaluate", "export", "push", "inspect", "load_run",
                     "preview", "list_experts", "add_expert", "drop_expert", "merge_experts", "rename_expert",
                     "freeze_expert", "calibrate", "advise"), "door"),
}  # fmt: skip
__all__ = [
    "AdapterError",
    "BaseModelError",
    "CompareConfig",
    "CompressConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "EvaluateConfig",
    "Example",
    "ExportConfig",
    "FederateConfig",
    "FederationError",
    "InspectConfig",
    "LoadedRun",
    "MissingExtra",
    "MoPsConfig",
    "MoPsModel",
    "Prepared",
    "PushConfig",
    "ResourceError",
    "RunError",
    "SmartmopsError",
    "TrainConfig",
    "__version__",
    "add_expert",
    "advise",
    "calibrate",
    "compare",
    "compress",
    "drop_expert",
    "evaluate",
    "export",
    "federate",
    "freeze_expert",
    "inspect",
    "list_experts",
    "load_base",
    "load_run",
    "merge_experts",
    "prepare",
    "preview",
    "push",
    "read",
    "rename_expert",
    "render",
    "train",
]


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first asked for."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_FROM[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterPeft(MetaPathFinder):
    """Enters the method into PEFT as soon as PEFT has been imported, whoever imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def and_enter(module: Any) -> None:
            load(module)
            from . import tuner  # noqa: F401

        spec.loader.exec_module = and_enter  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    from . import tuner  # noqa: F401
else:
    sys.meta_path.insert(0, _AfterPeft())
