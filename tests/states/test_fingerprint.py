"""The key of a cache changes with all that decides its numbers, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cached import EXAMPLES, adapted, base, made_up, over
from peft import LoraConfig, get_peft_model

from smartmops import MoPsConfig
from smartmops.states.fingerprint import fingerprint
from smartmops.tokens.batches import IGNORED, encode_all


def lora(scale: int) -> Any:
    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=scale, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return over(model.eval())


def changed(part: str, **options: Any) -> Any:
    """A model of which one weight is another."""
    model = adapted(**options)
    (found,) = (value for name, value in model.state_dict().items() if name.endswith(part))
    found.view(-1)[0] += 1
    return model


KEYED: dict[str, Callable[[], Any]] = {
    "a weight below the injection layer": lambda: changed("layers.1.mlp.up_proj.weight"),
    "an embedding": lambda: changed("embed_tokens.weight"),
    "the injection layer": lambda: adapted(injection_layer=1),
    "the model's dtype": lambda: adapted(torch.bfloat16),
    "a setting without weights": lambda: over(base(rms_norm_eps=1e-3)),
    "the attention": lambda: over(base(attn_implementation="eager")),
    "recovery prompts": lambda: adapted(num_recovery_prompts=2),
    "what the gate reads": lambda: adapted(gate_input="sequence"),
    "an adapter underneath": lambda: lora(1),
}
UNKEYED: dict[str, Callable[[], Any]] = {
    "nothing": adapted,
    "a weight above": lambda: changed("layers.2.base_layer.mlp.up_proj.weight"),
    "the head": lambda: changed("lm_head.weight"),
    "prompts": lambda: changed("mops_prompts.default"),
    "the gate": lambda: changed("mops_gate_out.default"),
    "the gate's standardisation": lambda: changed("mops_gate_mean.default"),
    "experts": lambda: adapted(num_experts=5, gate_temperature=2.0, expert_attention="causal"),
    "the cache of generate": lambda: over(base(use_cache=False)),
}


@pytest.mark.filterwarnings("ignore:gate_input='sequence'")
def test_every_change_of_what_decides_the_numbers_is_another_key_and_no_other_change_is() -> None:
    rows = made_up()
    want = fingerprint(adapted(), rows, torch.float32)
    assert len(want) == 32 and int(want, 16)
    others = {name: fingerprint(make(), rows, torch.float32) for name, make in KEYED.items()}
    recovery = {"num_recovery_prompts": 2}
    others["content of recovery prompts"] = fingerprint(changed("recovery.default", **recovery), rows, torch.float32)
    others["strength of an adapter underneath"] = fingerprint(lora(8), rows, torch.float32)
    others["the stored dtype"] = fingerprint(adapted(), rows, torch.bfloat16)
    others["order"] = fingerprint(adapted(), rows[::-1], torch.float32)
    others["a row less"] = fingerprint(adapted(), rows[:-1], torch.float32)
    relabelled = replace(rows[0], labels=[IGNORED] * 5 + rows[0].labels[5:])
    others["a label"] = fingerprint(adapted(), [relabelled, *rows[1:]], torch.float32)
    assert len({want, *others.values()}) == len(others) + 1, others
    for name, make in UNKEYED.items():
        assert fingerprint(make(), rows, torch.float32) == want, name


def test_a_second_adapter_elsewhere_changes_nothing() -> None:
    model, rows = adapted(), made_up()
    want = fingerprint(model, rows, torch.float32)
    model.add_adapter("lower", MoPsConfig(num_experts=2, prompts_per_expert=3, injection_layer=1))
    assert fingerprint(model, rows, torch.float32) == want
    model.set_adapter("lower")
    assert fingerprint(model, rows, torch.float32) != want


def test_tokenizer_template_and_truncation_are_in_the_key(tokenizer: Any, make_tokenizer: Callable[..., Any]) -> None:
    model = adapted()

    def key(tokenizer: Any, max_length: int = 200) -> str:
        return fingerprint(model, encode_all(EXAMPLES, tokenizer, max_length).rows, torch.float32)

    longest = max(len(row.input_ids) for row in encode_all(EXAMPLES, tokenizer, 200).rows)
    keys = [key(tokenizer), key(make_tokenizer(eos_token="<pad>")), key(tokenizer, longest - 3)]
    assert key(tokenizer) == key(tokenizer, longest) == keys[0]
    chat = make_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A: {% else %}{{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    assert len({*keys, key(chat)}) == 4
