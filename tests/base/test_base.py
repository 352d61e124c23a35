"""Quantised bases: gradients pass through them, zeros stay zero, and a wrong gradient is refused at load."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from smartmops import MoPsConfig
from smartmops.base import (
    check_gradient,
    dense_weight,
    describe,
    load_base,
    local,
    quantised_as,
    quantised_linears,
)
from smartmops.compression.layerwise import linears, prune
from smartmops.compression.solvers import Pattern
from smartmops.tuner.engine import keep_unpacked
from tiny_models import VOCABULARY


def needs(kind: str) -> pytest.MarkDecorator:
    package = "torchao" if kind == "int8-torchao" else "bitsandbytes"
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{kind} needs {package}, which is not installed")


KINDS = [pytest.param(kind, marks=needs(kind)) for kind in ("int8", "nf4", "int8-torchao")]
BITSANDBYTES = [pytest.param(kind, marks=needs(kind)) for kind in ("int8", "nf4")]  # which can `dequantize`
DTYPES = [torch.float32, torch.bfloat16]


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_quantised_and_its_gradient_is_right(kind: Any, dtype: torch.dtype, base_folder: Path) -> None:
    model, _ = load_base(str(base_folder), dtype, kind)
    assert quantised_linears(model).keys() == linears_of(base_folder)
    assert check_gradient(model) > 0.99
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def linears_of(folder: Path) -> set[str]:
    return set(linears(AutoModelForCausalLM.from_pretrained(folder)))


def test_a_plain_model_has_nothing_to_check(base_folder: Path) -> None:
    model, _ = load_base(str(base_folder), "float32")
    assert quantised_linears(model) == {}
    assert check_gradient(model) == 1.0


def prompt_gradient(model: Any) -> Tensor:
    """Of the mean log-likelihood of some tokens, at the prompts of a MoPs adapter that acts from layer 1 on."""
    torch.manual_seed(0)
    options = dict(num_experts=2, prompts_per_expert=3, injection_layer=1, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, MoPsConfig(**options)).eval()
    labels = ids().index_fill(1, torch.arange(3), -100)  # an instruction of 3 tokens
    adapted(input_ids=ids(), labels=labels).loss.backward()
    gradient: Tensor = adapted.base_model.layer("default").mops_prompts["default"].grad
    assert gradient.abs().max() > 0
    return gradient.float().flatten()


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after an eval pass"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_the_gradient_at_the_prompts_is_that_of_the_dequantised_model(
    kind: Any, dtype: torch.dtype, used: bool, base_folder: Path
) -> None:
    model, twin = (load_base(str(base_folder), dtype, kind)[0] for _ in range(2))
    if used:
        with torch.no_grad():
            model(input_ids=ids())
    got, want = prompt_gradient(model), prompt_gradient(twin.dequantize())
    assert F.cosine_similarity(got, want, dim=0) > (0.99 if kind == "int8" else 0.9)


@needs("nf4")
@pytest.mark.parametrize("training", [False, True])
def test_weights_repacked_by_a_pass_without_gradient_are_noticed(training: bool, base_folder: Path) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("repacking of 4-bit weights: this CPU has no AVX512-BF16, so bitsandbytes never repacks")
    model, _ = load_base(str(base_folder), torch.bfloat16, "nf4")
    for module in quantised_linears(model).values():
        assert module.support_avx512bf16_for_cpu is False
        module.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match=r"gradient (flows )?through .*q_proj"):  # a wrong one, or none at all
        check_gradient(model.train(training))
    with pytest.raises(ValueError, match=r"4-bit weights of .*q_proj were repacked by a pass without gradient"):
        keep_unpacked(model)


class Foreign(nn.Module):
    """A linear module of an unknown library: quantised weights, and a backward of its own."""

    def __init__(self, backward: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.used = 96, 64, False
        self.weight = nn.Parameter(torch.randint(-9, 9, (64, 96), dtype=torch.int8), requires_grad=False)

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, x: Tensor) -> Tensor:
                return x @ self.weight.to(x).T / 9

            @staticmethod
            def backward(context: Any, g: Tensor) -> Tensor:
                return backward(g @ self.weight.to(g) / 9, self)

        self.product = Product.apply

    def forward(self, x: Tensor) -> Tensor:
        self.used |= not torch.is_grad_enabled() and len(x) == 4 and bool(x.frac().any())  # not for unit vectors
        return self.product(x)


class Holder(nn.Module):
    """As much of a model as the check looks at."""

    dtype = torch.float32

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.foreign = module


def no_backward(error: Exception) -> Any:
    def backward(gradient: Tensor, module: Foreign) -> Tensor:
        raise error

    return backward


def test_a_foreign_module_whose_gradient_is_right_is_welcome() -> None:
    holder = Holder(Foreign(lambda gradient, module: gradient)).train()
    assert check_gradient(holder) == pytest.approx(1)
    assert holder.foreign.training, "left as it was"


@pytest.mark.parametrize("wrong", [
    lambda gradient, module: -gradient,
    lambda gradient, module: gradient.flip(1),
    lambda gradient, module: gradient.flip(0),
    lambda gradient, module: gradient * 0,
    lambda gradient, module: gradient / 0,
    lambda gradient, module: gradient + 2 * gradient.std() * torch.randn_like(gradient),
], ids=["negative", "columns permuted", "rows permuted", "zero", "not finite", "noise"])  # fmt: skip
def test_a_wrong_gradient_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"the gradient through foreign \(Foreign\) is wrong at load: its cosine"):
        check_gradient(Holder(Foreign(wrong)))


def test_a_gradient_that_goes_wrong_with_use_is_refused() -> None:
    foreign = Foreign(lambda gradient, module: gradient.flip(1) if module.used else gradient)
    with pytest.raises(ValueError, match=r"through foreign \(Foreign\) is wrong after a pass without gradient"):
        check_gradient(Holder(foreign))


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), NotImplementedError("no kernel")], ids=repr)
def test_a_backward_that_raises_is_refused(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"no gradient flows through foreign \(Foreign: no kernel\).*int8 or nf4"):
        check_gradient(Holder(Foreign(no_backward(error))))


def test_an_output_without_a_graph_is_refused() -> None:
    foreign = Foreign(lambda gradient, module: gradient)
    foreign.product = lambda x: (x @ foreign.weight.to(x).T).detach()
    with pytest.raises(ValueError, match=r"no gradient flows through foreign"):
        check_gradient(Holder(foreign))


def test_the_dense_weight_is_read_off_whatever_the_bias() -> None:
    linear = nn.Linear(24, 16)
    torch.testing.assert_close(dense_weight(linear), linear.weight.data)
    torch.testing.assert_close(dense_weight(linear, most=10), linear.weight.data[:, :10])


@pytest.fixture(scope="module")
def sparse_folder(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    prune(model, [], Pattern.parse(pattern="7:8"), "magnitude")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero(kind: Any, dtype: torch.dtype, sparse_folder: Path) -> None:
    pruned = AutoModelForCausalLM.from_pretrained(sparse_folder)
    model, _ = load_base(str(sparse_folder), dtype, kind)
    for name, module in quantised_linears(model).items():
        was, weight = linears(pruned)[name].weight, dense_weight(module, dtype)
        assert (weight[was == 0] == 0).all(), name
        assert F.cosine_similarity(weight.flatten(), was.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_quantised_model_is_the_same_when_loaded(
    kind: Any, dtype: torch.dtype, base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model, _ = load_base(str(base_folder), dtype, kind)
    with torch.no_grad():
        want = model(input_ids=ids().to(model.device)).logits
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert quantised_as(str(tmp_path)) == ("torchao" if kind == "int8-torchao" else "bitsandbytes")
    again, _ = load_base(str(tmp_path), dtype)
    assert len(quantised_linears(again)) == len(quantised_linears(model))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids().to(again.device)).logits, want)


@pytest.mark.parametrize(("kind", "package", "extra"), [
    ("int8", "bitsandbytes", "int8"), ("nf4", "bitsandbytes", "int8"), ("int8-torchao", "torchao", "torchao"),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_install_line(
    kind: Any, package: str, extra: str, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"a model in {kind} needs the package {package} .*: pip install 'smartmops\[{extra}\]'"
    ):
        load_base(str(base_folder), "float32", quantisation=kind)


@needs("int8")
def test_a_stored_quantised_model_names_its_missing_library(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base(str(base_folder), "float32", quantisation="int8")[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"needs the package bitsandbytes .*: pip install 'smartmops\[int8\]'"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("where", ["./nowhere", "nowhere.safetensors", "~/nowhere"])
def test_a_path_with_nothing_there_is_refused(where: str) -> None:
    for read in (load_base, local, quantised_as, describe):
        with pytest.raises(FileNotFoundError, match=f"MODEL {where} does not exist: give a model folder, a hub id, "):
            read(where)


def test_an_absolute_path_with_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: give a model folder"):
        load_base(str(tmp_path / "nowhere"))


def test_a_model_folder_that_changes_is_described_otherwise(base_folder: Path, sparse_folder: Path) -> None:
    assert describe(str(base_folder)) == describe(str(base_folder))
    assert describe(str(base_folder)) != describe(str(sparse_folder))
    before = describe(str(sparse_folder))
    config = sparse_folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert describe(str(sparse_folder)) != before
