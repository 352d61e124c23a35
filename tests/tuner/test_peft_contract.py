"""What PEFT, transformers and TRL expect of an adapter: saved, loaded, switched, stacked, taken off, trained by others."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from adapted import ADAPTER, adapt, prompts_of, scramble
from by_hand import by_hand
from smartmops import MoPsConfig
from tiny_models import VOCABULARY, WIDTH, batch, build, relative

TRAINED = {"mops_prompts", "mops_gate_in", "mops_gate_out"}


@torch.no_grad()
def logits(model):
    return model.eval()(**batch()).logits


def trainable(model) -> set[str]:
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


def test_saved_files_hold_the_adapter_and_nothing_of_the_base(tmp_path):
    _, model = adapt(num_recovery_prompts=2, expert_names=["a", "b", "c"])
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name.split(".")[-1]: tuple(value.shape) for name, value in saved.items()}
    assert shapes == {"mops_prompts": (12, WIDTH), "mops_recovery": (2, WIDTH), "mops_gate_in": (8, WIDTH),
                      "mops_gate_out": (3, 8), "mops_gate_mean": (WIDTH,), "mops_gate_scale": (WIDTH,)}  # fmt: skip
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOPS" and config["expert_names"] == ["a", "b", "c"]
    loaded = MoPsConfig.from_pretrained(tmp_path)
    for name in (*ADAPTER, "num_recovery_prompts", "base_hidden_size", "base_num_layers"):
        assert getattr(loaded, name) == getattr(model.peft_config["default"], name)


@pytest.mark.parametrize(
    "how", [{}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str
)
@pytest.mark.parametrize("options", [dict(num_recovery_prompts=2), dict(injection_layer=0, gate_target="hidden_states")],
                         ids=["defaults", "literal"])  # fmt: skip
def test_save_and_load(tmp_path, how, options):
    _, model = adapt(**options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, **how)
    assert torch.equal(logits(loaded), logits(model))
    assert trainable(loaded) == (TRAINED if "is_trainable" in how else set())
    assert {name for name, _ in loaded.named_parameters() if "mops_" in name} == {
        name.replace("default", how.get("adapter_name", "default"))
        for name, _ in model.named_parameters()
        if "mops_" in name
    }


@pytest.fixture
def saved(tmp_path):
    """A base model and an adapter in folders, and what they say together."""
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, MoPsConfig(**ADAPTER, num_recovery_prompts=2))
    scramble(model, build())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model)


def test_transformers_and_peft_load_base_and_adapter_from_the_adapters_folder(saved):
    folder, want = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    assert torch.equal(logits(model), want)
    ids = batch()["input_ids"][1:2]
    generated = model.generate(input_ids=ids, max_new_tokens=4)
    model.disable_adapters()
    plain = {name: value for name, value in batch().items() if name != "gate_mask"}
    with torch.no_grad():
        assert torch.equal(model(**plain).logits, build()(**plain).logits)
    model.enable_adapters()
    assert torch.equal(logits(model), want)
    auto = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert torch.equal(logits(auto), want)
    assert torch.equal(auto.generate(input_ids=ids, max_new_tokens=4), generated)


@pytest.fixture
def three():
    """One base, three adapters: two at layer 2, one at layer 4; and each adapter's logits by hand."""
    plain, model = adapt(num_recovery_prompts=2)
    late = MoPsConfig(**ADAPTER | dict(injection_layer=4, num_experts=2, gate_target="hidden_states"))
    for seed, (name, config) in enumerate({"twin": MoPsConfig(**ADAPTER), "late": late}.items(), 1):
        model.add_adapter(name, config)
        scramble(model, plain, name, seed)
    with torch.no_grad():
        want = {
            name: by_hand(plain, config, prompts_of(model, name), **batch()).logits
            for name, config in model.peft_config.items()
        }
    return plain, model, want


def agrees(model, want) -> bool:
    return relative(logits(model), want, batch()["attention_mask"]) < 1e-5


def test_several_adapters_at_different_layers_take_turns(three):
    _, model, want = three
    assert agrees(model, want["default"])
    for name in ("late", "twin", "default", "late"):
        model.set_adapter(name)
        assert agrees(model, want[name])
        assert trainable(model) == TRAINED
        on = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
        assert on == {name}


def test_deleting_one_adapter_leaves_the_others(three):
    _, model, want = three
    model.delete_adapter("twin")
    assert not [name for name, _ in model.state_dict().items() if name.endswith("twin")]
    assert agrees(model, want["default"])
    model.set_adapter("late")
    model.delete_adapter("default")
    assert agrees(model, want["late"])
    with pytest.raises(ValueError, match=r"default.*late"):
        model.base_model.layer("default")


