"""A model folder in, a smaller model folder out, with a card that says what it cost. Nothing half-written ever loads.

Everything is prepared in `DIR.partial`, which keeps finished layers for `--resume`, and becomes DIR by one rename.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from smartmops.base import dense_weight, describe, load_base, local, quantised_as, quantised_linears
from smartmops.base.names import readable, shown_name
from smartmops.checks.errors import BaseModelError, DiskError, RunExists, SmartmopsError
from smartmops.checks.folders import beside, held_by, replacing
from smartmops.checks.limits import check
from smartmops.checks.lock import alone
from smartmops.checks.resources import translated
from smartmops.options.compression import CompressConfig, Quantisation
from smartmops.progress.bars import counted
from smartmops.settings.writing import NAME, resolved, versions

from . import calibration, layerwise
from .solvers import Pattern, Solver

LOOKED_AT = 1024  # columns of a quantised layer whose zeros are counted: all of a large one would take minutes
TEXT = "text"  # in what a compression was begun with: the content of its text, whatever its file is called
STATE = "state.json"  # what it was begun with
DOES_NOT_DECIDE = ("out", "resume", "device", "batch_size")  # arguments that leave the result as it is


def compress(config: CompressConfig) -> dict[str, Any]:
    """Prune and quantise a model and write it, loadable by `AutoModelForCausalLM`; returns what `metrics.json` holds.

    Raises:
        RunExists: `out` holds something already, or an unfinished compression and `resume` is off.
        MissingExtra: a quantising library is missing.
        DiskError: the disk has no room for the result.
        BaseModelError: options, model or text do not fit; the message names value, limit and way out.
    """
    check(config)
    partial = beside(config.out)
    with alone(partial):
        new = not held_by(partial)
        try:
            with translated(config):
                return _compress(config)
        except SmartmopsError as error:
            # No layer is done: what the user mends would be refused there. A full disk is told to go on with --resume.
            if new and held_by(partial) == [STATE] and not isinstance(error, DiskError):
                (partial / STATE).unlink()
            raise


def _compress(config: CompressConfig) -> dict[str, Any]:
    """`compress`, alone in the folder of what is half done."""
    started, quantisation = time.perf_counter(), config.quantisation
    pattern = Pattern.parse(config.sparsity, config.pattern) if config.pruned else None
    text = _read(config)
    state = _state(config, text)
    if (done := _finished(config, state)) is not None:
        return done
    model, tokenizer = _load(config)
    modules, solver = layerwise.linears(model, pattern is not None), Solver(config.block_size, config.damping)
    if pattern is not None:
        layerwise.check_fits(modules, pattern, config.method, solver)
    layerwise.check_runs_by_layer(model)
    config.check_positions(getattr(model.config, "max_position_embeddings", None))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = _rows(config, model, tokenizer, text)
    partial = _partial(config, state, size * (2 if pattern is None or quantisation is None else 3))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    metrics: dict[str, Any] = {"perplexity_before": _perplexity(model, rows.held_out, device, "perplexity before")}
    stats: layerwise.Stats = {}
    with _room(partial):
        if pattern is not None:
            with _progress("pruning", len(layerwise.decoder_layers(model))) as step:
                stats = layerwise.prune(model, rows.calibration, pattern, config.method, solver, device, partial, step)
        metrics["sparsity"] = _sparsity(stats) if stats else _zeros(modules)
        done_at = partial / ("model" if quantisation is None else "pruned")
        _save(model, tokenizer, done_at)
        if quantisation is None:
            metrics["perplexity_after"] = _perplexity(model, rows.held_out, device, "perplexity after")
        else:
            zeros = {
                name: (layerwise.matrix(each)[:, :LOOKED_AT] == 0).float().mean() for name, each in modules.items()
            }
            del model, modules
            _quantise(done_at, partial / "model", quantisation, tokenizer, zeros)
            model, _ = load_base(str(partial / "model"), "float32")
            metrics["perplexity_after"] = _perplexity(model, rows.held_out, model.device, "perplexity after")
        metrics |= _cost(partial / "model", size, started, device)
        record = {
            "model": config.model, "pattern": None if pattern is None else str(pattern), "quantisation": quantisation,
            "metrics": metrics, "calibration": _told(config, rows), "layers": stats, "begun_with": state,
            "versions": _versions(quantisation),
        }  # fmt: skip
        _publish(partial, config, record)
    return metrics


def _finished(config: CompressConfig, state: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of a finished compression begun with the same; None where there is nothing yet."""
    out = config.out
    record = out / "compression.json"
    if not record.is_file():
        return None
    found: dict[str, Any] = json.loads(record.read_text())
    _compare(found["begun_with"], state, out)
    shutil.rmtree(beside(out), ignore_errors=True)  # a kill between the last two steps leaves it
    return dict(found["metrics"])


