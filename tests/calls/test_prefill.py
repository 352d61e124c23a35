"""The first pass of `generate` without padding against the same pass with it. Every way of decoding: test_generation.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapted import adapt
from smartmops import MoPsConfig
from smartmops.calls import prefill
from tiny_models import KERNELS, build, relative

REAL = [4, 7, 2, 12]  # tokens of each row


def padded() -> dict[str, torch.Tensor]:
    mask = torch.arange(max(REAL)) >= max(REAL) - torch.tensor(REAL)[:, None]
    ids = torch.randint(3, 300, mask.shape, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@contextmanager
def tokens_of_layers(model, layer: int = 0) -> Iterator[list[int]]:
    """How many tokens each pass hands to a decoder layer."""
    seen: list[int] = []
    backbone = getattr(model, "base_model", model).model
    engine = backbone.mops_engine
    handle = engine.layers[layer].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


def scores(model, **options) -> torch.Tensor:
    """Logits of two new tokens."""
    out = model.generate(
        max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(out.logits)


OPTIONS = {
    "attention": {},
    "recovery": dict(num_recovery_prompts=2),
    "recovery below only": dict(num_recovery_prompts=2, keep_recovery_prompts=False),
    "hidden states": dict(gate_target="hidden_states", expert_attention="causal"),
    "sequence": dict(gate_input="sequence"),
    "top 1": dict(gate_top_k=1),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_real_tokens_alone_give_the_logits_of_the_padded_pass(options, monkeypatch):
    _, model = adapt(**options)
    with tokens_of_layers(model) as seen:
        got = scores(model, **padded())
    gate = model.base_model.last_gate
    assert max(seen) == sum(REAL), "the first pass was padded, so this test shows nothing"
    monkeypatch.setattr(prefill, "PADDING", 1.0)
    with tokens_of_layers(model) as seen:
        want = scores(model, **padded())
    assert max(seen) == len(REAL) * max(REAL)
    assert relative(got, want) < 1e-5 and relative(gate, model.base_model.last_gate) < 1e-5
    assert got.shape == (2, len(REAL), 300)


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_every_architecture_gives_the_logits_of_the_padded_pass(name, kernel, monkeypatch):
    _, model = adapt(name, kernel)
    got = scores(model, **padded())
    monkeypatch.setattr(prefill, "PADDING", 1.0)
    assert relative(got, scores(model, **padded())) < 2e-5


def test_a_gate_mask_and_long_rows_keep_their_meaning(monkeypatch):
    _, model = adapt()
    inputs = padded()
    long = {name: torch.cat([x, x[:, -1:].expand(-1, 200)], 1) for name, x in inputs.items()}
    read = long["attention_mask"] * (torch.arange(long["input_ids"].shape[1]) % 3 != 0)
    got = scores(model, gate_mask=read, **long)
    gate = model.base_model.last_gate
    monkeypatch.setattr(prefill, "PADDING", 1.0)
    assert relative(got, scores(model, gate_mask=read, **long)) < 1e-5
    assert relative(gate, model.base_model.last_gate) < 1e-5


def right(inputs):
    return {name: x.flip(1) for name, x in inputs.items()}


PLAIN = {
    "padding on the right": right,
    "little padding": lambda inputs: inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])},
    "hidden states wanted": lambda inputs: inputs | dict(output_hidden_states=True),
    "attentions wanted": lambda inputs: inputs | dict(output_attentions=True),
    "no cache": lambda inputs: inputs | dict(use_cache=False),
    "a static cache": lambda inputs: inputs | dict(cache_implementation="static"),
    "positions of their own": lambda inputs: inputs | dict(position_ids=torch.arange(12).expand(4, -1)),
}


@pytest.mark.filterwarnings("ignore:.*padding_side")
@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_what_is_no_plain_case_stays_padded(change):
    _, model = adapt("llama", "eager")
    with tokens_of_layers(model) as seen:
        model.generate(max_new_tokens=1, **change(padded()))
    assert max(seen) == len(REAL) * max(REAL)


def test_a_forward_pass_outside_generate_stays_padded():
    _, model = adapt()
    with torch.no_grad(), tokens_of_layers(model) as seen:
        logits = model(use_cache=True, **padded()).logits
    assert max(seen) == logits.shape[:2].numel() == len(REAL) * max(REAL)


def test_an_adapter_underneath_sees_real_tokens_only(monkeypatch):
    lora = get_peft_model(build(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model = get_peft_model(lora, MoPsConfig(num_experts=3, prompts_per_expert=4, injection_layer=2)).eval()
    torch.nn.init.normal_(model.base_model.layer().mops_prompts["default"])
    widths: list[int] = []
    part = next(module for name, module in lora.named_modules() if name.endswith("lora_A.default"))
    part.register_forward_hook(lambda _, args, out: widths.append(out.shape[:-1].numel()))
    got = scores(model, **padded())
    assert max(widths) == sum(REAL)
    monkeypatch.setattr(prefill, "PADDING", 1.0)
    assert relative(got, scores(model, **padded())) < 1e-5


HEADER = [7, 11]
SHARED = dict(num_experts=3, prompts_per_expert=4, injection_layer=2, experts="keys_values")
ANSWERS = {
    "at the injection layer": dict(visible_to="answers", answer_header=HEADER),
    "above it": dict(visible_to="answers", answer_header=HEADER, gate_layer=4),
    "below it": dict(visible_to="answers", answer_header=HEADER, gate_layer=1),
    "no header": dict(visible_to="answers", gate_layer=4),
    "a softmax of their own": dict(visible_to="answers", answer_header=HEADER, prefix_attention="separate"),
    "the first token": dict(visible_to="answers", answer_header=HEADER, gate_layer=0, injection_layer=0),
}


def scattered(model) -> None:
    """Move every adapter's numbers far from where they start."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mops_" in name:
                parameter.add_(torch.randn_like(parameter) * (3 if "gate_out" in name else 1))