def test_several_adapters_are_saved_and_loaded_side_by_side(three, tmp_path):
    _, model, want = three
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    loaded.load_adapter(tmp_path / "late", "late")
    assert agrees(loaded, want["default"])
    loaded.set_adapter("late")
    assert agrees(loaded, want["late"])


def test_disabling_gives_the_frozen_model_whatever_adapter_is_set(three):
    plain, model, want = three
    rows = {name: value for name, value in batch().items() if name != "gate_mask"}
    for name in want:
        model.set_adapter(name)
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(model(**rows).logits, plain(**rows).logits)
        assert agrees(model, want[name])


def test_unload_restores_the_base_model_exactly(three):
    plain, model, _ = three
    restored = model.unload()
    assert [(n, type(m)) for n, m in restored.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    for module in restored.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, type(module)
        assert not [name for name in module.__dict__ if "mops" in name], type(module)
        if hasattr(module, "config"):
            assert module.config is restored.config or module.config._attn_implementation == "sdpa"
    assert "generate" not in restored.__dict__
    rows = {name: value for name, value in batch().items() if name != "gate_mask"}
    with torch.no_grad():
        assert torch.equal(restored(**rows).logits, plain(**rows).logits)
    assert torch.equal(restored.generate(**rows, max_new_tokens=3), plain.generate(**rows, max_new_tokens=3))
    again = get_peft_model(restored, MoPsConfig(**ADAPTER))
    scramble(again, plain)
    with torch.no_grad():
        want = by_hand(plain, again.peft_config["default"], prompts_of(again), **batch()).logits
    assert agrees(again, want)


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    plain, model = adapt(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded), want)
    with model.disable_adapter(), torch.no_grad():
        rows = {name: value for name, value in batch().items() if name != "gate_mask"}
        assert torch.equal(model(**rows).logits, plain(**rows).logits)
    _, without = adapt()
    assert relative(want, 2 * logits(without), batch()["attention_mask"]) < 1e-5


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_says_what_to_do(merge):
    _, model = adapt()
    want = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged.*unload"):
        getattr(model, merge)()
    assert torch.equal(logits(model), want)


@pytest.fixture
def on_lora():
    """A model with a trained LoRA merged in; one that carries the LoRA and a MoPs adapter over it."""

    def lora():
        model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    model = get_peft_model(lora(), MoPsConfig(**ADAPTER, num_recovery_prompts=2))
    merged = lora().merge_and_unload()
    scramble(model, merged)
    return merged, model


def test_over_a_trained_lora_the_method_is_the_one_by_hand_on_the_merged_model(on_lora):
    merged, model = on_lora
    with torch.no_grad():
        rows = {"input_ids": batch()["input_ids"]}
        assert relative(merged(**rows).logits, build()(**rows).logits) > 1e-2  # the LoRA does something
        want = by_hand(merged, model.peft_config["default"], prompts_of(model), **batch()).logits
    assert agrees(model, want)
    assert trainable(model) == TRAINED


def test_over_a_trained_lora_inert_prompts_leave_the_lora_model(on_lora, masked_out):
    merged, model = on_lora
    rows = batch()
    positions = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = merged(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], position_ids=positions).logits
    assert agrees(model, want)


def test_over_a_trained_lora_the_adapter_alone_is_saved_disabled_and_taken_off(on_lora, tmp_path):
    merged, model = on_lora
    rows = {name: value for name, value in batch().items() if name != "gate_mask"}
    with torch.no_grad():
        want = merged(**rows).logits
        with model.disable_adapter():
            assert relative(model(**rows).logits, want, rows["attention_mask"]) < 1e-5
        model.save_pretrained(tmp_path)
        from safetensors.torch import load_file

        assert all("mops_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
        restored = model.unload()
        assert relative(restored(**rows).logits, want, rows["attention_mask"]) < 1e-5


def test_a_deep_copy_is_a_model_of_its_own():
    _, model = adapt(num_recovery_prompts=2)
    want = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), want)
    ids = batch()["input_ids"][1:2]
    assert torch.equal(twin.generate(input_ids=ids, max_new_tokens=3), model.generate(input_ids=ids, max_new_tokens=3))
    with torch.no_grad():
        prompts_of(twin).experts.zero_()
    assert relative(logits(twin), want) > 1e-2
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("training", [True, False])
def test_the_wrapper_is_born_in_the_mode_of_its_model(training):
    model = get_peft_model(build().train(training), MoPsConfig(**ADAPTER))
    assert {module.training for module in model.base_model.model.modules()} == {training}


