"""The exported gate of runs whose experts came, went or merged weighs as the run does, with all that a gate may have."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import smartmops as sm
from smartmops.base import load_base
from smartmops.experts.gate import by_expert
from smartmops.experts.routes import unlikeness
from smartmops.handover import export, pages, router
from smartmops.rows.example import Example
from smartmops.tokens.template import Template

TEXTS = ("apple number 3.", "banana number 40.", "cherry number 7.", "date date number 40.", "Name three rivers.")
ROUTE = """
import json, runpy
router = runpy.run_path(sys.argv[1] + "/route.py")["Router"](sys.argv[1])
print(json.dumps([router(text) for text in json.loads(sys.argv[2])]))
"""
WIDTH = 12
RULES = 2  # of experts that were added
# How experts came, went and merged: (experts, routes, claims). The gate has three rows.
CHANGED = {
    "added": (5, [0, 1, 2, 3, 4], RULES),
    "dropped": (2, [0, 1, 1], 0),
    "merged and added": (4, [0, 1, 0, 2, 3], RULES),
    "merged with an added one": (3, [0, 1, 2, 1, 0], RULES),
}
GATES = {
    "plain": {},
    "null expert": {"null_expert": True},
    "top-k, warm": {"gate_top_k": 2, "gate_temperature": 2.5},
    "one kept as it is": {"gate_top_k": 1, "gate_renormalise": False, "null_expert": True},
    "constant": {"gate_bias": True, "null_expert": True, "gate_top_k": 2},
}


@pytest.fixture
def gate_of() -> Callable[..., tuple[Any, router.Gate]]:
    """An injection layer with random numbers in every part of its gate, and what is exported of it."""

    def make(experts: int, routes: list[int], claims: int, **options: Any) -> tuple[Any, router.Gate]:
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        ))  # fmt: skip
        config = sm.MoPsConfig(num_experts=experts, prompts_per_expert=2, injection_layer=1, init="random",
                               embedding_size=WIDTH, embedder="any encoder", experts="keys_values", routes=routes,
                               claims=claims, **options)  # fmt: skip
        layer = get_peft_model(base, config).eval().base_model.layer()
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            if "gate" in name or "null" in name or "claim" in name:
                for value in getattr(layer, name).values():
                    value.data.normal_().mul_(0.4)
        layer.mops_gate_scale["default"].fill_(1.0)
        if claims:  # the first rule holds for about half of all texts, the second for none: it answers by name only
            basis, centre, direction, cut = (getattr(layer, f"mops_claim_{name}")["default"] for name in router.RULE)
            cut.copy_(torch.tensor([[2.0, 1.0, 0.0, 0.0], [torch.inf, 1.0, torch.inf, -torch.inf]]))
            some = layer.standardised(torch.randn(400, WIDTH), "default")
            cut[0, 3] = unlikeness(some, basis[0], centre[0], direction[0], cut[0]).median()
        if options.get("null_expert"):
            layer.mops_null_cut["default"].copy_(torch.tensor([2.5, 1.0, 0.5]))
        return layer, router.Gate(layer, "default")

    return make


@pytest.mark.parametrize(("changed", "gate"), [
    ("added", "null expert"), ("added", "one kept as it is"), ("dropped", "plain"), ("merged and added", "constant"),
    ("merged with an added one", "top-k, warm"),
])  # fmt: skip
def test_the_graph_weighs_as_the_layer_whatever_became_of_its_experts(
    changed: str, gate: str, gate_of: Callable[..., tuple[Any, router.Gate]], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    experts, routes, claims = CHANGED[changed]
    layer, exported = gate_of(experts, routes, claims, **GATES[gate])
    features = torch.randn(200, WIDTH)
    with torch.no_grad():
        wanted = by_expert(layer.log_gate(features, "default").exp(), experts)
        left = layer.null_weight(features, "default")
    if claims:
        share = float(layer._held(features, "default")[:, 0].float().mean())
        assert 0.1 < share < 0.9, "else the rule is not tried"
    router.write_onnx(exported, {"features": features[:2]}, tmp_path)
    weights, lost = onnxruntime.InferenceSession(str(tmp_path / "router.onnx")).run(
        None, {"features": features.numpy()}
    )
    torch.testing.assert_close(torch.tensor(weights), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(lost), torch.zeros(200) if left is None else left, atol=1e-5, rtol=1e-4)


def test_runs_with_experts_added_merged_and_dropped_are_exported_end_to_end(
    by_answers: Path, tmp_path: Path, elsewhere: Callable[..., Any]
) -> None:
    pytest.importorskip("onnxruntime")
    rows = [{"instruction": f"date date number {i}.", "response": "DDDD", "category": "date"} for i in range(24)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sm.add_expert(by_answers, data=str(tmp_path / "new.jsonl"), out=tmp_path / "added", steps=1)
    sm.merge_experts(tmp_path / "added", first="apple", second="cherry", out=tmp_path / "merged", steps=0)
    sm.drop_expert(tmp_path / "added", name="banana", out=tmp_path / "dropped")
    for name in ("added", "merged", "dropped"):
        run, out = sm.load_run(tmp_path / name), tmp_path / f"router of {name}"
        found = sm.export(run=run.path, format="router", out=out)
        assert found["experts"] == run.experts and found["same"] == found["texts"]
        routed = elsewhere(ROUTE, str(out), json.dumps(TEXTS))
        for text, got in zip(TEXTS, routed, strict=True):
            wanted = run.gate(text)
            assert got["weights"] == pytest.approx(wanted, abs=1e-4), text
            assert got["left_to_base"] == pytest.approx(1 - sum(wanted.values()), abs=1e-4)
        assert {text: each["expert"] for text, each in zip(TEXTS, routed, strict=True)}[TEXTS[3]] == "date"


@pytest.mark.parametrize("cut", ["", " | trim", ".lstrip()", ".rstrip()"])
def test_a_text_outside_the_run_is_read_as_its_template_writes_it(tmp_path: Path, cut: str) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "cut.jinja"
    file.write_text("{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content" + cut + " }}\n{% else %}"
                    "A: {{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
                    "{% if add_generation_prompt %}A: {% endif %}")  # fmt: skip
    _, tokenizer = load_base("tiny")
    template = Template.of(str(file), tokenizer)
    read = runpy.run_path(str(Path(export.__file__).with_name("alone") / "route.py"))["Reader"]
    reader = read(export._frame(template, whole=False), tokenizer.backend_tokenizer)
    for text in ("Count up to 7 now!", "  Count up to 7 now! \n", "\n\nWhich animal?", "Which?  "):
        (prompt,) = template.prompts([Example(text, "", "").turns()])
        assert reader(text) == {"input_ids": prompt.input_ids, "reads": [int(each) for each in prompt.gate_mask or []]}


def test_a_quantised_base_that_onnx_has_no_steps_for_is_told(
    by_answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> None:
        raise torch.onnx.OnnxExporterError("no decomposition of bitsandbytes.gemm_4bit")

    monkeypatch.setattr(router, "check_installed", lambda: None)
    monkeypatch.setattr(router, "write_onnx", failing)
    with pytest.raises(torch.onnx.OnnxExporterError):
        sm.export(run=by_answers, format="router", out=tmp_path / "dense")
    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
    with pytest.raises(
        sm.RunError, match=r"is quantised, by steps that ONNX does not have: train on the base as it was"
    ):
        sm.export(run=by_answers, format="router", out=tmp_path / "quantised")
    assert not (tmp_path / "quantised").exists()


def test_the_page_says_which_experts_no_text_is_sent_to_and_when_weights_do_not_sum_to_one() -> None:
    found = {"base": "tiny", "experts": ["apple", "terse"], "texts": 4, "same": 4, "largest_difference": 1e-7}
    about = {"by_name": ["terse"], "sum_to_one": True}
    page = pages.router_page(found, about)
    assert "`terse` answers by name only, so its weight is always 0" in page and "which sum to one" in page
    page = pages.router_page(found, {"by_name": [], "sum_to_one": False})
    assert "by name only" not in page and "which sum to one or less" in page
