"""Every way of decoding against a slow one: `generate` on a model whose every step is the whole method by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from adapted import adapt, prompts_of
from by_hand import by_hand
from tiny_models import VOCABULARY, batch, relative

NEW = 8  # tokens


class Slow(LlamaForCausalLM):
    """No cache, no prefix: each step computes all columns by hand. The gate reads the first step's tokens only."""

    def __init__(self, plain, config, prompts, gate_mask=None):
        super().__init__(plain.config)
        self.generation_config = plain.generation_config
        self.__dict__.update(method=(plain, config, prompts), gate_mask=gate_mask)

    def forward(self, input_ids, attention_mask, **_):
        if self.gate_mask is None:
            self.gate_mask = attention_mask
        read = torch.nn.functional.pad(self.gate_mask, (0, input_ids.shape[1] - self.gate_mask.shape[1]))
        return CausalLMOutputWithPast(logits=by_hand(*self.method, input_ids, attention_mask, read).logits)


def prompt() -> dict:
    """Three instructions of 4, 7 and 6 tokens, padded on the left."""
    ids = batch(3)["input_ids"][:, -7:].clamp(min=3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def slowly(plain, model, gate_mask=None, **options):
    slow = Slow(plain, model.peft_config["default"], prompts_of(model), gate_mask).eval()
    torch.manual_seed(0)
    return slow.generate(use_cache=False, **options)


def quickly(model, **options):
    torch.manual_seed(0)
    return model.generate(**options)


WAYS = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several beams": dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
    "sampling": dict(do_sample=True, temperature=1.3, top_k=40),
    "sampled twice": dict(do_sample=True, num_return_sequences=2),
    "repetition penalty": dict(repetition_penalty=1.5),
}
LITERAL = dict(gate_target="hidden_states", expert_attention="causal", num_recovery_prompts=2)


@pytest.mark.parametrize("options", [dict(num_recovery_prompts=2), LITERAL], ids=["attention", "hidden states"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_generate_is_the_slow_reference_with_and_without_cache(way, options):
    plain, model = adapt(**options)
    inputs = prompt() | way | dict(max_new_tokens=NEW)
    want = slowly(plain, model, **inputs)
    for use_cache in (True, False):
        assert torch.equal(quickly(model, use_cache=use_cache, **inputs), want), f"use_cache={use_cache}"
    with model.disable_adapter():
        assert not torch.equal(quickly(model, **inputs), want)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_every_cache_gives_the_slow_reference(name, cache):
    changes = dict(sliding_window=4) if name in ("mistral", "gemma3_text") else {}
    plain, model = adapt(name, changes=changes)
    inputs = prompt() | dict(max_new_tokens=NEW)
    want = greedy_by_hand(plain, model, prompt())
    assert torch.equal(quickly(model, cache_implementation=cache, **inputs), want)
    gate = model.base_model.last_gate
    assert torch.equal(quickly(model, use_cache=False, **inputs), want)
    assert relative(gate, model.base_model.last_gate) < 1e-5  # a static cache comes with masks of another shape
    del inputs["attention_mask"]  # then `generate` finds the padding by itself
    quickly(model, cache_implementation=cache, **inputs)
    assert relative(model.base_model.last_gate, gate) < 1e-5


@torch.no_grad()
def greedy_by_hand(plain, model, inputs, gate_mask=None, new=NEW):
    """The loop that `generate` hides, with an explicit gate mask that covers only the prompt."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    read, going = mask if gate_mask is None else gate_mask, torch.ones(len(ids), dtype=torch.bool)
    for _ in range(new):
        logits = by_hand(plain, model.peft_config["default"], prompts_of(model), ids, mask, read).logits
        token = torch.where(going, logits[:, -1].argmax(-1), 0)  # a finished row is filled with the pad token
        going &= token != 2
        ids = torch.cat([ids, token[:, None]], 1)
        mask, read = (torch.nn.functional.pad(m, (0, 1), value=v) for m, v in ((mask, 1), (read, 0)))
    return ids


def test_prompt_lookup_checks_several_tokens_at_once():
    plain, model = adapt(num_recovery_prompts=2)
    unit = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": unit.repeat(1, 4), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    widths = []
    model.base_model.model.register_forward_pre_hook(
        lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    got = quickly(model, prompt_lookup_num_tokens=3, max_new_tokens=NEW, **inputs)
    assert any(1 < width < 16 for width in widths), "no candidate was ever checked, so this test shows nothing"
    assert torch.equal(got, greedy_by_hand(plain, model, inputs))


def test_an_explicit_gate_mask_reaches_the_gate_also_under_beams():
    plain, model = adapt()
    inputs = prompt()
    read = inputs["attention_mask"] * torch.tensor([0, 0, 0, 1, 1, 0, 0])
    got = quickly(model, gate_mask=read, max_new_tokens=NEW, **inputs)
    assert torch.equal(got, greedy_by_hand(plain, model, inputs, read))
    gate = model.base_model.last_gate
    quickly(model, max_new_tokens=1, **inputs)
    assert relative(model.base_model.last_gate, gate) > 1e-2
    beams = dict(num_beams=3, max_new_tokens=NEW)
    quickly(model, gate_mask=read, **inputs, **beams)
    assert relative(model.base_model.last_gate[::3], gate) < 1e-5
    rows = read.repeat_interleave(3, 0)
    want = slowly(plain, model, gate_mask=rows, **inputs, **beams)
    assert torch.equal(quickly(model, gate_mask=read, **inputs, **beams), want)


def test_a_second_turn_over_the_same_cache_is_read_whole_where_no_header_is_known():
    plain, model = adapt(num_recovery_prompts=2)
    ids = prompt()["input_ids"][1:2]
    first = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, return_dict_in_generate=True
    )
    longer = torch.cat([first.sequences, ids.flip(1)], 1)
    mask = torch.ones_like(longer)
    got = model.generate(input_ids=longer, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5)
    assert torch.equal(got, greedy_by_hand(plain, model, {"input_ids": longer, "attention_mask": mask}, mask, new=5))


def test_two_calls_of_generate_share_nothing():
    _, model = adapt()
    inputs = prompt()
    want = quickly(model, max_new_tokens=NEW, **inputs)
    other = {name: value.flip(0) for name, value in inputs.items()}
    for use_cache in (True, False):
        quickly(model, max_new_tokens=2, use_cache=use_cache, **other)
        assert torch.equal(quickly(model, max_new_tokens=NEW, use_cache=use_cache, **inputs), want)


def test_the_logits_of_each_step_are_those_by_hand():
    plain, model = adapt(num_recovery_prompts=2)
    inputs = prompt()
    out = model.generate(**inputs, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    read = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW))
    with torch.no_grad():
        want = by_hand(plain, model.peft_config["default"], prompts_of(model), out.sequences, mask, read).logits
    for step, logits in enumerate(out.logits):
        assert relative(logits, want[:, inputs["input_ids"].shape[1] - 1 + step]) < 1e-5