def test_only_prompts_and_gate_are_trained_and_they_are_few():
    _, model = adapt(num_recovery_prompts=2)
    assert trainable(model) == TRAINED
    assert model.get_nb_trainable_parameters()[0] == 12 * WIDTH + 8 * WIDTH + 3 * 8
    assert {name.split(".")[-2] for name, _ in model.named_parameters() if "mops_" in name} == TRAINED
    assert {name.split(".")[-2] for name, _ in model.named_buffers() if "mops_" in name} == {
        "mops_recovery", "mops_gate_mean", "mops_gate_scale"}  # fmt: skip


def test_a_bf16_base_trains_float32_adapters():
    model = get_peft_model(build().bfloat16(), MoPsConfig(**ADAPTER, num_recovery_prompts=2))
    assert {value.dtype for name, value in model.state_dict().items() if "mops_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "mops_" not in name} == {torch.bfloat16}
    model(**rows_of_training()[0]).loss.backward()
    gradient = prompts_of(model).experts.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_default_layer_is_nine_thirty_seconds_of_the_depth():
    assert get_peft_model(build(), MoPsConfig()).peft_config["default"].injection_layer == round(9 / 32 * 6) == 2
    deep = build(num_hidden_layers=32, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    assert get_peft_model(deep, MoPsConfig()).peft_config["default"].injection_layer == 9


def rows_of_training(rows: int = 8, seed: int = 0) -> list[dict]:
    """Batches of two: 12 tokens each, the last 5 a response that depends on nothing the frozen model knows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=generator)
    ids[:, 7:] = torch.arange(20, 25)
    labels = ids.clone()
    labels[:, :7] = -100
    ones = torch.ones_like(ids)
    return [
        {"input_ids": i[None], "attention_mask": m[None], "labels": t[None]}
        for i, m, t in zip(ids, ones, labels, strict=True)
    ]


def flat(rows: list[dict]) -> list[dict]:
    return [{name: value[0] for name, value in row.items()} for row in rows]


def trainer(folder, model=None, callbacks=(), **arguments) -> Trainer:
    arguments = dict(output_dir=folder, max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, save_steps=1,
                     logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True) | arguments  # fmt: skip
    data = flat(rows_of_training())
    model = model or adapt()[1]
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=data, eval_dataset=data, callbacks=list(callbacks)
    )


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def test_trainer_lowers_the_loss_and_leaves_the_base_alone(tmp_path):
    run = trainer(tmp_path, max_steps=12, learning_rate=0.5, save_strategy="no")
    run.train()
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    base = build().state_dict()
    for name, value in run.model.unload().state_dict().items():
        assert torch.equal(value, base[name]), name


def test_trainer_loads_the_best_checkpoint_at_the_end(tmp_path):
    # the worst loss is called best here, so the best checkpoint is not the last one
    run = trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, greater_is_better=True,
                  metric_for_best_model="eval_loss")  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    of_best, of_last = (logits(PeftModel.from_pretrained(build(), tmp_path / f"checkpoint-{step}")) for step in (1, 4))
    assert torch.equal(logits(run.model), of_best)
    assert relative(of_last, of_best) > 1e-3


def test_trainer_resumes_bit_for_bit(tmp_path):
    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    whole = trainer(tmp_path / "whole")
    whole.train()
    cut = trainer(tmp_path / "cut", callbacks=[StopAtTwo()])
    cut.train()
    assert cut.state.global_step == 2
    resumed = trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for got, want, before in zip(*(prompts_of(run.model)[:6] for run in (resumed, whole, cut)), strict=True):
        assert torch.equal(got, want)
        assert not want.requires_grad or not torch.equal(want, before)


@pytest.mark.slow
def test_trl_trains_the_method_from_its_config(tmp_path, make_tokenizer):
    trl = pytest.importorskip("trl", reason="TRL is an extra")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [{"prompt": f"### Instruction:\nSay {word}.\n\n### Response:\n", "completion": "abcabc"} for word in "abcdefgh"]
    )
    arguments = trl.SFTConfig(output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=2, learning_rate=0.5,
                              logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)  # fmt: skip
    run = trl.SFTTrainer(build(), arguments, train_dataset=data, processing_class=make_tokenizer(),
                         peft_config=MoPsConfig(**ADAPTER))  # fmt: skip
    run.train()
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert relative(logits(loaded), logits(run.model)) < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_on_a_bfloat16_base_only_prompts_and_gate_are_trained(autocast):
    base = build().to(torch.bfloat16)
    model = get_peft_model(base, MoPsConfig(num_recovery_prompts=2, injection_layer=2), autocast_adapter_dtype=autocast)
    trained = {name.rpartition("mops_")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompts.default", "gate_in.default", "gate_out.default"}