def answering(**options):
    """A model whose experts answers alone see, and prompts that end in the header of an answer."""
    model = get_peft_model(build(), MoPsConfig(**SHARED | options)).eval()
    scattered(model)
    inputs = padded()
    inputs["input_ids"][:, -2:] = torch.tensor(HEADER)
    return model, inputs


def twice(monkeypatch) -> None:
    """Let the gate read in a pass of its own, and the first pass be padded."""
    monkeypatch.setattr(prefill, "plain", lambda *_: False)


@pytest.mark.parametrize("options", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("padding", [True, False])
def test_where_answers_alone_see_experts_the_prompt_is_read_once(options, padding, monkeypatch):
    model, inputs = answering(**options)
    if not padding:
        inputs = {name: x[-1:].repeat(3, 1) for name, x in inputs.items()}
        inputs["input_ids"][:, 0] += torch.arange(3)
    with tokens_of_layers(model) as seen:
        got = scores(model, **inputs)
    gate, rows = model.base_model.last_gate, len(inputs["input_ids"])
    again = rows * (len(HEADER) if "answer_header" in options else 1)
    assert seen[:2] == [int(inputs["attention_mask"].sum()), again]
    twice(monkeypatch)
    with tokens_of_layers(model) as seen:
        want = scores(model, **inputs)
    assert seen[1 if options.get("gate_layer", 2) else 0] == inputs["input_ids"].numel()
    assert relative(got, want) < 1e-5 and relative(gate, model.base_model.last_gate) < 1e-5
    assert gate.std(0).max() > 0.01 or not padding, "every row has the same gate, so this test shows little"


ROWS = {"one question": [3, 3, 3], "two questions": [2, 0, 0, 2, 0], "padded differently": [1, 3, 0, 1]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", ANSWERS.values(), ids=ANSWERS)
def test_the_same_question_is_read_once_however_often_it_is_asked(options, rows, monkeypatch):
    model, inputs = answering(**options)
    lengths, inputs = [REAL[row] for row in dict.fromkeys(rows)], {name: x[rows] for name, x in inputs.items()}
    scores(model, **inputs)
    told = torch.full((len(rows), 3), float("nan"))
    told[0] = torch.eye(3)[model.base_model.last_gate[0].argmin()]  # the same question, answered by another expert
    with tokens_of_layers(model) as seen:
        got = scores(model, gate_weights=told, **inputs)
    full = sum(lengths) > (1 - prefill.PADDING) * len(lengths) * inputs["input_ids"].shape[1]
    assert seen[0] == (len(lengths) * inputs["input_ids"].shape[1] if full else sum(lengths))
    assert relative(got[0, 0], got[0, rows.index(rows[0], 1)]) > 1e-3, "another expert answers otherwise"
    twice(monkeypatch)
    assert relative(got, scores(model, gate_weights=told, **inputs)) < 1e-5


@pytest.mark.parametrize(
    "how", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)], ids=["beams", "sampled"]
)
def test_beams_and_several_answers_read_their_prompt_once(how):
    model, inputs = answering(**ANSWERS["above it"])
    one = {name: x[-1:] for name, x in inputs.items()}
    with tokens_of_layers(model) as seen:
        model.generate(**one, max_new_tokens=2, min_new_tokens=2, **how)
    assert seen == [REAL[-1], 3 * len(HEADER), 3]


