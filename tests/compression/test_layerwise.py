"""One layer at a time is the whole model: hidden states, nats, Hessians, and weights pruned in the order they act."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kill import Killed, kill_at_solve
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.pytorch_utils import Conv1D

from smartmops.compression.layerwise import (
    check_runs_by_layer,
    decoder_layers,
    embed,
    linears,
    matrix,
    nats,
    prune,
)
from smartmops.compression.solvers import SOLVERS, Pattern, Solver, sparsegpt
from tiny_models import MODELS, VOCABULARY, build

SUPPORTED = [name for name in MODELS if name != "mixtral"]  # whose experts are fused
HALF = Pattern.parse(pattern="2:4")


def make(name: str = "llama", **changes: Any) -> Any:
    """Gemma 2 has no other kernel."""
    return build(name, "eager" if name == "gemma2" else "sdpa", **changes)


def small() -> Any:
    return make(num_hidden_layers=3)


def texts(rows: int = 8, length: int = 12, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (rows, length), generator=generator) for _ in range(batches)]


def labelled() -> list[dict[str, Tensor]]:
    """Two right-padded batches; some of the text has no label, one row has none at all."""
    batches = []
    for ids in texts(3, 12):
        mask = torch.ones_like(ids)
        mask[0, 7:] = mask[1, 10:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[1, :4] = labels[2] = -100
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def by_definition(model: Any, batches: list[dict[str, Tensor]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        total, count = total + losses.sum().item(), count + int((batch["labels"][:, 1:] != -100).sum())
    return total, count


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(got: Any, want: Any) -> None:
    got, want = got.state_dict(), want.state_dict()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def solve_with(monkeypatch: pytest.MonkeyPatch, solver: Callable[..., Tensor]) -> None:
    monkeypatch.setitem(SOLVERS, "sparsegpt", solver)


@pytest.mark.parametrize("name", SUPPORTED)
def test_layers_one_after_another_are_the_model(name: str) -> None:
    model, batches = make(name), labelled()
    check_runs_by_layer(model)
    got, want = nats(model, batches), by_definition(model, batches)
    assert got[1] == want[1] == 2 * (6 + 6)
    assert got[0] == pytest.approx(want[0], rel=1e-4)


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "smollm3"])
def test_layers_keep_their_own_kind_of_attention(name: str) -> None:
    """Windows shorter than the text, in some layers or all; layers without positions."""
    model, batches = make(name, **({} if name == "smollm3" else dict(sliding_window=3))), labelled()
    wide = make(name)
    got, want = nats(model, batches), by_definition(model, batches)
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    if name != "smollm3":
        assert abs(want[0] - by_definition(wide, batches)[0]) > 1e-2, "or the window hides nothing"


class Scaling(LlamaModel):
    """Scales what comes in, embedded or not, as the first Gemmas did."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=2 * embeds, **kwargs)


def test_a_backbone_that_changes_what_its_layers_get_is_refused() -> None:
    model = small()
    model.model.__class__ = Scaling
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run layer by layer: choose another architecture"):
        check_runs_by_layer(model)


def test_fused_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MixtralForCausalLM holds .* outside linear modules, .* fused experts"):
        linears(make("mixtral"))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_solver_that_changes_nothing_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solve_with(monkeypatch, lambda weight, *rest: weight)
    model, (ids, _) = make(name), texts()
    before = model(input_ids=ids).logits
    prune(model, [ids], HALF)
    assert_equal(model, make(name))
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_linear_module_gets_the_pattern_and_nothing_else_changes(name: str) -> None:
    model, before = make(name), weights(make(name))
    stats = prune(model, texts(), HALF)
    kinds = {module for layer in decoder_layers(model) for module in layer.modules()}
    expected = {n: m for n, m in model.named_modules() if m in kinds and isinstance(m, nn.Linear | Conv1D)}
    assert stats.keys() == expected.keys()
    for where, module in expected.items():
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # [out, in]
        assert ((weight.reshape(len(weight), -1, 4) == 0).sum(-1) == 2).all(), where
        assert stats[where]["sparsity"] == 0.5
        assert stats[where]["weights"] == weight.numel()
    pruned = {f"{where}.weight" for where in expected}
    others = [where for where, value in model.state_dict().items() if where not in pruned]
    assert any("embed" in where or "wte" in where for where in others)
    assert [where for where in others if not torch.equal(model.state_dict()[where], before[where])] == []


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("share", [0.3, 0.75, 0.9])
def test_every_layer_reaches_the_share_asked_for(method: Any, share: float) -> None:
    model = small()
    stats = prune(model, texts(), Pattern(share), method, Solver(block_size=32))
    for name, module in linears(model).items():
        reached = (matrix(module) == 0).double().mean().item()
        assert reached == pytest.approx(share, abs=0.01)
        assert stats[name]["sparsity"] == pytest.approx(reached, abs=1e-6)


