"""The key of what the frozen half computes: a digest of all that decides its numbers, and of nothing else."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smartmops.backbone import halves
from smartmops.base import local
from smartmops.checks.errors import AdapterError, BaseModelError, SmartmopsError
from smartmops.rows.example import of_examples
from smartmops.runs.folder import TEST_SPLIT
from smartmops.tokens.batches import Encoded
from smartmops.tokens.template import Template
from smartmops.tuner.engine import Engine
from smartmops.tuner.layer import MoPsLayer
from smartmops.tuner.model import MoPsModel

FORMAT = 2  # of how the numbers come about; a new one makes every older cache stale
VOLATILE = {  # settings of a model that no hidden state depends on, or that its weights speak for
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "return_dict",
    "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
}  # fmt: skip
SAMPLED, NUMBERS = "base, sampled", 64  # what `sampled` is kept as, and numbers of each weight
TOKENIZER, EMBEDDER = "tokenizer", "embedder"  # what `of_tokenizer` and `Embedder.told` are kept as
SPOKEN = ("The Quick brown fox's 12,345.67 naïve cafés; ¿qué?", "  two blanks,\ta tab\nand a line ",
          "İΑΒγ 漢字 ﬁ 🙂 e\u0301")  # fmt: skip
FILES, ROWS = "base, sampled from its files", 8  # what of quantised weights is kept as, and rows of each


def acting(model: Any) -> tuple[MoPsLayer, Any]:
    """The wrapper of the adapter that acts, and its config.

    Raises:
        AdapterError: the model has no MoPs adapter, or none is switched on.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, MoPsModel):
        raise AdapterError(
            f"{type(model).__name__} has no MoPs adapter: adapt it with get_peft_model(model, MoPsConfig())"
        )
    wrapper = Engine.on(tuner.model).active()
    if wrapper is None:
        raise AdapterError("no MoPs adapter is switched on, so no layer is the injection layer: call set_adapter")
    return wrapper, wrapper.configs[wrapper.current]


def fingerprint(model: Any, rows: Sequence[Encoded], dtype: torch.dtype) -> str:
    """What decides the cached numbers, as 32 hexadecimal digits.

    Content, not names: every weight below the injection layer (quantised ones included), the base's settings, the
    recovery prompts, every token, label and gate embedding (so tokenizer, template, truncation and data), the stored
    dtype and the libraries' versions. A changed one is a new key; prompts, gate and the upper half are not in it.
    Reads every weight below once: about 1 GB/s for each core; milliseconds for a small model.
    """
    wrapper, config = acting(model)
    engine = Engine.on(model.base_model.model)
    below = halves.lower(engine.backbone, wrapper.index)
    weights = _weights(below)
    if config.num_recovery_prompts:
        weights["recovery prompts"] = wrapper.mops_recovery[wrapper.current]
    device = engine.backbone.get_input_embeddings().weight.device.type
    attention = [part.mops_native.function for part in engine.layers[0].mops_attention]
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = {
        "format": FORMAT, "torch": torch.__version__, "transformers": transformers.__version__,
        "backbone": type(engine.backbone).__name__, "config": _stable(engine.backbone.config.to_dict()),
        "attention": sorted(f"{inner.__module__}.{inner.__qualname__}" for inner in attention),
        "device": device, "autocast": str(autocast), "adapters below": _adapters_below(below),
        "injection_layer": wrapper.index, "recovery": config.num_recovery_prompts, "dtype": str(dtype),
        "gate": what_the_gate_reads(config),
    }  # fmt: skip
    total = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    with ThreadPoolExecutor() as pool:
        for name, found in zip(weights, pool.map(digest, weights.values()), strict=True):
            total.update(name.encode() + b"\0" + found)
    add_rows(total, rows, embedded=config.embedding_size is not None)
    return total.hexdigest()


def what_the_gate_reads(config: Any) -> tuple[Any, ...]:
    """What `pooled` depends on beside base and rows, the layer first."""
    return (config.gate_layer, config.gate_input, config.gate_reads, str(config.gate_frame), str(config.answer_header),
            config.embedding_size)  # fmt: skip


def add_rows(total: Any, rows: Sequence[Encoded], embedded: bool) -> None:
    """Add every token, label and mask of the rows to a digest, and what an embedder made of them."""
    for row in rows:
        total.update(len(row.input_ids).to_bytes(8, "little") + len(row.labels).to_bytes(8, "little"))
        total.update(array("q", row.input_ids).tobytes() + array("q", row.labels).tobytes())
        total.update(row.header.to_bytes(8, "little"))
        if row.gate_mask is not None:
            total.update(bytes(row.gate_mask))
        if embedded and row.gate_embedding is not None:
            total.update(digest(row.gate_embedding))


def of_base(base: Any, tokenizer: Any, template: Template) -> str:
    """What tells one frozen base with its tokenizer and template from any other, as 32 hexadecimal digits.

    Take it unadapted. Content, not names, and no versions of libraries. Reads every weight once: about 1 GB/s for each
    core.
    """
    total = blake2b(digest_size=16)
    for part in _of_parts(base, tokenizer, template).values():
        total.update(part.encode())
    return total.hexdigest()