def test_one_question_to_several_adapters_is_read_once(monkeypatch):
    names = ["a", "b", "__base__", "a"]
    model = get_peft_model(build(), MoPsConfig(**SHARED | ANSWERS["above it"]), adapter_name="a")
    model.add_adapter("b", MoPsConfig(**SHARED | ANSWERS["below it"] | dict(num_experts=5, injection_layer=3)))
    scattered(model.eval())
    _, inputs = answering(**ANSWERS["above it"])
    inputs = {name: x[[3, 3, 3, 0]] for name, x in inputs.items()}
    with tokens_of_layers(model) as seen:
        got = scores(model, adapter_names=names, **inputs)
    assert seen[0] == REAL[3] + REAL[0]
    twice(monkeypatch)
    assert relative(got, scores(model, adapter_names=names, **inputs)) < 1e-5


ALONE = ANSWERS | {
    "linear": dict(visible_to="answers", answer_header=HEADER, gate_layer=4, prefix_attention="linear"),
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_one_prompt_goes_again_only_through_layers_between_experts_and_gate(options, monkeypatch):
    model, inputs = answering(**options)
    one, header = {name: x[-1:] for name, x in inputs.items()}, len(HEADER) if "answer_header" in options else 1
    experts, gate = (options.get(name, 2) for name in ("injection_layer", "gate_layer"))
    for layer in (0, 2, 3, 4, 5):
        with tokens_of_layers(model, layer) as seen:
            got = scores(model, **one)
        assert seen == [REAL[-1], header, 1][:: 1 if experts <= layer < gate else 2]
    twice(monkeypatch)
    assert relative(got, scores(model, **one)) < 1e-5


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_one_prompt_of_every_architecture(name, kernel, monkeypatch):
    model = get_peft_model(build(name, kernel), MoPsConfig(**SHARED | ANSWERS["above it"])).eval()
    scattered(model)
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(5))
    ids[:, -2:] = torch.tensor(HEADER)
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got = scores(model, **one)
    twice(monkeypatch)
    assert relative(got, scores(model, **one)) < 1e-5


@pytest.mark.parametrize("names", [["a", "b", "__base__", "a"], ["b", "b", "__base__", "__base__"], ["__base__"] * 4])
def test_rows_of_several_adapters_are_read_once_too(names, monkeypatch):
    model, inputs = answering(**ANSWERS["above it"])
    model = get_peft_model(build(), MoPsConfig(**SHARED | ANSWERS["above it"]), adapter_name="a")
    model.add_adapter("b", MoPsConfig(**SHARED | ANSWERS["below it"] | dict(num_experts=5, injection_layer=3)))
    scattered(model.eval())
    with tokens_of_layers(model) as seen:
        got = scores(model, adapter_names=names, **inputs)
    assert seen[0] == sum(REAL) and (seen[1] == len(REAL) * len(HEADER)) == (set(names) != {"__base__"})
    twice(monkeypatch)
    assert relative(got, scores(model, adapter_names=names, **inputs)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_left_to_the_base_has_its_logits_bit_for_bit(dtype):
    model, inputs = answering(**ANSWERS["above it"], null_expert=True)
    model.to(dtype)
    model.base_model.layer().configs["default"].null_threshold = 0.0  # all is left to the base
    one = {name: x[-1:] for name, x in inputs.items()}
    got = scores(model, **one)
    assert float(model.base_model.last_null) == 1
    with model.disable_adapter():
        assert torch.equal(got, scores(model, **one))


def test_rows_that_are_told_who_answers_are_read_once_too(monkeypatch):
    model, inputs = answering(**ANSWERS["above it"])
    told = torch.tensor([[0.0, 1.0, 0.0], [float("nan")] * 3, [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    got = scores(model, gate_weights=told, **inputs)
    twice(monkeypatch)
    assert relative(got, scores(model, gate_weights=told, **inputs)) < 1e-5


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("options", [{}, ANSWERS["above it"]], ids=["all see experts", "answers see experts"])
def test_in_16_bits_the_head_gets_last_tokens_as_one_block(rows, options):
    """A slice of all tokens has every other token's memory between its rows."""
    model, inputs = answering(**options)
    model.to(torch.bfloat16)
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    full = {name: x[-1:].expand(rows, -1) for name, x in inputs.items()}
    model.generate(**full, max_new_tokens=2, min_new_tokens=2)
    width = model.get_input_embeddings().embedding_dim
    assert len(seen) >= 2 and {each[:-1] for each in seen} <= {(width, width), (rows * width, width)}
