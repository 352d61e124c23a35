"""Experts that are keys and values: against the method by hand, and against themselves by every other road."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from adapted import null_of, open_a_null_expert
from by_hand import Prompts, gate_weights, null_weight
from by_hand_kv import Seen, logits, pooled
from smartmops import MoPsConfig
from tiny_models import LAYERS, VOCABULARY, build, relative

HEADER = [7, 8]
TOLERANCE = 1e-5
PARAMETER = "base_model.model.model.layers.2.mops_values.default"
OPTIONS = dict(num_experts=3, prompts_per_expert=4, injection_layer=2, gate_hidden_size=8, gate_bias=True,
               experts="keys_values", answer_header=HEADER, gate_reads="own", task_type="CAUSAL_LM")  # fmt: skip
WAYS = {
    "joint": {},
    "shared": dict(shared_prompts=3),
    "separate": dict(prefix_attention="separate", shared_prompts=2),
    "linear": dict(prefix_attention="linear"),
    "answers": dict(visible_to="answers", shared_prompts=2),
    "answers, from the first layer": dict(visible_to="answers", injection_layer=0, gate_layer=3),
    "answers, separate": dict(visible_to="answers", prefix_attention="separate", gate_layer=4),
    "answers, linear": dict(visible_to="answers", prefix_attention="linear", gate_layer=1),
    "gate above": dict(gate_layer=5),
    "top-k": dict(gate_top_k=2, shared_prompts=1),
    "null expert": dict(null_expert=True, shared_prompts=1),
    "null expert, separate": dict(null_expert=True, prefix_attention="separate", shared_prompts=1),
    "null expert, linear": dict(null_expert=True, prefix_attention="linear"),
    "null expert, answers, top-k": dict(null_expert=True, visible_to="answers", gate_top_k=2),
    "one gate weight per prompt": dict(gate_granularity="prompt"),
}
EVERY = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


def adapt(name="llama", kernel="sdpa", **options):
    """A frozen model, and an equal one whose adapter is far from its initial values."""
    plain, base = build(name, kernel), build(name, kernel)
    model = get_peft_model(base, MoPsConfig(**OPTIONS | options)).eval()
    scramble(model, plain)
    return plain, model


@torch.no_grad()
def scramble(model, plain, adapter="default", seed=0):
    layer = model.base_model.layer(adapter)
    config = layer.configs[adapter]
    torch.manual_seed(seed)
    for name in layer.adapter_layer_names:
        for parameter in (p for n, p in getattr(layer, name).items() if n == adapter):
            parameter.copy_(torch.randn(parameter.shape))
    layer.mops_gate_in[adapter].mul_(1 / 8)
    inputs = question()
    at = layer.index if config.gate_layer is None else config.gate_layer
    seen = pooled(plain, at, inputs["input_ids"], inputs["attention_mask"], inputs["gate_mask"])
    layer.mops_gate_mean[adapter].copy_(seen.mean(0))
    layer.mops_gate_scale[adapter].copy_(seen.std(0) + seen.std() / 4)
    if config.null_expert:
        open_a_null_expert(null_of(layer, adapter), layer.standardised(seen, adapter))


def question() -> dict:
    """Three rows of 12 tokens: an instruction, the header, an answer; of different lengths, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    ids[:, 7:9] = torch.tensor(HEADER)
    gate_mask = mask * (torch.arange(12) < 7)
    return {"input_ids": ids * mask, "attention_mask": mask, "gate_mask": gate_mask}