def _load(config: CompressConfig) -> tuple[Any, Any]:
    """As stored, on the CPU: only the layer at work goes to the device."""
    if method := quantised_as(config.model):
        raise BaseModelError(
            f"MODEL {config.model} is quantised already ({method}), so its weights can be neither pruned nor quantised "
            "again: compress the model it was made from"
        )
    name = local(config.model)
    with readable(config.model):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval().requires_grad_(False)
        return model, AutoTokenizer.from_pretrained(name)


def _read(config: CompressConfig) -> calibration.Text | None:
    """The text to calibrate and measure on; None where none is needed and none given."""
    if not config.reads:
        return None
    return calibration.load(config.calibration or "", config.limit, config.test_share, config.data_seed, config.model,
                            config.columns)  # fmt: skip


def _rows(config: CompressConfig, model: Any, tokenizer: Any, text: calibration.Text | None) -> _Rows:
    """Calibration rows where they are needed, and what is held out; nothing where there is no text."""
    if text is None:
        return _Rows([], [], 0)
    most = min(calibration.LONGEST, getattr(model.config, "max_position_embeddings", calibration.LONGEST))
    held_out = calibration.held_out_batches(text, tokenizer, config.sequence_length or most, config.batch_size)
    if not config.calibrates:
        return _Rows([], held_out, 0)
    rows = calibration.calibration_rows(text, tokenizer, config.sequences, config.sequence_length, config.seed, most)
    return _Rows(list(torch.split(rows, config.batch_size)), held_out, rows.shape[1])


@dataclass(frozen=True)
class _Rows:
    calibration: list[torch.Tensor]  # each [rows, seq]
    held_out: list[dict[str, torch.Tensor]]
    length: int  # tokens


def _partial(config: CompressConfig, state: dict[str, Any], needed: int) -> Path:
    """The folder of what is half done, with what it was begun with; `needed` is in bytes."""
    partial = beside(config.out)
    if (partial / STATE).exists():
        _compare(json.loads((partial / STATE).read_text()), state, partial)
    held = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(folder for folder in partial.absolute().parents if folder.exists())).free
    if needed - held > free:
        raise DiskError(
            f"{partial.parent} has {free / 2**30:.2f} GiB free, and {(needed - held) / 2**30:.2f} GiB are needed for "
            "the result and for what it can be resumed from: free some, or choose another --out"
        )
    partial.mkdir(parents=True, exist_ok=True)
    with replacing(partial / STATE) as fresh:
        fresh.write_text(json.dumps(state, indent=2))
    return partial


def _state(config: CompressConfig, text: calibration.Text | None) -> dict[str, Any]:
    """What decides the result, as JSON holds it."""
    content = {TEXT: None if text is None else text.fingerprint}
    found: dict[str, Any] = json.loads(json.dumps(_arguments(config) | describe(config.model) | content))
    return found


def _arguments(config: CompressConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in DOES_NOT_DECIDE}


