"""A MODEL argument and what is behind it: a built-in name, a folder, a GGUF, or a model of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache as remembered
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError

from smartmops.checks.errors import (
    BaseModelError,
    BaseModelNotFound,
    BaseModelUnreachable,
    MissingExtra,
    SmartmopsError,
)
from smartmops.checks.folders import expanded
from smartmops.checks.resources import lacking

from .builtin import BUILT_IN

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".zip", ".whl", ".onnx", ".jsonl", ".ndjson", ".csv",
         ".tsv", ".parquet", ".txt")  # that no hub id ends with  # fmt: skip
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PATIENCE = 10  # seconds for the hub's answer
CHOICES = "give a model folder, a hub id, a *.gguf file, smollm2 or tiny"


def local(model: str) -> str:
    """The folder behind a MODEL argument, or its hub id where the hub has it and this machine does not.

    What is built in is fetched, and a GGUF converted, the first time. A hub id is looked for in the hub's local cache,
    and else asked of the hub, once.

    Raises:
        BaseModelNotFound: there is nothing of that name.
        BaseModelNotFound: it is a file or folder that holds no model, or a GGUF that cannot be read.
        BaseModelNotFound: the hub cannot be reached, or `smollm2` can neither be found nor fetched.
    """
    if model in BUILT_IN:
        return str(BUILT_IN[model]())
    path = expanded(model)
    if path.exists():
        return str(_held(path))
    if model.startswith((".", "/", "~")) or path.suffix in FILES or not HUB_ID.fullmatch(model):
        raise BaseModelNotFound(f"MODEL {model} does not exist: {CHOICES}")
    return _of_hub(model)


@contextmanager
def readable(model: str, what: str = "MODEL") -> Iterator[None]:
    """Raise what transformers has against the files of a model as an error that a user can mend.

    Raises:
        BaseModelError: the files are damaged, incomplete, or of a kind that is not supported.
        MissingExtra: a package is not installed that they need.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"{what} {model} needs a package that is not installed: {_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SmartmopsError) or lacking(None, error) is not None:
            raise
        raise BaseModelError(f"{what} {model} cannot be loaded ({_line(error)}): check its files, or download or save "
                             "it again") from error  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def is_of_hub(model: str) -> bool:
    """Whether a MODEL argument names neither what is built in nor a path that exists."""
    return model not in BUILT_IN and not expanded(model).exists()


def shown_name(name: str, paths: Collection[str] = ()) -> str:
    """A name without where it lies, where it is a path: one that is there, is spelt as one, or is among `paths`.

    A folder that is gone may be spelt as an id of the hub is, so that a run keeps which of its names were paths.
    """
    path = expanded(name)
    spelt = name.startswith(("/", ".", "~")) or len(path.parts) > 2 or path.suffix.lower() in FILES
    return Path(os.path.abspath(path)).name if spelt or name in paths or path.exists() else name


def _held(path: Path) -> Path:
    """The plain model folder of a path: itself, or what its GGUF was converted to."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise BaseModelError(
                f"MODEL {path} is a file, but only a *.gguf file is a model by itself: give its folder"
            )
        return _converted(path)
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if (path / "config.json").is_file() and (not found or _weights(path)):
        return path
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4]) + (", ..." if len(found) > 4 else "")
        raise BaseModelError(f"MODEL {path} holds {len(found)} GGUF files ({names}), but one is a model: name the file")
    if found:
        return _converted(found[0])
    adapter = (path / "adapter_config.json").is_file()
    raise BaseModelError(
        f"MODEL {path} {'is an adapter, not a model: give the base it was trained on' if adapter else ''}"
        f"{'' if adapter else 'has no config.json and no *.gguf file, so it is no model: ' + CHOICES}"
    )


def is_converted(model: str) -> bool:
    """Whether a MODEL argument has to be converted, and perhaps fetched, before there is a folder to look at."""
    if model in BUILT_IN:
        return model != "tiny"
    path = expanded(model)
    if path.is_dir():
        return not (path / "config.json").is_file() and any(file.suffix.lower() == ".gguf" for file in path.iterdir())
    return path.is_file() and path.suffix.lower() == ".gguf"


def _converted(file: Path) -> Path:
    from smartmops.gguf import conversion as gguf  # and with it torch

    return gguf.folder_of(file)


def _weights(path: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in path.iterdir())


@remembered
def _of_hub(model: str) -> str:
    config = try_to_load_from_cache(model, "config.json")
    if isinstance(config, str) and any(isinstance(try_to_load_from_cache(model, name), str) for name in WEIGHTS):
        return str(Path(config).parent)
    why = f"MODEL {model} is no folder here, not built in and not in the hub's cache"
    if constants.is_offline_mode():
        raise BaseModelNotFound(f"{why}, and HF_HUB_OFFLINE forbids to ask the hub: unset it, or {CHOICES}")
    try:
        found = HfApi().model_info(model, timeout=PATIENCE)
    except GatedRepoError as error:
        raise BaseModelNotFound(f"{why}; the hub gives it only to users it knows: run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise BaseModelNotFound(f"{why}, and the hub has none of that name for you: {CHOICES}") from error
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise _unreached(why, error) from error
    except Exception as error:  # of the HTTP client, whose errors share no base with Python's own
        raise _unreached(why, error) from error
    names = {file.rfilename for file in found.siblings or []}
    if "config.json" not in names:
        kinds = "only GGUF files: download one with `hf download` and give its path" if any(
            name.endswith(".gguf") for name in names) else f"no config.json: {CHOICES}"  # fmt: skip
        raise BaseModelNotFound(f"MODEL {model} has {kinds}")
    return model


def _unreached(why: str, error: Exception) -> BaseModelUnreachable:
    told = " ".join(str(error).split())[:120] or type(error).__name__
    return BaseModelUnreachable(f"{why}, and the hub cannot be asked ({told}): go online once, or {CHOICES}")
