"""Where bases used to be opened: `smartmops.base` does it now. Says so, and hands on."""

from __future__ import annotations

import warnings
from typing import Any

from smartmops import base


def __getattr__(name: str) -> Any:
    if name.startswith("__") or not hasattr(base, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"smartmops.compression.base.{name} is smartmops.base.{name}: import it from there",
                  DeprecationWarning, stacklevel=2)  # fmt: skip
    return getattr(base, name)