def _compare(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key, value in now.items():
        if key != TEXT and then.get(key) != value:
            raise RunExists(
                f"--resume: {folder} was begun with {key}={then.get(key)!r}, but now {key}={value!r} is asked for: ask "
                "for the same, or choose another --out"
            )
    if then.get(TEXT, now[TEXT]) != now[TEXT]:  # what was begun before it was kept goes on
        raise RunExists(
            f"--resume: {folder} was begun with another text of --calibration {now['calibration'] or 'office'} "
            f"(fingerprint {then[TEXT]}, now {now[TEXT]}): bring that text back, or choose another --out"
        )


@contextmanager
def _room(partial: Path) -> Iterator[None]:
    """A disk that fills up is an error with the way out, whoever met it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(partial).free / 2**30
        raise DiskError(
            f"writing into {partial} failed ({error}; {free:.2f} GiB free): nothing was put at --out; make room and go "
            "on with --resume"
        ) from error


@contextmanager
def _progress(what: str, layers: int) -> Iterator[Callable[[int], None]]:
    with counted(f"{what}, layer", layers) as done:
        yield lambda index: done(1)


def _perplexity(model: Any, held_out: list[dict[str, torch.Tensor]], device: Any, what: str) -> float | None:
    """exp(nats / labelled tokens) over the held-out text; None where there is none."""
    if not held_out:
        return None
    with _progress(what, len(layerwise.decoder_layers(model))) as step:
        total, count = layerwise.nats(model, held_out, device, step)
    return math.exp(total / count)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _quantise(
    pruned: Path, folder: Path, quantisation: Quantisation, tokenizer: Any, zeros: dict[str, torch.Tensor]
) -> None:
    """Quantise on the way in from `pruned`, check that what was zero is zero, and save."""
    model, _ = load_base(str(pruned), "stored", quantisation)
    modules = quantised_linears(model)
    for name, before in zeros.items():
        after = (dense_weight(modules[name], model.dtype, most=LOOKED_AT) == 0).float().mean()
        if after < before - 1e-4:
            raise BaseModelError(
                f"{quantisation} turned zeros of {name} into something else (of its weights {before:.3f} were zero, "
                f"{after:.3f} are): please report it"
            )
    _save(model, tokenizer, folder)
    shutil.rmtree(pruned)


def _zeros(modules: Mapping[str, Any]) -> float:
    """Share of zeros in the weights of linear layers."""
    weights = [layerwise.matrix(each) for each in modules.values()]
    return sum(int((each == 0).sum()) for each in weights) / max(sum(each.numel() for each in weights), 1)


def _sparsity(stats: layerwise.Stats) -> float:
    """Share of zeros over all pruned layers."""
    weights = sum(found["weights"] for found in stats.values())
    return sum(found["sparsity"] * found["weights"] for found in stats.values()) / max(weights, 1)


def _told(config: CompressConfig, rows: _Rows) -> dict[str, Any] | None:
    """What the card says of the text."""
    if not rows.held_out:
        return None
    return {
        "data": config.calibration or "office",
        "sequences": sum(len(batch) for batch in rows.calibration),
        "length": rows.length,
        "seed": config.seed,
        "split": {"seed": config.data_seed, "limit": config.limit, "test_share": config.test_share},
        "held_out_tokens": sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in rows.held_out),
        "counts": "response tokens" if config.of_data else "tokens",
    }


def _cost(folder: Path, size: int, started: float, device: torch.device) -> dict[str, Any]:
    """Bytes on disk, seconds, and the most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "bytes_before": size,
        "bytes_after": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _versions(quantisation: Quantisation | None) -> dict[str, str]:
    engine = {None: [], "int8-torchao": ["torchao"]}.get(quantisation, ["bitsandbytes"])
    return versions(("smartmops", "torch", "transformers", *engine))


def _publish(partial: Path, config: CompressConfig, record: dict[str, Any]) -> None:
    """Card, options and numbers beside the weights, everything on disk, then one rename."""
    model, out = partial / "model", config.out
    (model / NAME).write_text(resolved("compress", asdict(config)), encoding="utf-8")
    (model / "compression.json").write_text(json.dumps(record, indent=2) + "\n")
    (model / "metrics.json").write_text(json.dumps(record["metrics"], indent=2) + "\n")
    (model / "README.md").write_text(card(record), encoding="utf-8")
    for file in model.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if out.exists():
        out.rmdir()  # empty, or we would not be here
    os.rename(model, out)
    shutil.rmtree(partial)


def card(record: dict[str, Any]) -> str:
    """The compression card: what was done to which model, on which text, and what it cost."""
    return "\n".join(_card(record, record["metrics"], record["calibration"])) + "\n"


def _card(record: dict[str, Any], metrics: dict[str, Any], text: dict[str, Any] | None) -> Iterator[str]:
    pattern, quantisation = record["pattern"], record["quantisation"]
    done = [f"pruned by {record['begun_with']['method']} to {pattern}"] if pattern else []
    done += [f"quantised to {quantisation}"] if quantisation else []
    yield "---\nlibrary_name: transformers\ntags: [compressed, smartmops]\n---"
    yield f"# {shown_name(record['model'])}, {' and '.join(done)}\n"
    if pattern and ":" in pattern:
        yield f"{pattern} means: {pattern.replace(':', ' of every ')} neighbouring inputs of a linear layer are zero.\n"
    if pattern:
        yield "Zeros save neither memory nor time in PyTorch's dense kernels.\n"
    yield "| | before | after |\n|---|---|---|"
    if text:
        before, after = metrics["perplexity_before"], metrics["perplexity_after"]
        yield f"| perplexity ({text['counts']}) | {before:.3f} | {after:.3f} |"
    yield f"| zeros in the decoder's linear layers | | {metrics['sparsity']:.2%} |"
    yield f"| weights, MB | {metrics['bytes_before'] / 1e6:.1f} | {metrics['bytes_after'] / 1e6:.1f} |\n"
    device = metrics["peak_device_memory_bytes"]
    on_device = f", {device / 2**30:.2f} GiB on the device" if device else ""
    memory = metrics["peak_memory_bytes"] / 2**30
    yield f"{metrics['seconds']:.0f} seconds, {memory:.2f} GiB of memory at most{on_device}."
    if text:
        rows = f"{text['sequences']} sequences of {text['length']} tokens, seed {text['seed']}"
        yield f"\nText: `{shown_name(text['data'])}`. Calibration: {rows if text['sequences'] else 'none'}."
        yield f"Perplexity: {text['held_out_tokens']} held-out {text['counts']}."
    if record["layers"]:
        yield "\n| linear layer | zeros | error of its output |\n|---|---|---|"
        for name, found in record["layers"].items():
            error = f"{found['error']:.4f}" if "error" in found else ""
            yield f"| {name} | {found['sparsity']:.4f} | {error} |"
        yield "\nError of its output: ||(W' - W) X||² / ||W X||² over the calibration tokens."