def what_is_seen(plain, model, inputs, adapter="default") -> Seen:
    """What the gate of `model` opens for these rows, computed from its parameters by hand."""
    layer = model.base_model.layer(adapter)
    config = layer.configs[adapter]
    own = {name: getattr(layer, f"mops_{name}")[adapter].detach() for name in (
        "keys", "values", "key_size", "value_size", "gate_in", "gate_out", "gate_bias", "gate_mean", "gate_scale")}  # fmt: skip
    gate = Prompts(None, *(own[f"gate_{name}"] for name in ("in", "out", "mean", "scale")), None,
                   gate_bias=own["gate_bias"], null=null_of(layer, adapter))  # fmt: skip
    at = layer.index if config.gate_layer is None else config.gate_layer
    a = pooled(plain, at, inputs["input_ids"], inputs["attention_mask"], inputs["gate_mask"])
    weights, left = gate_weights(config, gate, a), 1 - null_weight(config, gate, a)
    bias = (weights * weights.shape[1]).log().clamp(min=-1e30).repeat_interleave(12 // weights.shape[1], -1)
    keys, values = own["keys"], own["values"]
    if config.shared_prompts:
        keys = torch.cat([keys, layer.mops_shared_keys[adapter].detach()])
        values = torch.cat([values, layer.mops_shared_values[adapter].detach()])
        bias = torch.cat([bias, left.log().clamp(min=-1e30)[:, None].expand(-1, config.shared_prompts)], -1)
    sees = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if config.visible_to == "answers":
        sees = torch.arange(sees.shape[1]).expand_as(sees) >= 7
    heads = layer.mops_head_weight[adapter].detach() if config.prefix_attention == "separate" else None
    shape = (None, slice(None), None, None)
    return Seen(layer.index, keys * own["key_size"][shape], values * own["value_size"][shape], bias,
                config.prefix_attention, left, sees, heads)  # fmt: skip


@EVERY
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_are_those_by_hand(options, kernel):
    plain, model = adapt("llama", kernel, **options)
    inputs = question()
    seen = what_is_seen(plain, model, inputs)
    want = logits(plain, seen, inputs["input_ids"], inputs["attention_mask"])
    got = model(**inputs).logits
    assert relative(got, want, inputs["attention_mask"]) < TOLERANCE
    without = logits(plain, None, inputs["input_ids"], inputs["attention_mask"])
    assert relative(want[:, 7:], without[:, 7:]) > 1e-2  # the reference feels the experts


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2", "qwen3", "gpt_neox", "gpt2", "phi", "phi3", "gemma",
                                  "gemma3_text", "olmo2", "smollm3", "stablelm"])  # fmt: skip
@torch.no_grad()
def test_every_architecture_takes_them(name):
    for options in (dict(shared_prompts=2), dict(visible_to="answers", gate_layer=4)):
        plain, model = adapt(name, **options)
        inputs = question()
        want = logits(plain, what_is_seen(plain, model, inputs), inputs["input_ids"], inputs["attention_mask"])
        assert relative(model(**inputs).logits, want, inputs["attention_mask"]) < 2 * TOLERANCE


def test_a_model_that_scales_embeddings_trains_from_states_as_from_whole_rows():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=300,
                 embedding_multiplier=3.0, pad_token_id=0)  # fmt: skip
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **shape)).eval()
    for options in ({}, dict(visible_to="answers", gate_layer=4)):
        model = get_peft_model(base, MoPsConfig(**OPTIONS | options)).eval()
        inputs = labelled()
        padded, packed = gradients(model, **inputs), gradients(model, packed=end_to_end(inputs))
        assert relative(packed[0], padded[0]) < TOLERANCE
        assert relative(packed[1][PARAMETER], padded[1][PARAMETER]) < 5 * TOLERANCE
        base = model.base_model.unload()


@EVERY
@torch.no_grad()
def test_a_closed_gate_is_the_base_bit_for_bit(options):
    plain, model = adapt(**options)
    model.base_model.layer().configs["default"].null_threshold = 0.0
    inputs = question()
    want = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                 position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits  # fmt: skip
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("options", [{}, dict(visible_to="answers"), dict(prefix_attention="separate")], ids=str)
@torch.no_grad()
def test_rows_left_to_the_base_are_the_bases_own_in_a_batch_with_others(options):
    plain, model = adapt(**dict(null_expert=True) | options)
    layer, inputs = model.base_model.layer(), question()
    at = layer.index
    seen = pooled(plain, at, inputs["input_ids"], inputs["attention_mask"], inputs["gate_mask"])
    features = layer.standardised(seen, "default")
    basis = layer.mops_null_basis["default"]
    basis.copy_(torch.randn(basis.shape) / 8)
    layer.mops_null_centres["default"].copy_(features[:1] @ basis.T)
    layer.mops_null_cut["default"].copy_(torch.tensor([0.0, 50.0, torch.inf]))
    got = model(**inputs)
    want = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                 position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits  # fmt: skip
    assert model.base_model.last_gate.sum(-1).tolist() == [pytest.approx(1), 0, 0]
    assert torch.equal(got.logits[1:], want[1:])
    full = logits(plain, what_is_seen(plain, model, inputs), inputs["input_ids"], inputs["attention_mask"])
    assert relative(got.logits[0], full[0], inputs["attention_mask"][0]) < TOLERANCE


@EVERY
@torch.no_grad()
def test_decoding_step_by_step_is_one_pass(options):
    plain, model = adapt(**options)
    inputs = question()
    want = logits(plain, what_is_seen(plain, model, inputs), inputs["input_ids"], inputs["attention_mask"])
    cache, got = DynamicCache(config=model.config), []
    for start, end in [(0, 9), (9, 10), (10, 12)]:
        mask = {"gate_mask": inputs["gate_mask"][:, :9]} if start == 0 else {}
        got.append(model(input_ids=inputs["input_ids"][:, start:end], attention_mask=inputs["attention_mask"][:, :end],
                         past_key_values=cache, use_cache=True, **mask).logits)  # fmt: skip
        cache = copy.deepcopy(cache)  # a copy goes on as the original would
    assert relative(torch.cat(got, 1), want, inputs["attention_mask"]) < TOLERANCE


