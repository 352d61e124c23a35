"""Bad input: the message names the value, the limit and the way out."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from adapted import ADAPTER, adapt, prompts_of
from by_hand import by_hand
from smartmops import MoPsConfig
from tiny_models import batch, build, relative

OPTIONS = [
    (dict(num_experts=0), "num_experts=0: choose 1 or more"),
    (dict(prompts_per_expert=0), "prompts_per_expert=0: choose 1 or more"),
    (dict(gate_hidden_size=0), "gate_hidden_size=0: choose 1 or more"),
    (dict(num_recovery_prompts=-1), "num_recovery_prompts=-1: choose 0 or more"),
    (dict(gate_temperature=0.0), "gate_temperature=0.0: choose a number above 0"),
    (dict(gate_temperature=float("nan")), "gate_temperature=nan: choose a number above 0"),
    (dict(num_experts=3, gate_top_k=0), "gate_top_k=0, .* choose 1 to 3"),
    (dict(num_experts=3, gate_top_k=4), "gate_top_k=4, .* choose 1 to 3"),
    (dict(gate_target="values"), "gate_target='values': choose 'attention' or 'hidden_states'"),
    (dict(gate_input="response"), "gate_input='response': choose 'instruction' or 'sequence'"),
    (dict(gate_granularity="layer"), "gate_granularity='layer': choose 'expert' or 'prompt'"),
    (dict(expert_attention="full"), "expert_attention='full': choose 'isolated' or 'causal'"),
    (dict(init="zeros"), "init='zeros': choose 'hidden_states' or 'random'"),
    (dict(num_experts=3, expert_names=["a"]), "1 expert_names for num_experts=3"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_options_outside_their_limits(options, message):
    with pytest.raises(ValueError, match=message):
        MoPsConfig(**options)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="num_expert"):
        MoPsConfig(num_expert=7)


@pytest.mark.parametrize("layer", [-1, 6, 40])
def test_an_injection_layer_the_model_does_not_have(layer):
    message = f"injection_layer={layer}, but this model has 6 layers: choose 0 to 5"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(build(), MoPsConfig(**ADAPTER | dict(injection_layer=layer)))


def small(name: str, **options):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=300, **options))


FOREIGN = {
    "bloom": lambda: small("bloom", hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: small("mpt", d_model=64, n_layers=2, n_heads=4),
    "falcon": lambda: small("falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "falcon with alibi": lambda: small(
        "falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "gptj": lambda: small("gptj", n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
    "ctrl": lambda: small("ctrl", n_embd=64, dff=64, n_layer=2, n_head=4),
    "mamba": lambda: small("mamba", hidden_size=64, num_hidden_layers=2),
    "bert": lambda: small("bert", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, is_decoder=True),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_architectures_that_cannot_carry_the_method(make):
    model = make()
    name = type(model).__name__.split("For")[0].removesuffix("LMHeadModel")
    with pytest.raises(ValueError, match=rf"{name}.*choose (a|an)(other| decoder-only)? architecture"):
        get_peft_model(model, MoPsConfig(num_experts=2, prompts_per_expert=2, injection_layer=1))


SHAPE = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=300)
NO_LANGUAGE_MODEL = {
    "sequence classifier": (lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE)), "no head that predicts"),
    "token classifier": (lambda: LlamaForTokenClassification(LlamaConfig(**SHAPE)), "no head that predicts"),
    "backbone": (lambda: LlamaModel(LlamaConfig(**SHAPE)), "no head that predicts"),
    "backbone of GPT-2": (lambda: GPT2Model(GPT2Config(n_embd=64, n_layer=3, n_head=4)), "no head that predicts"),
    "plain torch": (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), "Sequential is no model of transformers"),
    "nothing inside": (lambda: torch.nn.Identity(), "Identity is no model of transformers"),
}


@pytest.mark.parametrize(("make", "words"), NO_LANGUAGE_MODEL.values(), ids=NO_LANGUAGE_MODEL)
@pytest.mark.parametrize("experts", ["hidden_states", "keys_values"])
def test_what_is_no_causal_language_model(make, words, experts):
    with pytest.raises(ValueError, match=rf"{words}.*AutoModelForCausalLM"):
        get_peft_model(make(), MoPsConfig(num_experts=2, prompts_per_expert=2, injection_layer=1, experts=experts))


MIXED = {
    "lfm2": (dict(layer_types=["conv", "full_attention"]), "Lfm2ShortConv"),
    "qwen3_next": (dict(layer_types=["linear_attention", "full_attention"]), "Qwen3NextGatedDeltaNet"),
    "mamba": ({}, "MambaMixer"),
}


@pytest.mark.parametrize(("name", "options", "mixer"), [(n, *each) for n, each in MIXED.items()], ids=MIXED)
def test_layers_without_attention_are_named(name, options, mixer):
    model = small(name, hidden_size=64, num_hidden_layers=2, **options)
    with pytest.raises(ValueError, match=rf"layer 0, a .*, mixes tokens by {mixer}, not by attention"):
        get_peft_model(model, MoPsConfig(num_experts=2, prompts_per_expert=2, injection_layer=1))


def test_an_encoder_decoder():
    config = AutoConfig.for_model("t5", d_model=64, d_ff=64, d_kv=16, num_layers=2, num_heads=4, vocab_size=300)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*decoder-only"):
        get_peft_model(model, MoPsConfig(**ADAPTER))


def test_an_architecture_that_scales_its_embeddings_is_exact():
    """Granite multiplies whatever embeddings it is handed: prompts and the upper half must not be multiplied again."""
    shape = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, embedding_multiplier=3.0
    )
    plain, base = (scaled_granite(shape) for _ in range(2))
    model = get_peft_model(base, MoPsConfig(**ADAPTER)).eval()
    with torch.no_grad():
        want = by_hand(plain, model.peft_config["default"], prompts_of(model), **batch())
        assert relative(model(**batch()).logits, want.logits, batch()["attention_mask"]) < 1e-5


def scaled_granite(shape):
    torch.manual_seed(0)
    return small("granite", **shape).eval()


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_kernels_that_cannot_carry_a_bias_per_row(kernel):
    model = build()
    model.config._attn_implementation_internal = (
        kernel  # as if loaded so: the kernels themselves are not installed here
    )
    with pytest.raises(ValueError, match=rf"{kernel}.*sdpa.*eager"):
        get_peft_model(model, MoPsConfig(**ADAPTER))


def test_a_refusal_leaves_the_model_as_it_was():
    model, plain = build(), build()
    with pytest.raises(ValueError, match="injection_layer"):
        get_peft_model(model, MoPsConfig(**ADAPTER | dict(injection_layer=9)))
    rows = {name: value for name, value in batch().items() if name != "gate_mask"}
    with torch.no_grad():
        assert torch.equal(model(**rows).logits, plain(**rows).logits)
    fine = get_peft_model(model, MoPsConfig(**ADAPTER))
    assert fine(**batch()).logits.shape == (3, 11, 300)


BASES = [
    (dict(hidden_size=32), "hidden size 64, but this model has 32"),
    (dict(num_hidden_layers=8), "number of layers 6, but this model has 8"),
    (dict(num_hidden_layers=2), "number of layers 6, but this model has 2"),
]


@pytest.mark.parametrize(("changes", "message"), BASES, ids=[str(changes) for changes, _ in BASES])
def test_an_adapter_of_another_base_model(tmp_path, changes, message):
    adapt()[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build(**changes), tmp_path)


def test_packed_rows():
    _, model = adapt()
    ids = torch.randint(3, 300, (1, 10))
    restart = torch.cat([torch.arange(6), torch.arange(4)])[None]
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(ValueError, match=r"position_ids restart.*packing"):
            model(input_ids=ids, attention_mask=mask, position_ids=restart)
    with torch.no_grad():  # positions that start anew after padding are no packing
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        model(input_ids=ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5, 6]]))


def test_rows_that_begin_inside_an_answer_and_hold_a_later_one():
    _, model = adapt()
    ids = torch.arange(10, 22)[None]
    labels = ids.clone()
    labels[0, 4:8] = -100
    with pytest.raises(ValueError, match=r"row 0 begins inside an answer.*packed.*packing off"):
        model(input_ids=ids, labels=labels)
    labels[0, :2] = -100
    with pytest.warns(UserWarning, match="hold several answers"):  # a chat of two turns looks the same
        model(input_ids=ids, labels=labels)


@pytest.mark.parametrize(("arguments", "training", "packs"), [
    (dict(packing=True), True, True), (dict(packing=False), True, False), (dict(packing=True), False, True),
    (dict(packing=True, eval_packing=False), False, False), (dict(packing=False, eval_packing=True), False, True),
])  # fmt: skip
def test_a_trainer_that_packs_without_positions(arguments, training, packs):
    """As TRL does under packing_strategy="wrapped": the batch holds nothing by which to know it."""
    _, model = adapt()
    ids = torch.arange(10, 22)[None]

    class Trainer:
        args = SimpleNamespace(**arguments)

        def training_step(self):
            return model.train(training)(input_ids=ids, labels=ids.masked_fill(ids < 15, -100))

    if packs:
        with pytest.raises(ValueError, match=r"packing=True.*packed"):
            Trainer().training_step()
    else:
        Trainer().training_step()


def test_chunked_prefill():
    _, model = adapt()
    ids = batch()["input_ids"][1:2]
    with pytest.raises(ValueError, match=r"prefill_chunk_size=4.*leave it unset"):
        model.generate(input_ids=ids, prefill_chunk_size=4, max_new_tokens=2)
    with model.disable_adapter():
        model.generate(input_ids=ids, prefill_chunk_size=4, max_new_tokens=2)


def test_a_cache_that_was_filled_without_the_adapter_or_by_other_rows():
    plain, model = adapt()
    ids = batch()["input_ids"].clamp(min=3)
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        plain(input_ids=ids, past_key_values=cache)
        with pytest.raises(ValueError, match="11 tokens that were not read under this adapter"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="filled by 3 rows, but 2 came"):
            model(input_ids=ids[:2, :1], past_key_values=cache)


def test_a_gate_mask_of_another_shape_or_that_reads_nothing():
    _, model = adapt()
    rows = batch()
    with pytest.raises(ValueError, match=r"gate_mask.* 2 rows for a batch of 3"):
        model(**rows | {"gate_mask": rows["gate_mask"][:2]})
    with pytest.raises(ValueError, match="gate_mask"):
        model(**rows | {"gate_mask": rows["gate_mask"][:, :5]})
    with pytest.raises(ValueError, match="gate_mask"):  # a mean over no tokens
        model(**rows | {"gate_mask": torch.zeros_like(rows["gate_mask"])})


def test_two_adapters_at_once():
    _, model = adapt()
    model.add_adapter("late", MoPsConfig(**ADAPTER | dict(injection_layer=4)))
    with pytest.raises(ValueError, match=r"active at once.*set_adapter"):
        model.base_model.set_adapter(["default", "late"])
        model(**batch())


def test_prompts_that_no_attention_module_sees_are_an_error_not_a_silence():
    _, model = adapt()
    for layer in model.base_model.model.model.layers:
        inner = getattr(layer, "base_layer", layer)
        inner.forward = lambda *args, mops=None, forward=inner.forward, **kwargs: forward(*args, **kwargs)
    with torch.no_grad(), pytest.raises(ValueError, match="no attention module of LlamaForCausalLM saw the prompts"):
        model(**batch())
