"""`compress` from folder to folder: what is written, what the card says of it, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from smartmops.base import dense_weight, load_base, quantised_linears
from smartmops.compression.compress import compress
from smartmops.compression.layerwise import linears
from smartmops.data.tasks import splits

LENGTH = 32  # of the sequences of `configured`


def needs(kind: str) -> pytest.MarkDecorator:
    package = "torchao" if kind == "int8-torchao" else "bitsandbytes"
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{kind} needs {package}, which is not installed")


KINDS = [
    pytest.param(dict(int8=True), "int8", marks=needs("int8"), id="int8"),
    pytest.param(dict(nf4=True), "nf4", marks=needs("nf4"), id="nf4"),
    pytest.param(dict(int8=True, int8_engine="torchao"), "int8-torchao", marks=needs("int8-torchao"), id="torchao"),
]


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "compression.json").read_text())


def perplexity(model: Any, tokenizer: Any, file: Path) -> float:
    """Of the last tenth of a text file of one document, in rows of LENGTH tokens."""
    text = file.read_text()
    ids = [*tokenizer(text[round(len(text) * 0.9) :].strip())["input_ids"], tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH).to(model.device)
    with torch.no_grad():
        logits = model(input_ids=rows).logits.float()
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item())


def test_the_folder_loads_as_any_model_does_with_the_exact_pattern(whole: Path, base_folder: Path) -> None:
    model, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, base_folder))
    assert len(linears(model)) == 21
    for name, module in linears(model).items():
        assert ((module.weight.view(len(module.weight), -1, 4) == 0).sum(-1) == 2).all(), name
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value) != (name.removesuffix(".weight") in linears(model)), name
    words = "This is the answer."
    assert AutoTokenizer.from_pretrained(whole)(words) == AutoTokenizer.from_pretrained(base_folder)(words)
    assert not whole.with_name("model.partial").exists()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_a_share_is_reached_in_every_linear_module(method: Any, configured: Any, tmp_path: Path) -> None:
    metrics = compress(configured(tmp_path / "out", sparsity=0.75, method=method))
    for module in linears(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).values():
        assert (module.weight == 0).float().mean().item() == pytest.approx(0.75, abs=0.005)
    assert metrics["sparsity"] == pytest.approx(0.75, abs=0.005)


def test_a_model_stays_in_the_dtype_it_is_stored_in(
    configured: Any, base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    metrics = compress(configured(tmp_path / "out", model=str(tmp_path / "base")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    for module in linears(model).values():
        assert ((module.weight.view(len(module.weight), -1, 4) == 0).sum(-1) == 2).all()
    assert metrics["bytes_before"] == sum(2 * parameter.numel() for parameter in model.parameters())


def test_perplexities_are_those_of_plain_forward_passes(
    whole: Path, base_folder: Path, prose: Path, tokenizer: Any
) -> None:
    metrics = record(whole)["metrics"]
    for when, folder in (("before", base_folder), ("after", whole)):
        want = perplexity(AutoModelForCausalLM.from_pretrained(folder), tokenizer, prose)
        assert metrics[f"perplexity_{when}"] == pytest.approx(want, rel=1e-4)
    assert abs(metrics["perplexity_after"] / metrics["perplexity_before"] - 1) > 0.01, "or pruning does nothing here"


def test_card_and_records_say_the_same(whole: Path, prose: Path, base_folder: Path) -> None:
    found, card = record(whole), (whole / "README.md").read_text()
    assert f"# {base_folder.name}, " in card and "Text: `prose.txt`" in card
    assert not any(str(folder) in card for folder in (base_folder.parent, prose.parent))
    metrics = json.loads((whole / "metrics.json").read_text())
    assert found["metrics"] == metrics
    assert f"| {metrics['perplexity_before']:.3f} | {metrics['perplexity_after']:.3f} |" in card
    assert f"| {metrics['sparsity']:.2%} |" in card
    assert metrics["sparsity"] == 0.5
    assert f"| {metrics['bytes_before'] / 1e6:.1f} | {metrics['bytes_after'] / 1e6:.1f} |" in card
    assert metrics["bytes_after"] == (whole / "model.safetensors").stat().st_size
    assert found["layers"].keys() == linears(AutoModelForCausalLM.from_pretrained(whole)).keys()
    for name, layer in found["layers"].items():
        assert f"| {name} | {layer['sparsity']:.4f} | {layer['error']:.4f} |" in card
        assert 0 < layer["error"] < 1
    told = found["calibration"]
    assert (told["sequences"], told["length"], told["data"]) == (16, LENGTH, str(prose))
    for words in (
        "sparsegpt",
        "2:4",
        f"16 sequences of {LENGTH} tokens",
        f"`{prose.name}`",
        f"{told['held_out_tokens']} held-out",
    ):
        assert words in card
    assert found["begun_with"]["pattern"] == "2:4"


def test_what_is_returned_is_what_is_written(configured: Any, tmp_path: Path) -> None:
    metrics = compress(configured(tmp_path / "out", method="magnitude", sparsity=0.3))
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_a_copy_that_is_not_installed_compresses_and_says_so(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(package: str) -> str:
        if package == "smartmops":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("smartmops.settings.writing.version", absent)
    compress(configured(tmp_path / "out"))
    assert record(tmp_path / "out")["versions"]["smartmops"] == "absent"


def test_data_are_calibrated_on_and_held_out_as_training_has_them(
    configured: Any, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    rows = [dict(instruction=f"Name {i}.", response=f"It is {i}.", category="ab"[i % 2]) for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(calibration=str(file), sequence_length=None, sequences=8, test_share=0.2, data_seed=3)
    compress(configured(tmp_path / "out", **options))
    told = record(tmp_path / "out")["calibration"]
    assert told["counts"] == "response tokens"
    assert told["split"] == {"seed": 3, "limit": None, "test_share": 0.2}
    test = splits(str(file), None, 0.2, 3)[1]
    want = sum(len(tokenizer(e.response, add_special_tokens=False)["input_ids"]) + 1 for e in test)
    assert told["held_out_tokens"] == want


@pytest.mark.parametrize("pattern", ["7:8", None])
@pytest.mark.parametrize(("options", "kind"), KINDS)
def test_quantised_on_top(
    options: dict[str, Any],
    kind: str,
    pattern: str | None,
    configured: Any,
    prose: Path,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    metrics = compress(configured(tmp_path / "out", pattern=pattern, **options))
    found = record(tmp_path / "out")
    assert found["quantisation"] == kind
    assert f"quantised to {kind}" in (tmp_path / "out" / "README.md").read_text()
    assert metrics["bytes_after"] < 0.75 * metrics["bytes_before"]  # embeddings and head stay as they are
    model, _ = load_base(str(tmp_path / "out"), "float32")
    assert metrics["perplexity_after"] == pytest.approx(perplexity(model, tokenizer, prose), rel=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config is not None
    for name, module in quantised_linears(model).items():
        zeros = dense_weight(module, model.dtype) == 0
        if pattern:
            assert (zeros.view(len(zeros), -1, 8).sum(-1) >= 7).all(), name
            assert found["layers"][name]["sparsity"] <= zeros.float().mean().item() + 1e-6
    assert not (tmp_path / "out.partial").exists()


@needs("int8")
def test_zeros_that_were_there_before_are_counted(configured: Any, tmp_path: Path) -> None:
    compress(configured(tmp_path / "pruned", pattern="1:2"))
    metrics = compress(configured(tmp_path / "out", model=str(tmp_path / "pruned"), pattern=None, int8=True))
    assert metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)


@needs("int8")
def test_without_text_a_quantised_model_is_not_measured(configured: Any, tmp_path: Path) -> None:
    metrics = compress(configured(tmp_path / "out", int8=True, calibration=None))
    assert metrics["perplexity_before"] is metrics["perplexity_after"] is None
    assert record(tmp_path / "out")["calibration"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "perplexity" not in card.lower()


@needs("int8")
def test_zeros_that_lie_in_some_columns_only_are_no_mistake(configured: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Magnitude may leave the columns that are looked at dense, and empty others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 1024:] /= 1000
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = dict(model=str(tmp_path / "base"), method="magnitude", sparsity=0.5, int8=True)
    assert compress(configured(tmp_path / "out", **options))["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_something_else_in_it_is_left_alone(resume: bool, configured: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"--out .*out exists and is not empty: choose another folder"):
        compress(configured(tmp_path / "out", resume=resume))
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mine.txt"]


def test_an_empty_folder_is_filled(configured: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress(configured(tmp_path / "out", method="magnitude", calibration=None))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_resume_with_nothing_begun_is_refused_and_names_what_is_near(
    configured: Any, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "mine")
    with pytest.raises(
        FileNotFoundError, match=r"nmie does not exist, so there is nothing to go on with.*there is .*mine"
    ):
        compress(configured(tmp_path / "nmie", resume=True))
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("changes", "message"), [
    (dict(pattern=None), r"nothing to do: give --sparsity 0.75 or --pattern 7:8, --int8 or --nf4"),
    (dict(int8=True, nf4=True), r"--int8 and --nf4 are both asked for: choose one"),
    (dict(int8=True, int8_engine="onnx"), r"--int8-engine onnx: choose bitsandbytes or torchao"),
    (dict(sparsity=0.5, pattern="2:4"), r"--sparsity 0.5 and --pattern 2:4 are both asked for: choose one"),
    (dict(sparsity=7.0), r"--sparsity 7.0: choose a share of zeros between 0 and 1"),
    (dict(pattern="9:8"), r"--pattern 9:8: n:m prunes n of every m"),
    (dict(pattern="4:7", block_size=7), r"pattern=4:7, but model.layers.0.self_attn.q_proj has 64 inputs, which 7"),
    (dict(pattern="2:4", block_size=6), r"block_size=6: choose a positive multiple of 4"),
    (dict(damping=-1.0), r"--damping -1.0: choose a finite number of 0 or more"),
    (dict(calibration=None), r"no calibration text for .*base.*: give --calibration a text file"),
    (dict(calibration="nowhere.txt"), r"calibration='nowhere.txt' cannot be read"),
    (dict(sequences=100_000), r"sequences of 32 need 3200000: give more text"),
    (dict(sequences=0), r"--sequences 0: choose 1 or more"),
    (dict(sequence_length=1), r"--sequence-length 1: choose 2 tokens or more"),
], ids=str)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    changes: dict[str, Any], message: str, configured: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compress(configured(tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_refused(configured: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MODEL .*nowhere does not exist: give a model folder, a hub id, "):
        compress(configured(tmp_path / "out", model=str(tmp_path / "nowhere")))
    assert list(tmp_path.iterdir()) == []


@needs("int8")
def test_a_quantised_model_is_refused(configured: Any, base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    load_base(str(base_folder), "float32", quantisation="int8")[0].save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for options in (dict(pattern="2:4"), dict(nf4=True)):
        with pytest.raises(ValueError, match=r"MODEL .*base is quantised already \(bitsandbytes\).*it was made from"):
            compress(configured(tmp_path / "out", model=str(tmp_path / "base"), **options))
    assert [file.name for file in tmp_path.iterdir()] == ["base"]