@torch.no_grad()
def test_an_instruction_that_sees_no_experts_leaves_the_bases_own_cache():
    plain, model = adapt(visible_to="answers")
    inputs = {name: value[:, :9] for name, value in question().items()}
    ours, bare = DynamicCache(config=model.config), DynamicCache(config=plain.config)
    model(**inputs, past_key_values=ours, use_cache=True)
    inputs.pop("gate_mask")
    at = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    plain(**inputs, position_ids=at, past_key_values=bare, use_cache=True)
    for mine, theirs in zip(ours.layers, bare.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :7], theirs.keys[:, :, :7])
        assert torch.equal(mine.values[:, :, :7], theirs.values[:, :, :7])
    assert not torch.equal(ours.layers[-1].keys[:, :, 7:], bare.layers[-1].keys[:, :, 7:])


def labelled() -> dict:
    inputs = question()
    gate_mask = inputs["gate_mask"]
    answers = (torch.arange(12) >= 9) & inputs["attention_mask"].bool()
    return inputs | {"labels": inputs["input_ids"].masked_fill(~answers, -100), "gate_mask": gate_mask}


def end_to_end(inputs) -> dict:
    real = inputs["attention_mask"].bool()
    return {"input_ids": inputs["input_ids"][real], "labels": inputs["labels"][real], "lengths": real.sum(-1),
            "gate_mask": inputs["gate_mask"][real].bool(), "headers": torch.full((3,), 2)}  # fmt: skip


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@EVERY
def test_packed_loss_and_gradients_are_those_by_hand(options):
    plain, model = adapt(**options)
    inputs = labelled()
    with torch.no_grad():
        want = logits(plain, what_is_seen(plain, model, inputs), inputs["input_ids"], inputs["attention_mask"])
    loss = cross_entropy(want[:, :-1].reshape(-1, VOCABULARY), inputs["labels"][:, 1:].reshape(-1))
    padded, packed = gradients(model, **inputs), gradients(model, packed=end_to_end(inputs))
    assert relative(padded[0], loss) < TOLERANCE and relative(packed[0], loss) < TOLERANCE
    assert len(packed[1]) >= 5
    for name, gradient in packed[1].items():
        assert gradient.abs().max() > 0, name
        assert relative(gradient, padded[1][name]) < 5 * TOLERANCE, name
    with torch.no_grad():
        nats = model.base_model.nats(end_to_end(inputs))
    assert relative(nats.sum() / (nats != 0).sum(), loss) < TOLERANCE


@pytest.mark.parametrize("options", [{}, dict(visible_to="answers", gate_layer=4, shared_prompts=2)], ids=str)
def test_experts_can_change_places(options):
    _, model = adapt(**options)
    layer, inputs, order = model.base_model.layer(), question(), [2, 0, 1]
    with torch.no_grad():
        before = model(**inputs).logits
        for name in ("mops_keys", "mops_values"):
            parameter = getattr(layer, name)["default"]
            parameter.copy_(parameter.view(3, 4, *parameter.shape[1:])[order].reshape(parameter.shape))
        for name in ("mops_gate_out", "mops_gate_bias"):
            parameter = getattr(layer, name)["default"]
            parameter.copy_(parameter[order])
        assert relative(model(**inputs).logits, before) < TOLERANCE


@EVERY
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(options, tmp_path):
    _, model = adapt(**dict(null_expert=True) | options)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(again(**question()).logits, model(**question()).logits)


def test_separate_columns_start_exactly_at_the_base():
    model = get_peft_model(build(), MoPsConfig(**OPTIONS | dict(prefix_attention="separate"))).eval()
    with torch.no_grad():
        got = model(**question()).logits
        with model.disable_adapter():
            want = model(**{name: value for name, value in question().items() if name != "gate_mask"}).logits
    assert relative(got, want) < 1e-6


GENERATE = {
    "greedy": {},
    "without cache": dict(use_cache=False),
    "beams": dict(num_beams=3),
    "several beams": dict(num_beams=4, num_return_sequences=2),
    "sampled twice": dict(do_sample=True, num_return_sequences=2),
    "static cache": dict(cache_implementation="static"),
}


