"""A finished run in, a folder that other programs load out; each export answers like the run, or is refused.

Knows runs, and what is compared. What the files look like, `prefixes` and `router` know.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from smartmops.backbone import halves
from smartmops.base.names import shown_name
from smartmops.checks.errors import RunError
from smartmops.checks.folders import whole
from smartmops.checks.lock import alone
from smartmops.experts.gate import by_expert
from smartmops.options.finished.handover import PREFIXES, ExportConfig
from smartmops.rows.example import Example
from smartmops.runs.adapters import peft_as_it_is
from smartmops.runs.folder import PATHS, Run, write_text
from smartmops.serving.answering import Answerer
from smartmops.tokens.template import Template

from . import prefixes, router
from .columns import pinned
from .pages import kv_page, peft_page, router_page

TEXTS = ("Name three rivers.", "Summarise this in one sentence: the ship left at dawn, and nobody saw it again.",
         "Write a short, polite reply to a customer whose parcel is late.", "2 + 2 = ?",
         "\n  A word with blanks around it? \n")  # fmt: skip
TOKENS = 12  # of an answer that is compared
LIMIT = {torch.float32: 1e-3}  # largest difference of log probabilities, in nats; of other dtypes:
COARSE = 0.5
LONGEST = 100  # bytes of an expert's name in that of its file
LIMIT_OF_WEIGHTS = {torch.float32: 1e-4}  # largest difference of gate weights
OWN = 20  # questions of the run itself that its exported gate is asked


@dataclass
class Asked:
    """What a run answered with one expert pinned, and from which logits."""

    inputs: list[int]
    answer: list[int]
    logits: Float[Tensor, "tokens vocabulary"]


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a run's experts, or its gate, in a form that other programs load.

    Returns:
        `format`, `files`, and by expert (or for the gate) how far what was written is from the run: `tokens` compared,
        `same` of them, `largest_difference` in nats of their log probabilities, or of weights.

    Raises:
        FileExistsError: `out` holds something.
        FileNotFoundError: there is no finished run.
        RunBusy: another process writes to `out`.
        ImportError: a package is missing; the message has its `pip install` line.
        ValueError: the run cannot be carried in that form, or what was written answered otherwise. Nothing is left.
    """
    if config.format == "router":
        router.check_installed()
    run, answerer = Run.open(config.run), Answerer.open(config.run)
    if not getattr(answerer.model.get_base_model(), "is_quantized", False):
        answerer.model.float()
    with alone(config.out), whole(config.out) as folder:
        found = _router(folder, answerer, run) if config.format == "router" else _experts(config, folder, answerer, run)
        write_text(folder / "export.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _experts(config: ExportConfig, folder: Path, answerer: Answerer, run: Run) -> dict[str, Any]:
    """Each expert into files of its own, and what these answer."""
    names = list(config.experts or answerer.experts)
    asked = {name: [_asked(answerer, text, name) for text in TEXTS] for name in names}
    layers = {name: pinned(answerer.model, _inputs(answerer, TEXTS[0], name)) for name in names}
    adapter, base_name = answerer.model.peft_config["default"], _shown(run, str(run.config["base"]))
    stops, files = answerer.template.stops(answerer.model), _file_names(names)
    base = answerer.model.base_model.unload()
    about = {"base": base_name, "visible_to": adapter.visible_to, "answer_header": adapter.answer_header,
             "stops": stops, "first_text_position": 0}  # fmt: skip
    found: dict[str, Any] = {"format": config.format, "base": base_name, "experts": {}}
    for name in names:
        if config.format in PREFIXES:
            place = folder / files[name]
            columns = prefixes.write_peft(place, config.format, layers[name], halves.backbone_of(base), base_name)
            follow = _by_peft(base, place)
        else:
            place = folder / f"{files[name]}.safetensors"
            columns = prefixes.write_plain(place, layers[name], {"expert": name, **about})
            follow = _by_script(base, place)
        said = _compared(asked[name], follow, LIMIT.get(base.dtype, COARSE), name)
        found["experts"][name] = {"file": files[name], "columns": columns, **said}
    if config.format == "kv":
        shutil.copy(Path(__file__).with_name("alone") / "answer.py", folder / "answer.py")
    page = peft_page if config.format in PREFIXES else kv_page
    write_text(folder / "README.md", page(found))
    return found


def _shown(run: Run, name: str) -> str:
    return shown_name(name, run.config.get(PATHS, ()))


def _asked(answerer: Answerer, text: str, expert: str) -> Asked:
    """The greedy answer to one text with an expert pinned."""
    inputs = _inputs(answerer, text, expert)
    told = answerer.model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0,
    )  # fmt: skip
    ids = inputs["input_ids"][0].tolist()
    return Asked(ids, told.sequences[0, len(ids) :].tolist(), torch.stack(told.logits)[:, 0].float().cpu())


