"""An adapter's folder, put on a base. Whatever is wrong with it is said in one line that names the file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model

import smartmops.tuner  # noqa: F401  enters our method into PEFT

from smartmops.checks.errors import AdapterError
from .folder import check_adapter


def load_adapter(base: Any, folder: Path) -> Any:
    """The base with the adapter in a folder, in eval mode.

    Raises:
        AdapterNotFound: it has no adapter.
        AdapterError: its config or its tensors are damaged, or belong to another base.
    """
    check_adapter(folder)
    check_config(folder / "adapter_config.json")
    try:
        with peft_as_it_is():
            return PeftModel.from_pretrained(base, folder).eval()
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise AdapterError(f"{folder} does not fit this base ({_line(error)}): load the base that it was trained "
                           "on, or train it again") from error  # fmt: skip


@contextmanager
def peft_as_it_is() -> Iterator[None]:
    """Without the warning of transformers that PEFT asks a base by an old name whether it keeps its activations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def adapter_on(base: Any, config: PeftConfig) -> Any:
    """A base under a fresh adapter of this config."""
    with peft_as_it_is():
        return get_peft_model(base, config)


def check_config(file: Path) -> None:
    """Whether an adapter's config can be made, and asks for the sizes that the tensors beside it have.

    Raises:
        AdapterError: neither is so.
    """
    found = json.loads(file.read_bytes())  # an object, as check_adapter saw
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[found["peft_type"]]
    except (KeyError, TypeError):
        raise AdapterError(f"{file} names no method of PEFT (peft_type={found.get('peft_type')!r:.80}): restore it, or "
                           "train the adapter again") from None  # fmt: skip
    try:
        kind.from_pretrained(str(file.parent))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise AdapterError(f"{file} cannot be read ({_line(error)}): restore it, or train the adapter again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
