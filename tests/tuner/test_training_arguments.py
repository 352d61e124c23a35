"""The sweep over arguments of PEFT and of trainers: each works as checked here, or is refused with a reason."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_arguments import grouped, missing
from transformers import Trainer, TrainingArguments, default_data_collator

from adapted import ADAPTER, adapt
from argument_tables import Try
from smartmops import MoPsConfig
from smartmops.tuner.engine import Engine
from tiny_models import VOCABULARY, batch, build, relative
from training_tables import (
    LOADED,
    LOADED_APART,
    MODEL,
    MODEL_APART,
    SAVED,
    SAVED_APART,
    SFT,
    SFT_APART,
    TRAINING_ARGUMENTS,
    TRAINING_ARGUMENTS_APART,
)

trl = pytest.importorskip("trl", reason="TRL is an extra")
QUESTION = 7  # tokens


def fields(kind) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_every_training_argument_is_in_the_table_or_cannot_matter():
    assert missing(fields(TrainingArguments), TRAINING_ARGUMENTS, grouped(TRAINING_ARGUMENTS_APART)) == []
    inherited = fields(TrainingArguments)
    assert missing(fields(trl.SFTConfig), SFT, grouped(SFT_APART), inherited) == []


@pytest.mark.parametrize(
    ("function", "table", "apart"),
    [(get_peft_model, MODEL, MODEL_APART), (PeftModel.__init__, MODEL, MODEL_APART),
     (PeftModel.add_adapter, MODEL, MODEL_APART), (PeftModel.from_pretrained, LOADED, LOADED_APART),
     (PeftModel.load_adapter, LOADED, LOADED_APART), (PeftModel.save_pretrained, SAVED, SAVED_APART)],
    ids=lambda each: getattr(each, "__qualname__", ""),
)  # fmt: skip
def test_every_argument_of_peft_is_in_the_table_or_cannot_matter(function, table, apart):
    assert missing(inspect.signature(function).parameters, table, grouped(apart)) == []


@pytest.fixture(scope="module")
def model():
    """An adapted model; the adapter is put back after each test that trains it."""
    return adapt()[1]


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """Trainers collect garbage at every turn: what was there before them need not be looked at again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _as_before(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    model.load_state_dict(before)
    model.gradient_checkpointing_disable()
    model.base_model.model.mops_engine.said.clear()


@pytest.fixture
def read(monkeypatch) -> list:
    """How many tokens the gate read in each row of every new text."""
    seen, fresh = [], Engine.fresh

    def spied(self, *args):
        context = fresh(self, *args)
        seen.append(context.gate_mask.sum(-1).tolist())
        return context

    monkeypatch.setattr(Engine, "fresh", spied)
    return seen


def rows() -> dict[str, list]:
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :QUESTION] = -100
    return {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}


def logits_alone(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].float().logsumexp(-1).mean()