def inputs_of(task: Any) -> dict[str, str]:
    """What tells the unadapted base, the template and the data of a `Task` from any others, each as 32 digits.

    Which examples fit depends on the template, so data say something only where the template is the same.
    """
    data = of_examples(task.train_examples, task.test_examples, [row.input_ids for row in task.validation])
    found = _of_parts(task.base, task.tokenizer, task.template) | {"data set": data} | of_weights(task.base)
    found |= {TOKENIZER: of_tokenizer(task.tokenizer)} | ({EMBEDDER: task.embedder.told} if task.embedder else {})
    return found | ({TEST_SPLIT: task.test_split} if task.test_split else {})


def sampled(base: Any) -> str:
    """What tells the weights of a base from others by a few numbers of each, in any dtype and wherever they lie.

    For every loading, where `of_base` would take seconds. Quantised weights and their scales are left out, for in
    memory they differ from processor to processor: `of_weights` takes them from their files.
    """
    found = []
    for value in (parameter.data for parameter in base.parameters()):
        if type(value) is Tensor and value.is_floating_point() and not value.is_meta and value.numel():
            some = value.detach().reshape(-1)[:: max(1, value.numel() // NUMBERS)][:NUMBERS]
            bits = some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
            found.append(blake2b(str(list(value.shape)).encode() + bits, digest_size=16).digest())
    return blake2b(b"".join(sorted(found)), digest_size=16).hexdigest()


def of_weights(base: Any) -> dict[str, str]:
    """What tells the weights of a base from others, by name: `sampled`, and of a quantised base its files too."""
    return {SAMPLED: sampled(base)} | _of_files(base)


def of_tokenizer(tokenizer: Any) -> str:
    """What tells a tokenizer from others: its vocabulary, and what it makes of texts in which rules of all kinds act.

    Its settings would tell more, but another release of its library writes the same ones otherwise.
    """
    made = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SPOKEN]
    said = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, made])
    return blake2b(said.encode(), digest_size=16).hexdigest()


def _of_files(base: Any) -> dict[str, str]:
    """A few rows of each weight as its file has it; nothing of a base that is not quantised, or has no files here."""
    if getattr(base.config, "quantization_config", None) is None or not base.name_or_path:
        return {}
    found = []
    try:
        for file in _weight_files(Path(local(base.name_or_path))):
            opened: Any
            with safe_open(file, "pt") as opened:
                found += [name.encode() + b"\0" + digest(_rows(opened, name)) for name in opened.keys()]  # noqa: SIM118
    except (OSError, ValueError, KeyError, SmartmopsError, SafetensorError):  # moved since it was loaded
        return {}
    return {FILES: blake2b(b"".join(sorted(found)), digest_size=16).hexdigest()} if found else {}


def _weight_files(folder: Path) -> list[Path]:
    """That a base is loaded from; others beside them, such as an adapter, are none of it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [file for file in [folder / "model.safetensors"] if file.is_file()]
    return [folder / name for name in sorted({*json.loads(index.read_bytes())["weight_map"].values()})]


def _rows(opened: Any, name: str) -> Tensor:
    """Eight rows of a weight from its first to its last; a small one whole."""
    part = opened.get_slice(name)
    shape = part.get_shape()
    if len(shape) < 2 or math.prod(shape) <= ROWS * NUMBERS:
        whole: Tensor = opened.get_tensor(name)
        return whole
    some = (part[at : at + 1].reshape(-1).view(torch.uint8) for at in range(0, shape[0], max(1, shape[0] // ROWS)))
    return torch.cat([*some])


def _of_parts(base: Any, tokenizer: Any, template: Template) -> dict[str, str]:
    settings = _stable(base.config.to_dict())
    weights = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    found = dict(sorted(base.state_dict().items()))
    with ThreadPoolExecutor() as pool:
        for name, each in zip(found, pool.map(digest, found.values()), strict=True):
            weights.update(name.encode() + b"\0" + each)
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map], default=str)
    words = blake2b(vocabulary.encode() + (template.source or "").encode(), digest_size=16)
    return {"base": weights.hexdigest(), "tokenizer or template": words.hexdigest()}


def _weights(below: nn.Module) -> dict[str, Tensor]:
    """By name, other injection layers' parameters left out. Buffers too: not all are in a state dict."""
    found = {**dict(below.named_buffers()), **below.state_dict()}
    return {
        name.replace("base_layer.", ""): value for name, value in sorted(found.items()) if MoPsModel.prefix not in name
    }


def _adapters_below(below: nn.Module) -> list[str]:
    """Which adapters of other methods act, and how strongly: their weights alone do not say."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [
        f"{name} {type(module).__name__} {[getattr(module, each, None) for each in names]}"
        for name, module in below.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MoPsLayer)
    ]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _stable(each) for name, each in value.items() if name not in VOLATILE}
    return value


def digest(tensor: Any) -> bytes:
    """Of dtype, shape and bytes; of what a quantised tensor is made of."""
    if not isinstance(tensor, Tensor):
        return blake2b(repr(tensor).encode()).digest()
    if tensor.is_meta:
        raise BaseModelError(
            "a weight below the injection layer is not loaded (offloaded, or on the meta device), so "
            "no cache on disk can be tied to it: load the model whole, or cache in memory"
        )
    found = blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        found.update(repr(context).encode())
        for name in names:
            found.update(digest(getattr(tensor, name)))
    else:
        found.update(tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy().data)
    return found.digest()
