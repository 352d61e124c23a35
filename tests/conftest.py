"""What every test starts from: no network, a cache of its own, threads, a seed, and shapes checked at run time."""

# ruff: noqa: E402 (the environment and the import hook must be ready before the libraries are imported)
from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

_cache = tempfile.mkdtemp(prefix="smartmops-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ |= {"HF_HOME": _cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "RAY_memory_monitor_refresh_ms": "0"}  # else Ray ends actors when other programs fill the memory  # fmt: skip

from jaxtyping import install_import_hook

# From here on every signature of the package is a check.
install_import_hook("smartmops", "beartype.beartype")

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
# Rooms whose models are so small that a second thread only costs.
TINY = {"backbone", "attention", "experts", "adapter", "calls", "tuner", "compression", "clients", "federated", "flower",
        "deployment", "reproduce", "serving", "web"}  # fmt: skip
torch.set_num_threads(THREADS)
# Neither an example nor its making is timed: on a busy machine both take what they take.
settings.register_profile("smartmops", deadline=None, derandomize=True, max_examples=60,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.load_profile("smartmops")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


SLOW = 40  # tests of the others that one marked slow counts for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: one that starts last would leave the other worker with nothing to do."""
    length = Counter[Path]()
    for item in items:
        length[item.path] += 1 if item.get_closest_marker("slow") is None else SLOW
    items.sort(key=lambda item: -length[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need go through it, and each run of training asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1 if request.path.parent.name in TINY else THREADS)


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """What a test's `TrainingArguments(fsdp=...)` sets for the process goes with it, and reaches no launcher after it."""
    yield
    for name in [each for each in os.environ if each.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data: no folder {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; tests that need it are skipped where it can be neither found nor fetched.

    It is kept where the user's own is (`SMARTMOPS_CACHE`), so that one download serves every run of the tests.
    """
    from smartmops.base import local

    try:
        return Path(local("smollm2"))
    except OSError as error:
        pytest.skip(f"smollm2: {error}")


def _tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = ["### Instruction:\nName it.\n\n### Context:\nA text.\n\n### Response:\nThe answer of the question is this."]
    core.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in named.items() if v})


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a byte-level BPE of 300 entries that starts a text with <bos>. `pad_token=None` takes its padding away."""
    return _tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Shared by all tests, so never changed by one: `make_tokenizer` gives a fresh one."""
    return _tokenizer()


@pytest.fixture
def masked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt, expert or recovery, is hidden from every token."""
    from by_hand import HIDE
    from smartmops.attention.context import ForwardContext

    put = ForwardContext.put
    monkeypatch.setattr(ForwardContext, "put", lambda self, kv, bias: put(self, kv, torch.full_like(bias, HIDE)))