def trained(run, model) -> set[str]:
    """Train, and say what moved."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    run.train()
    model = run.accelerator.unwrap_model(run.model)
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def flat(table):
    return [pytest.param(n, each, id=f"{n}-{i}") for n, tries in table.items() for i, each in enumerate(tries)]


def checked(make, model, attempt: Try, read: list, loss: float, question: list[int]) -> None:
    """Make a trainer, train, and see that the table is right; `question` is how many tokens each row's gate reads."""
    words = attempt.refused if attempt.refused is not None else attempt.alike
    if words is not None:
        for each in (model, build()) if attempt.alike else (model,):
            with pytest.raises(ValueError if attempt.refused else Exception, match=words):
                make(each).train()
        return
    run = make(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        moved = trained(run, run.model)
    said = [str(each.message) for each in said if "the gate reads" in str(each.message)]
    if attempt.equal == "warned":
        assert said and read
        return
    assert not said and read
    assert {name.split(".")[-2] for name in moved} == {"mops_prompts", "mops_gate_in", "mops_gate_out"}
    masked = attempt.equal == "masked"
    assert {tokens for each in read for tokens in each} == ({2} if masked else set(question))
    found = next(row["loss"] for row in run.state.log_history if "loss" in row)
    assert float(found) == pytest.approx(loss, rel=2e-3) or attempt.equal != "loss"


@pytest.mark.parametrize(("name", "attempt"), flat(TRAINING_ARGUMENTS))
def test_trainer(name: str, attempt: Try, model, read, tmp_path):
    beside = dict(attempt.beside)
    column, data = beside.pop("column", None), rows()
    if column == "gate_mask":
        data["gate_mask"] = [[1, 1] + [0] * 10] * 4
    with torch.no_grad():
        whole = model.eval()(**{key: torch.tensor(value) for key, value in rows().items()}).loss.item()
    if column == "no labels":
        del data["labels"]
    read.clear()
    given = {} if name != "compute_loss_func" else {name: logits_alone}
    arguments = dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.05,
                     logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no") | beside  # fmt: skip
    if not given:
        arguments[name] = attempt.value
    dataset = Dataset.from_dict(data)

    def make(model):
        made = TrainingArguments(**arguments)
        return Trainer(model, made, train_dataset=dataset, eval_dataset=dataset,
                       data_collator=default_data_collator, **given)  # fmt: skip

    checked(make, model, attempt, read, whole, [QUESTION])


PAIRS = [("### Instruction:\nName it.\n\n### Response:\n", "The answer."), ("Is this a text?\n", "is this")]


def spoken(kind: str | None, tokenizer) -> tuple[Dataset, list[int]]:
    """Data as TRL takes them, and how many tokens of each row are instruction."""
    questions = [len(tokenizer(question)["input_ids"]) for question, _ in PAIRS]
    if kind == "text":
        return Dataset.from_list([{"said": question + answer} for question, answer in PAIRS]), questions
    if kind == "chat":
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in PAIRS]
        return Dataset.from_list([{"messages": each} for each in turns]), []
    made = []
    for (question, answer), length in zip(PAIRS, questions, strict=True):
        ids = tokenizer(question + answer)["input_ids"] + [2]
        made.append({"input_ids": ids, "labels": [-100] * length + ids[length:]})
    if kind == "prepared":
        return Dataset.from_list(made), questions
    return Dataset.from_list([{"prompt": q, "completion": a} for q, a in PAIRS]), questions


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<eos>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize(("name", "attempt"), flat(SFT))
def test_sft_trainer(name: str, attempt: Try, model, read, tmp_path, make_tokenizer):
    beside, tokenizer = dict(attempt.beside), make_tokenizer()
    kind, column = beside.pop("data", None), beside.pop("column", None)
    dataset, question = spoken(kind, tokenizer)
    tokenizer.chat_template = TEMPLATE
    if kind == "chat":
        question = [len(tokenizer.apply_chat_template(each["messages"][:1], add_generation_prompt=True)["input_ids"])
                    for each in dataset]  # fmt: skip
    if column:
        dataset = dataset.add_column(column, [[1, 1]] * len(dataset))
    given = {} if name != "compute_loss_func" else {name: logits_alone}
    arguments = dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=0.05, bf16=False,
                     logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
                     gradient_checkpointing=False) | beside  # fmt: skip
    if not given:
        arguments[name] = attempt.value

    def make(model):
        made = trl.SFTConfig(**arguments)
        return trl.SFTTrainer(model, made, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer,
                              **given)  # fmt: skip

    plain = torch.nan
    if attempt.equal == "loss" and kind != "chat":
        prepared, _ = spoken("prepared", tokenizer)
        with torch.no_grad():
            losses = [model.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
                      * (torch.tensor(row["labels"]) >= 0).sum() for row in prepared]  # fmt: skip
        plain = (sum(losses) / sum(label >= 0 for row in prepared for label in row["labels"])).item()
        read.clear()
    checked(make, model, Try(attempt.value, equal="moves") if kind == "chat" else attempt, read, plain, question)


@torch.no_grad()
def logits(model):
    return model.eval()(**batch()).logits


@pytest.mark.parametrize(("name", "attempt"), flat(MODEL))
def test_get_peft_model(name: str, attempt: Try):
    def make(**given):
        torch.manual_seed(0)
        return logits(get_peft_model(build(), MoPsConfig(**ADAPTER), **given))

    if attempt.refused:
        with pytest.raises(ValueError, match=attempt.refused):
            make(**{name: attempt.value})
    else:
        assert torch.equal(make(**{name: attempt.value}), make())


@pytest.mark.parametrize(("name", "attempt"), flat(LOADED))
def test_from_pretrained(name: str, attempt: Try, model, tmp_path):
    model.save_pretrained(tmp_path)
    value = attempt.value
    if name == "config":
        value = MoPsConfig(**ADAPTER, gate_temperature=1.0 if value == "own" else 3.0)
    if attempt.refused:
        with pytest.raises(ValueError, match=attempt.refused):
            PeftModel.from_pretrained(build(), tmp_path, **{name: value})
        return
    loaded = PeftModel.from_pretrained(build(), tmp_path, **{name: value})
    assert (relative(logits(loaded), logits(model)) > 1e-3) == (attempt.equal == "changed")
    assert any(p.requires_grad for p in loaded.parameters()) == (name == "is_trainable")


@pytest.mark.parametrize(("name", "attempt"), flat(SAVED))
def test_save_pretrained(name: str, attempt: Try, model, tmp_path):
    value = str(tmp_path / "initial") if name.startswith("path_") else attempt.value  # PEFT writes there
    if attempt.refused:
        with pytest.raises(ValueError, match=attempt.refused):
            model.save_pretrained(tmp_path, **{name: value})
        return
    model.save_pretrained(tmp_path, **{name: value})
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), logits(model))