def test_the_error_told_is_that_of_the_outputs() -> None:
    model, batches = small(), texts()
    dense, inputs = copy.deepcopy(model), inputs_of(model, batches)
    stats = prune(model, batches, HALF)
    for name, module in linears(model).items():
        if ".layers.0." not in f".{name}":
            continue  # deeper layers see what pruned ones give
        old, x = matrix(linears(dense)[name]).double(), inputs[name].double()
        want = ((matrix(module).double() - old) @ x.T).square().sum() / (old @ x.T).square().sum()
        assert stats[name]["error"] == pytest.approx(want.item(), rel=1e-3)


def inputs_of(model: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """Of each linear module all it sees in plain forward passes, [tokens, in]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, module in linears(model).items()
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2"])
def test_hessians_are_the_sums_over_all_that_enters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Tensor] = []
    solve_with(monkeypatch, lambda weight, hessian, *rest: [weight, got.append(hessian)][0])
    model, batches = make(name), texts()
    order = list(prune(model, batches, HALF))
    inputs = inputs_of(model, batches)
    assert len(order) == len(got) == len(inputs)
    for where, hessian in zip(order, got, strict=True):
        want = inputs[where].double().T @ inputs[where].double()
        assert (hessian - want).abs().max() < 1e-4 * want.abs().max(), where


def test_modules_that_are_fed_the_same_share_one_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Tensor] = []
    solve_with(monkeypatch, lambda weight, hessian, *rest: [weight, got.append(hessian)][0])
    order = list(prune(small(), texts(), HALF))
    of = {name.rsplit(".", 1)[1]: id(hessian) for name, hessian in zip(order[:7], got[:7], strict=True)}
    assert of["q_proj"] == of["k_proj"] == of["v_proj"]
    assert of["gate_proj"] == of["up_proj"]
    assert len(set(map(id, got))) == 4 * 3  # q,k,v; o; gate,up; down; of 3 layers


def test_each_layer_sees_what_the_pruned_layers_before_it_give() -> None:
    batches, by_hand = texts(), small()
    for index in range(3):
        inputs = inputs_of(by_hand, batches)
        for name, module in linears(by_hand).items():
            if f".layers.{index}." in f".{name}":
                hessian = inputs[name].T @ inputs[name]
                module.weight.data = sparsegpt(module.weight.data, hessian, HALF, Solver())
    model, otherwise = small(), small()
    prune(model, batches, HALF)
    dense_inputs = inputs_of(otherwise, batches)
    last = "model.layers.2.mlp.down_proj"
    wrong = sparsegpt(linears(otherwise)[last].weight.data, dense_inputs[last].T @ dense_inputs[last], HALF, Solver())
    for name, module in linears(model).items():
        torch.testing.assert_close(module.weight, linears(by_hand)[name].weight, rtol=1e-3, atol=1e-4)
    assert (linears(model)[last].weight - wrong).abs().max() > 0.01, "or the order makes no difference here"


def test_only_the_layer_at_work_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().bfloat16()
    at_work: list[int] = []

    def look(weight: Tensor, hessian: Tensor, *rest: Any) -> Tensor:
        kinds = [{parameter.dtype for parameter in layer.parameters()} for layer in decoder_layers(model)]
        assert sorted(map(str, set.union(*kinds))) == ["torch.bfloat16", "torch.float32"]
        assert all(len(kind) == 1 for kind in kinds)
        at_work.append(kinds.index({torch.float32}))
        assert kinds.count({torch.float32}) == 1
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert weight.dtype == hessian.dtype == torch.float32
        return sparsegpt(weight, hessian, *rest)

    solve_with(monkeypatch, look)
    finished: list[int] = []
    prune(model, texts(), HALF, on_layer=finished.append)
    assert at_work == [index for index in range(3) for _ in range(7)]
    assert finished == [0, 1, 2]
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    for name, module in linears(model).items():
        assert ((module.weight.view(len(module.weight), -1, 4) == 0).sum(-1) == 2).all(), name


def test_nats_of_a_bf16_model_are_measured_in_float32() -> None:
    model, batches = small().bfloat16(), labelled()
    got = nats(model, batches)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert got[0] == pytest.approx(by_definition(copy.deepcopy(model).float(), batches)[0], rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(training: bool) -> None:
    model = small().train(training)
    prune(model, texts(), HALF, "wanda")
    assert model.training is training


def kill_after(layer: int) -> Callable[[int], None]:
    def on_layer(index: int) -> None:
        if index == layer:
            raise Killed

    return on_layer


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each solved module."""
    solves: list[int] = []
    solve_with(monkeypatch, lambda *args: [sparsegpt(*args), solves.append(1)][0])
    return solves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_killed_run_goes_on_where_it_stopped(
    last: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small().to(dtype)
    stats = prune(whole, texts(), HALF)
    with pytest.raises(Killed):
        prune(small().to(dtype), texts(), HALF, keep=tmp_path, on_layer=kill_after(last))
    assert len(list(tmp_path.iterdir())) == last + 1
    solves, model = counted(monkeypatch), small().to(dtype)
    assert prune(model, texts(), HALF, keep=tmp_path) == stats
    assert len(solves) == 7 * (2 - last)
    assert_equal(model, whole)


def test_a_run_killed_inside_a_layer_keeps_the_layers_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small()
    prune(whole, texts(), HALF)
    kill_at_solve(monkeypatch, 10)
    with pytest.raises(Killed):
        prune(small(), texts(), HALF, keep=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["layer-000.safetensors"]
    solves, model = counted(monkeypatch), small()
    prune(model, texts(), HALF, keep=tmp_path)
    assert len(solves) == 14
    assert_equal(model, whole)


def test_a_killed_run_leaves_the_model_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().bfloat16()
    kill_at_solve(monkeypatch, 10)
    with pytest.raises(Killed):
        prune(model, texts(), HALF)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_damaged_layer_file_is_done_again(left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small()
    stats = prune(whole, texts(), HALF, keep=tmp_path)
    file = tmp_path / "layer-001.safetensors"
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[: int(left * len(whole_file)) if 0 < left < 1 else int(left)])
    solves, model = counted(monkeypatch), small()
    assert prune(model, texts(), HALF, keep=tmp_path) == stats
    assert len(solves) == 7
    assert_equal(model, whole)
    assert file.read_bytes() == whole_file


def test_gpt2_goes_on_too(tmp_path: Path) -> None:
    whole, model = make("gpt2"), make("gpt2")
    stats = prune(whole, texts(), HALF, keep=tmp_path)
    assert prune(model, texts(), HALF, keep=tmp_path) == stats
    assert_equal(model, whole)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_without_calibration_only_magnitude_prunes(method: Any) -> None:
    model = small()
    with pytest.raises(ValueError, match=f"method={method} needs calibration text, and got 0 tokens"):
        prune(model, [], HALF, method)
    assert_equal(model, small())
    stats = prune(model, [], HALF, "magnitude")
    assert {found["sparsity"] for found in stats.values()} == {0.5}
    assert not any("error" in found for found in stats.values())


def test_magnitude_is_the_same_with_and_without_calibration() -> None:
    with_text, without = small(), small()
    stats = prune(with_text, texts(), HALF, "magnitude")
    prune(without, [], HALF, "magnitude")
    assert_equal(with_text, without)
    assert all(0 < found["error"] < 1 for found in stats.values())


def test_a_width_that_does_not_fit_is_refused_before_anything_is_pruned() -> None:
    model = small()
    message = r"pattern=4:7, but model\.layers\.0\.self_attn\.q_proj has 64 inputs, which 7 does not divide"
    with pytest.raises(ValueError, match=message):
        prune(model, texts(), Pattern.parse(pattern="4:7"), solver=Solver(block_size=7))
    assert_equal(model, small())


def test_one_misfit_among_many_widths_is_named() -> None:
    model = build(intermediate_size=120, num_hidden_layers=2)  # 16 divides 64, but not 120
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj has 120 inputs, which 16 does not divide"):
        prune(model, texts(), Pattern.parse(pattern="4:16"))


def test_a_block_size_that_does_not_fit_the_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size=10: choose a positive multiple of 4"):
        prune(small(), texts(), HALF, solver=Solver(block_size=10))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_block_size_is_not_asked_of_what_solves_in_no_blocks(method: Any) -> None:
    stats = prune(small(), texts(), HALF, method, Solver(block_size=10))
    assert all(found["sparsity"] == 0.5 for found in stats.values())


def test_what_enters_the_first_layer_is_float32() -> None:
    (hidden,) = embed(small().bfloat16(), texts(batches=1))
    assert (hidden.dtype, hidden.shape) == (torch.float32, (8, 12, 64))