def _inputs(answerer: Answerer, text: str, expert: str) -> dict[str, Tensor]:
    """One row as `generate` takes it, in the run's template, with one expert pinned."""
    (prompt,) = answerer.template.prompts([Example(text, "", "").turns()])
    inputs = {"input_ids": torch.tensor([prompt.input_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["gate_weights"] = torch.tensor([[float(name == expert) for name in answerer.experts]])
    if width := answerer.model.peft_config["default"].embedding_size:
        inputs["gate_embedding"] = torch.zeros(1, width)  # what a gate would read that is told its weights
    return {name: value.to(answerer.model.device) for name, value in inputs.items()}


Follow = Callable[[Asked], Tensor]


def _by_peft(base: Any, folder: Path) -> Follow:
    """Logits of an answer's tokens as plain PEFT gives them."""
    with peft_as_it_is():
        model = PeftModel.from_pretrained(base, str(folder)).eval()

    @torch.no_grad()
    def follow(each: Asked) -> Tensor:
        logits: Tensor
        ids = torch.tensor([each.inputs + each.answer[:-1]], device=base.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        return logits[len(each.inputs) - 1 :].float().cpu()

    return follow


def _by_script(base: Any, file: Path) -> Follow:
    """The same by the program that lies beside the exported files."""
    script = runpy.run_path(str(Path(__file__).with_name("alone") / "answer.py"))
    return lambda each: script["follow"](base, each.inputs, each.answer, str(file)).float().cpu()


def _compared(asked: Sequence[Asked], follow: Follow, limit: float, name: str) -> dict[str, Any]:
    """How far an export is from the run.

    Raises:
        ValueError: further than rounding is.
    """
    largest, same, tokens = 0.0, 0, 0
    for each in asked:
        logits, chosen = follow(each), torch.tensor(each.answer)
        gap = each.logits.log_softmax(-1) - logits.log_softmax(-1)
        largest = max(largest, float(gap.gather(1, chosen[:, None]).abs().max()))
        same, tokens = same + int((logits.argmax(-1) == chosen).sum()), tokens + len(chosen)
    if not largest <= limit:
        raise RunError(f"expert {name!r} exported answers otherwise than pinned: log probabilities differ by up to "
                         f"{largest:.3g} nats, and {limit:g} is the limit ({same} of {tokens} tokens are the same), so "
                         "nothing was written: this base reads its cache in a way of its own")  # fmt: skip
    return {"tokens": tokens, "same": same, "largest_difference": largest}


def _router(folder: Path, answerer: Answerer, run: Run) -> dict[str, Any]:
    """The gate into a graph, and how it weighs.

    Raises:
        ValueError: the tokenizer cannot go along, or the graph weighs otherwise.
    """
    if not answerer.tokenizer.is_fast:
        raise RunError(f"{type(answerer.tokenizer).__name__} is not a fast tokenizer, and only those are one file: "
                         "use the base with one")  # fmt: skip
    model, tokenizer = answerer.model, answerer.tokenizer
    layer, adapter = model.base_model.layer(), model.peft_config["default"]
    texts = [*TEXTS, *(str(each["instruction"]) for each in run.read_samples()[:OWN] if each.get("instruction"))]
    weighed = [_weighed(answerer, text) for text in texts]
    about: dict[str, Any] = {"experts": list(answerer.experts), "base": _shown(run, str(run.config["base"])),
                             "by_name": router.by_name(layer, "default"),
                             "sum_to_one": adapter.gate_top_k is None or adapter.gate_renormalise}  # fmt: skip
    base = model.base_model.unload()
    if answerer._embedder is not None:
        module: Any = router.Gate(layer, "default")
        inputs = [{"features": torch.tensor(answerer._embedder([text]))} for text in texts]
        about["features"] = f"embedding of width {adapter.embedding_size} by {_shown(run, adapter.embedder)}"
    else:
        base.set_attn_implementation("eager")  # whose steps every opset has
        module = router.Router(
            base, layer, "default", layer.index if adapter.gate_layer is None else adapter.gate_layer
        )
        about |= _frame(answerer.template, adapter.gate_input == "sequence")
        router.write_words(folder, about, tokenizer)
        reader = runpy.run_path(str(folder / "route.py"))["Reader"](about, tokenizer.backend_tokenizer)
        inputs = [reader(text) for text in texts]
        inputs = [{name: torch.tensor([ids]) for name, ids in each.items()} for each in inputs]
    try:
        router.write_onnx(module, {name: torch.cat([part, part]) for name, part in inputs[0].items()}, folder)
    except torch.onnx.OnnxExporterError as error:
        if not getattr(base, "is_quantized", False):
            raise
        raise RunError(f"--format router: the base of {run.path} is quantised, by steps that ONNX does not have: train "
                       "on the base as it was before, or choose --format kv") from error  # fmt: skip
    found = {"format": "router", "base": about["base"], "experts": about["experts"],
             **_weighed_alike(folder, inputs, weighed, LIMIT_OF_WEIGHTS.get(base.dtype, COARSE))}  # fmt: skip
    write_text(folder / "README.md", router_page(found, about))
    return found


def _weighed_alike(
    folder: Path, inputs: Sequence[dict[str, Tensor]], weighed: Sequence[Tensor], limit: float
) -> dict[str, Any]:
    """How far the graph's weights are from the run's.

    Raises:
        ValueError: further than rounding is.
    """
    from onnxruntime import InferenceSession

    session, largest, same = InferenceSession(str(folder / "router.onnx")), 0.0, 0
    for row, wanted in zip(inputs, weighed, strict=True):
        weights, left = session.run(["weights", "left_to_base"], {name: part.numpy() for name, part in row.items()})
        told = torch.cat([torch.tensor(weights[0]), torch.tensor(left)])
        largest = max(largest, float((told - wanted).abs().max()))
        same += int(told[:-1].argmax() == wanted[:-1].argmax())
    if not largest <= limit:
        raise RunError(f"the exported gate weighs otherwise than the run's: weights differ by up to {largest:.3g}, "
                         f"and {limit:g} is the limit, so nothing was written: this base does what the graph does "
                         "not")  # fmt: skip
    return {"texts": len(inputs), "same": same, "largest_difference": largest}


def _weighed(answerer: Answerer, text: str) -> Float[Tensor, " all"]:
    """The gate's weights for a text among experts, and what is left to the base."""
    layer, device = answerer.model.base_model.layer(), answerer.model.device
    if answerer._embedder is not None:
        features = torch.tensor(answerer._embedder([text]), device=device)
    else:
        (prompt,) = answerer.template.prompts([Example(text, "", "").turns()])
        ids, reads = (torch.tensor([each], device=device) for each in (prompt.input_ids, prompt.gate_mask))
        whole = answerer.model.peft_config["default"].gate_input == "sequence"
        features = answerer.model.base_model.pooled(ids, torch.ones_like(ids), None if whole else reads)
    weights = by_expert(layer.log_gate(features, "default").exp(), len(answerer.experts))[0]
    left = layer.null_weight(features, "default")
    return torch.cat([weights, torch.zeros_like(weights[:1]) if left is None else left]).detach().cpu()


def _frame(template: Template, whole: bool) -> dict[str, Any]:
    """What the template writes around a text and takes off its ends, and which of it the gate reads."""
    mark = "smartmopsmark"
    (bare,), (blank,) = (template.parts(Example(text, "", "").turns()) for text in (mark, f" \n{mark}\n "))
    before, _, after = bare.text.partition(mark)
    kept = blank.text[len(before) : len(blank.text) - len(after)]
    return {"before": before, "after": after, "lead": list(template.lead), "reads": "all" if whole else "text",
            "trims": [kept.startswith(mark), kept.endswith(mark)]}  # fmt: skip


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """A file name for each expert, no two alike."""
    found: dict[str, str] = {}
    for number, name in enumerate(names):
        short = re.sub(r"[^\w.-]+", "_", name).encode()[:LONGEST].decode(errors="ignore")  # file systems count bytes
        plain = short.strip("._") or f"expert_{number}"
        while plain.lower() in {each.lower() for each in found.values()}:
            plain += f"_{number}"
        found[name] = plain
    return found
