"""The library against the method computed by hand: float32, relative error below 1e-5 unless said."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from adapted import ADAPTER, adapt, prompts_of
from by_hand import by_hand
from smartmops import MoPsConfig
from tiny_models import KERNELS, LAYERS, VOCABULARY, WIDTH, batch, build, relative

LITERAL = dict(gate_target="hidden_states", expert_attention="causal")
TOLERANCE = 1e-5


def config_of(model) -> MoPsConfig:
    return model.peft_config["default"]


def check_by_hand(plain, model, inputs) -> None:
    """Logits, gate and what the gate reads."""
    with torch.no_grad():
        want = by_hand(plain, config_of(model), prompts_of(model), **inputs)
        got, tuner = model(**inputs).logits, model.base_model
        assert relative(got, want.logits, inputs["attention_mask"]) < TOLERANCE
        assert relative(tuner.last_gate, want.gate) < TOLERANCE
        assert relative(tuner.pooled(**inputs), want.pooled) < TOLERANCE


def test_the_reference_itself_feels_every_part_of_the_method():
    plain, model = adapt(num_recovery_prompts=2)
    prompts, inputs = prompts_of(model), batch()

    def logits(gate=None, without_recovery=False, **changes):
        config = MoPsConfig(**ADAPTER | changes)
        used = prompts._replace(recovery=prompts.recovery[:0]) if without_recovery else prompts
        with torch.no_grad():
            return by_hand(plain, config, used, **inputs, gate=gate)

    right = logits()
    assert right.gate.std(0).min() > 0.02  # rows differ, and so do their experts
    uniform = torch.full_like(right.gate, 1 / 3)
    wrong = [
        logits(gate=uniform),
        logits(gate=right.gate.roll(1, 0)),  # the neighbour's gate
        logits(gate_target="hidden_states"),
        logits(expert_attention="causal"),
        logits(injection_layer=3),
        logits(gate_temperature=2.0),
        logits(gate_top_k=1),
        logits(keep_recovery_prompts=False),
        logits(without_recovery=True),
    ]
    for number, other in enumerate(wrong):
        assert relative(other.logits, right.logits, inputs["attention_mask"]) > 1e-2, number


@pytest.mark.parametrize("layer", [0, 3, LAYERS - 1])
@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_full_forward(name, kernel, layer):
    for options in ({}, LITERAL):
        plain, model = adapt(name, kernel, injection_layer=layer, **options)
        check_by_hand(plain, model, batch())


OPTIONS = {
    "causal": dict(expert_attention="causal"), "isolated, scaled": dict(gate_target="hidden_states"),
    "top-k": dict(gate_top_k=2), "top-k, hidden states scaled": dict(gate_top_k=1, gate_target="hidden_states"),
    "temperature": dict(gate_temperature=0.3),
    "shared": dict(shared_prompts=2), "shared, literal": dict(shared_prompts=2, **LITERAL),
    "null expert": dict(null_expert=True, shared_prompts=2), "null expert, top-k": dict(null_expert=True, gate_top_k=1),
    "null expert, hidden states scaled": dict(null_expert=True, gate_target="hidden_states"),
    "one gate weight per prompt": dict(gate_granularity="prompt"),
    "one gate weight per prompt, hidden states scaled": dict(gate_granularity="prompt", **LITERAL),
    "one expert": dict(num_experts=1, prompts_per_expert=12), "recovery": dict(num_recovery_prompts=3),
    "recovery, literal": dict(num_recovery_prompts=3, keep_recovery_prompts=False, **LITERAL),
    "recovery, dropped": dict(num_recovery_prompts=3, keep_recovery_prompts=False),
    "recovery, injected at 0": dict(num_recovery_prompts=3, injection_layer=0),
    "recovery, hidden states scaled": dict(num_recovery_prompts=3, gate_target="hidden_states"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "smollm3"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(name, options):
    check_by_hand(*adapt(name, **options), batch())


@pytest.mark.parametrize(("name", "kernel"), [("mistral", "sdpa"), ("mistral", "eager"), ("gemma3_text", "sdpa"),
                                              ("gemma2", "eager"), ("phi3", "sdpa")])  # fmt: skip
def test_a_sliding_window_never_slides_past_the_prompts(name, kernel):
    plain, model = adapt(name, kernel, changes=dict(sliding_window=4), num_recovery_prompts=2)
    wide, _ = adapt(name, kernel, num_recovery_prompts=2)
    inputs = batch()
    check_by_hand(plain, model, inputs)
    with torch.no_grad():  # the window does something: text further than 4 tokens away is out of sight
        narrow, broad = (by_hand(m, config_of(model), prompts_of(model), **inputs).logits for m in (plain, wide))
    assert relative(narrow, broad, inputs["attention_mask"]) > 1e-2
    left = left_padded()
    assert relative(decode(model, left), reference(plain, model, left), left["attention_mask"]) < TOLERANCE


def left_padded() -> dict:
    """Rows as a decoder wants them; the gate reads the first 6 columns, which are the prompt."""
    inputs = batch(2)
    inputs["attention_mask"] = torch.ones(3, 11, dtype=torch.long)
    inputs["attention_mask"][0, :4] = 0
    inputs["attention_mask"][2, :1] = 0
    inputs["input_ids"] = inputs["input_ids"].clamp(min=3)
    inputs["gate_mask"] = inputs["attention_mask"] * (torch.arange(11) < 6)
    return inputs


def reference(plain, model, inputs):
    with torch.no_grad():
        return by_hand(plain, config_of(model), prompts_of(model), **inputs).logits


@torch.no_grad()
def decode(model, inputs, position_ids=False):
    """The prompt of 6 columns, then one token, one token, three tokens at once, one token."""
    cache, mask, logits = DynamicCache(config=model.config), inputs["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 11)]:
        extra = {"position_ids": positions[:, start:end]} if position_ids else {}
        out = model(input_ids=inputs["input_ids"][:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                    use_cache=True, **extra)  # fmt: skip
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_cached_decoding(name, kernel):
    inputs = left_padded()
    for options in ({}, LITERAL | dict(num_recovery_prompts=2)):
        plain, model = adapt(name, kernel, **options)
        want = reference(plain, model, inputs)
        for position_ids in (False, True):
            assert relative(decode(model, inputs, position_ids), want, inputs["attention_mask"]) < TOLERANCE


def test_two_caches_in_turn_keep_their_own_gates():
    plain, model = adapt()
    first, second = left_padded(), left_padded()
    second["input_ids"] = second["input_ids"].flip(0, 1)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    got = {0: [], 1: []}
    with torch.no_grad():
        for start, end in [(0, 6), (6, 11)]:
            for index, inputs in enumerate((first, second)):
                out = model(input_ids=inputs["input_ids"][:, start:end], attention_mask=inputs["attention_mask"][:, :end],
                            past_key_values=caches[index], use_cache=True)  # fmt: skip
                got[index].append(out.logits)
    for index, inputs in enumerate((first, second)):
        want = reference(plain, model, inputs)
        assert relative(torch.cat(got[index], 1), want, inputs["attention_mask"]) < TOLERANCE


def labelled() -> dict:
    """Training input: labels cover the response, so the gate must read the rest."""
    inputs = batch()
    read = inputs.pop("gate_mask").bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(read | (inputs["attention_mask"] == 0), -100)
    return inputs


def loss_by_hand(plain, config, prompts, inputs):
    labels, mask = inputs["labels"], inputs["attention_mask"]
    logits = by_hand(plain, config, prompts, inputs["input_ids"], mask, mask * (labels == -100)).logits
    return cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


TRAINED = ("experts", "gate_in", "gate_out")


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [getattr(prompts_of(model), name).grad.clone() for name in TRAINED]


def same_gradients(got, want) -> None:
    assert relative(got[0], want[0]) < TOLERANCE
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert theirs.abs().max() > 0
        assert relative(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("options", [{}, LITERAL, dict(num_recovery_prompts=2, gate_top_k=2)], ids=str)
@pytest.mark.parametrize(("name", "kernel"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma2", "eager"),
                                              ("gpt_neox", "sdpa"), ("mixtral", "sdpa")])  # fmt: skip
def test_loss_and_gradients(name, kernel, options):
    plain, model = adapt(name, kernel, **options)
    inputs = labelled()
    leaves = prompts_of(model)._replace(
        **{name: getattr(prompts_of(model), name).detach().clone().requires_grad_() for name in TRAINED}
    )
    want = loss_by_hand(plain, config_of(model), leaves, inputs)
    want.backward()
    same_gradients(gradients(model, inputs), (want.detach(), [getattr(leaves, name).grad for name in TRAINED]))
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and "mops_" not in name]
    assert not frozen
    assert prompts_of(model).recovery.grad is None and prompts_of(model).gate_mean.grad is None


def checkpointed(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("options", [dict(num_recovery_prompts=2), LITERAL], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "stablelm"])
def test_gradient_checkpointing_gives_equal_gradients(name, options):
    _, model = adapt(name, **options)
    inputs = labelled()
    want = gradients(model, inputs)
    checkpointed(model)
    counted = []
    model.base_model.layer().base_layer.mlp.register_forward_pre_hook(lambda _, args: counted.append(args[0].shape[1]))
    same_gradients(gradients(model, inputs), want)
    assert counted.count(11) == 2, "the text's pass through the layer was not recomputed: nothing was checkpointed"
    model.enable_input_require_grads()
    same_gradients(gradients(model, inputs), want)
    assert model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("between", ["nothing", "the frozen model", "another adapter"])
@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_a_recomputed_layer_finds_the_prompts_of_its_own_pass(name, between):
    """Several passes before one backward: as for preference losses, distillation, or an evaluation in between."""
    _, model = adapt(name)
    model.add_adapter("late", MoPsConfig(**ADAPTER | dict(injection_layer=3)))
    first, second = labelled(), {key: value.flip(0) for key, value in labelled().items()}

    def both():
        model.zero_grad()
        loss = model(**first).loss
        if between == "the frozen model":
            with model.disable_adapter(), torch.no_grad():
                model(**second)
        elif between == "another adapter":
            model.set_adapter("late")
            with torch.no_grad():
                model(**second)
            model.set_adapter("default")
        else:
            few = second["attention_mask"].cumsum(-1) <= 3
            loss = loss + 3 * model(**second | {"gate_mask": few * second["attention_mask"]}).loss
        loss.backward()
        return loss.detach(), [getattr(prompts_of(model), name).grad.clone() for name in TRAINED]

    want = both()
    checkpointed(model)
    same_gradients(both(), want)


def test_reentrant_checkpointing_is_refused():
    _, model = adapt()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**labelled())


@pytest.mark.parametrize("options", [{}, LITERAL], ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_bf16_is_as_close_to_float32_as_the_computation_by_hand_in_bf16(kernel, options):
    plain, model = adapt(kernel=kernel, **options)
    inputs, prompts, config = batch(), prompts_of(model), config_of(model)
    with torch.no_grad():
        for parameter in (*plain.parameters(), *model.parameters()):
            parameter.copy_(parameter.bfloat16())  # the same rounded weights in both
        exact = by_hand(plain, config, prompts, **inputs)
        plain.bfloat16()
        low = prompts._replace(experts=prompts.experts.bfloat16(), recovery=prompts.recovery.bfloat16())
        rough = relative(
            by_hand(plain, config, low, **inputs, gate=exact.gate).logits, exact.logits, inputs["attention_mask"]
        )
        for parameter in model.parameters():
            if not any(parameter is p for p in prompts):
                parameter.data = parameter.data.bfloat16()
        got = model(**inputs).logits
    assert got.dtype == torch.bfloat16
    assert 1e-4 < rough < 0.05
    assert relative(got, exact.logits, inputs["attention_mask"]) < 2 * rough


def test_injected_at_0_with_a_uniform_gate_it_is_prompt_tuning():
    _, model = adapt(injection_layer=0, expert_attention="causal")
    with torch.no_grad():
        prompts_of(model).gate_out.zero_()
    tuned = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12, token_dim=WIDTH))
    vectors = tuned.prompt_encoder["default"].embedding.weight
    vectors.data.copy_(prompts_of(model).experts)
    inputs = labelled()
    keep = inputs["attention_mask"][0].bool()
    rows = {name: value[1:] for name, value in inputs.items()} | {}
    rows["input_ids"][0, : keep.sum()] = inputs["input_ids"][0, keep]
    ours, theirs = model(**rows), tuned.eval()(**rows)
    assert relative(ours.logits, theirs.logits[:, 12:], rows["attention_mask"]) < TOLERANCE
    (got,) = torch.autograd.grad(ours.loss, prompts_of(model).experts)
    (want,) = torch.autograd.grad(theirs.loss, vectors)
    assert relative(ours.loss, theirs.loss) < TOLERANCE
    assert relative(got, want) < TOLERANCE


def test_labels_over_the_whole_text_leave_the_gate_the_first_token_and_warn_once():
    plain, model = adapt()
    # a padding column before the text would be asked for the first token: rows 1 and 2 have none
    inputs = {name: value[1:] for name, value in batch().items() if name != "gate_mask"}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with pytest.warns(UserWarning, match="labels cover the whole text"):
        loss = model(**inputs, labels=labels).loss
    first = inputs["attention_mask"] * (inputs["attention_mask"].cumsum(-1) == 1)
    want = by_hand(plain, config_of(model), prompts_of(model), **inputs, gate_mask=first)
    assert relative(model.base_model.last_gate, want.gate) < TOLERANCE
    by_hand_loss = cross_entropy(want.logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    assert relative(loss, by_hand_loss) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=labels)


def test_an_explicit_gate_mask_narrows_what_labels_leave_and_never_widens_it():
    plain, model = adapt()
    inputs = labelled()
    before = (inputs["labels"] == -100) & inputs["attention_mask"].bool()
    mask = before & (before.cumsum(-1) > 1)
    with torch.no_grad():
        model(**inputs, gate_mask=mask.long())
        got = model.base_model.last_gate
        model(**inputs)
        assert relative(model.base_model.last_gate, got) > 1e-2
        with pytest.raises(ValueError, match=r"gate_mask lets the gate read token \d+ of row 0, where labels say"):
            model(**inputs, gate_mask=inputs["attention_mask"])
    want = by_hand(plain, config_of(model), prompts_of(model), inputs["input_ids"], inputs["attention_mask"], mask)
    assert relative(got, want.gate) < TOLERANCE


def test_no_attention_mask_means_all_tokens_and_embeddings_may_come_instead_of_tokens():
    plain, model = adapt()
    ids, ones = batch()["input_ids"].clamp(min=3), torch.ones(3, 11, dtype=torch.long)
    want = reference(plain, model, {"input_ids": ids, "attention_mask": ones, "gate_mask": ones})
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, want) < TOLERANCE
        assert relative(model(ids, ones).logits, want) < TOLERANCE
        embedded = plain.get_input_embeddings()(ids)
        assert relative(model(inputs_embeds=embedded, attention_mask=ones).logits, want) < TOLERANCE


def test_hidden_states_and_attentions_are_asked_for_as_of_any_model():
    plain, model = adapt(kernel="eager", num_recovery_prompts=2)
    inputs = batch()
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        want = plain(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(3, 11, WIDTH)] * (LAYERS + 1)
    assert torch.equal(out.hidden_states[0], want.hidden_states[0])
    assert relative(out.hidden_states[-1], want.hidden_states[-1], inputs["attention_mask"]) > 1e-2
    # what a token gives to prompts and text sums to one, and experts come after recovery prompts
    assert [weights.shape[-1] for weights in out.attentions] == [11 + 2] * 2 + [11 + 2 + 12] * 4
    assert relative(out.attentions[-1].sum(-1), torch.ones(3, 4, 11)) < 1e-5


def saved_bytes(injection_layer: int, **options) -> int:
    _, model = adapt(injection_layer=injection_layer, **options)
    entered, saved = [], []
    layers = model.base_model.model.model.layers
    for layer in layers[: injection_layer + 1]:
        block = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]) or None)

    def count(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.train()(**labelled()).loss.backward()
    text = [hidden for hidden in entered if hidden.shape[1] == 11]
    assert len(text) == injection_layer + 1
    assert all(hidden.grad_fn is None and not hidden.requires_grad for hidden in text)
    return sum(saved)


@pytest.mark.parametrize("options", [{}, LITERAL], ids=str)
def test_no_graph_below_the_injection_layer(options):
    sizes = [saved_bytes(layer, **options) for layer in range(LAYERS)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == LAYERS, sizes
    assert sizes[-1] < sizes[0] / 3