@pytest.mark.parametrize("way", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("options", [{}, dict(visible_to="answers", gate_layer=4, shared_prompts=2),
                                     dict(prefix_attention="separate"), dict(gate_top_k=1)], ids=str)  # fmt: skip
def test_generated_tokens_are_those_of_whole_passes(options, way):
    plain, model = adapt(**options)
    inputs = {name: value[:, :9] for name, value in question().items()}
    torch.manual_seed(0)
    got = model.generate(**inputs, max_new_tokens=6, eos_token_id=None, pad_token_id=0, **way)
    torch.manual_seed(0)
    want = model.generate(**inputs, max_new_tokens=6, eos_token_id=None, pad_token_id=0, **way | {"use_cache": False,
                          "cache_implementation": None})  # fmt: skip
    assert torch.equal(got, want)
    if not way:  # and every token is the likeliest by hand
        ids = inputs["input_ids"]
        mask, read = inputs["attention_mask"], inputs["gate_mask"]
        for _ in range(6):
            whole = {"input_ids": ids, "attention_mask": mask, "gate_mask": read}
            with torch.no_grad():
                step = logits(plain, what_is_seen(plain, model, whole), ids, mask)[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
            read = torch.cat([read, torch.zeros_like(step)], 1)
        assert torch.equal(got, ids)


@pytest.mark.parametrize("options", [{}, dict(visible_to="answers", gate_layer=4)], ids=str)
def test_six_threads_get_what_each_gets_alone(options):
    _, model = adapt(**options)
    prompts = [
        torch.cat([torch.randint(10, VOCABULARY, (1, n)), torch.tensor([HEADER])], 1) for n in (5, 9, 13, 17, 21, 25)
    ]

    def answer(ids):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip

    alone, together = [answer(ids) for ids in prompts], [None] * 6
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, answer(prompts[i]))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_gate_never_moves_with_what_comes_after_the_header():
    _, model = adapt(visible_to="answers", gate_layer=4)
    inputs = labelled()
    inputs.pop("gate_mask")
    gates = []
    for token in (20, 30):
        inputs["input_ids"][:, 9:] = token
        with torch.no_grad():
            model(**inputs)
        gates.append(model.base_model.last_gate)
    assert torch.equal(*gates)


@pytest.mark.parametrize("kind", ["keys_values", "hidden_states"])
def test_a_frozen_first_column_gets_no_gradient_and_changes_nothing_else(kind):
    of = {}
    for frozen in (False, True):
        _, model = adapt(experts=kind, freeze_first_column=frozen)
        out = model(**labelled())
        out.loss.backward()
        names = ("mops_keys", "mops_values") if kind == "keys_values" else ("mops_prompts",)
        layer = model.base_model.layer()
        of[frozen] = out.loss.detach(), [getattr(layer, name)["default"].grad.unflatten(0, (3, 4)) for name in names]
    assert torch.equal(of[False][0], of[True][0])
    for free, held in zip(of[False][1], of[True][1], strict=True):
        assert torch.equal(held[:, 1:], free[:, 1:])
        assert not held[:, 0].any() and free[:, 0].any()


@EVERY
@torch.no_grad()
def test_in_bfloat16_logits_are_within_three_percent(options):
    _, model = adapt(**options)
    inputs = question()
    want = model(**inputs).logits
    got = model.bfloat16()(**inputs).logits
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), want, inputs["attention_mask"]) < 3e-2  # bfloat16 keeps 8 bits: 0.4 % a product


def test_settings_that_cannot_be_are_refused_with_their_way_out():
    for options, words in (
        (dict(freeze_first_column=True, prompts_per_expert=1), "leaves no prompt to train"),
        (dict(gate_target="hidden_states"), "choose gate_target='attention'"),
        (dict(shared_prompts=-1), "choose 0 or more"),
        (dict(experts="hidden_states", visible_to="answers"), "needs experts='keys_values'"),
        (dict(experts="hidden_states", prefix_attention="linear"), "needs experts='keys_values'"),
        (dict(gate_layer=LAYERS + 1), f"this model has {LAYERS} layers"),
        (dict(visible_to="answers", num_recovery_prompts=2), "num_recovery_prompts"),
    ):
        with pytest.raises(ValueError, match=words):
            get_peft_model(build(), MoPsConfig(**OPTIONS | options))


@pytest.mark.parametrize("name", ["shared_prompts", "prompts_per_expert"])
def test_more_columns_than_positions_are_refused(name):
    base = build(max_position_embeddings=64)
    with pytest.raises(ValueError, match=f"{name}=65, but this model has 64 positions: choose 64 at most"):
        get_peft_model(base, MoPsConfig(**OPTIONS | {name: 65}))
