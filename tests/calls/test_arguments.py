"""The sweep over arguments of `generate` and `forward`: each works as checked here, or is refused with a reason."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from peft import PeftModelForCausalLM
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LlamaForCausalLM, LogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import TransformersKwargs

from adapted import adapt
from argument_tables import (
    FORWARD,
    FORWARD_APART,
    GENERATE,
    GENERATION_CONFIG,
    GENERATION_CONFIG_APART,
    NEVER,
    Try,
)
from tiny_models import batch, build, relative

NEW = 4
LENGTH = 7


def prompt() -> dict[str, torch.Tensor]:
    """Three instructions of 4, 7 and 6 tokens, padded on the left."""
    ids = batch(3)["input_ids"][:, -LENGTH:].clamp(min=3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def models():
    """The frozen model and the adapted one, which no test changes."""
    plain, model = adapt()
    for each in (plain, model):
        each.generation_config.eos_token_id = None
    return plain, model


def missing(names, *tables) -> list[str]:
    """Those of the libraries' arguments that stand in no table and in no group."""
    known = {name for table in tables for name in table}
    return sorted({*names} - known - {name for name in names if name.startswith("_")})


def grouped(apart: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for names in apart.values() for name in names]


def test_every_argument_of_generate_is_in_the_table_or_cannot_matter():
    fields = vars(GenerationConfig())
    assert missing(fields, GENERATION_CONFIG, grouped(GENERATION_CONFIG_APART)) == []
    parameters = [*inspect.signature(GenerationMixin.generate).parameters][1:-1]
    assert missing(parameters, GENERATE) == []


def test_every_argument_of_forward_is_in_the_table_or_cannot_matter():
    parameters = [*inspect.signature(LlamaForCausalLM.forward).parameters][1:-1]
    taken = [*inspect.signature(PeftModelForCausalLM.forward).parameters][1:-1]
    _, model = adapt()
    names = {*parameters, *taken, *TransformersKwargs.__annotations__, *model.special_peft_forward_args}
    assert missing(names, FORWARD, grouped(FORWARD_APART)) == []


@pytest.mark.parametrize("table", [{"a": 1}, {"a": 1, "b": 2}])
def test_an_argument_that_is_in_no_table_is_found(table):
    assert missing(["a", "b", "_c"], table) == [name for name in ("b",) if name not in table]


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([7]), -torch.inf)


class Streamer(BaseStreamer):
    def put(self, value):
        assert value.numel()

    def end(self):
        pass


def sampling(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    return GenerationMixin._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)


def real(value, tokenizer):
    """The objects that stand in the table as words."""
    return {
        "tokenizer": lambda: tokenizer,
        "helper": lambda: build(seed=7),
        "adapted helper": lambda: adapt()[1],
        "ban 7": lambda: [Ban()],
        "at 10": lambda: [lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= 10)],
        "below 50": lambda: lambda row, ids: [*range(3, 50)],
        "streamer": Streamer,
        "other": lambda: torch.tensor([[20, 21, 22], [23, 24, 25], [26, 27, 28]]),
        "padded": lambda: torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "sample": lambda: sampling,
    }.get(value, lambda: value)() if isinstance(value, str) else value  # fmt: skip


@torch.no_grad()
def whole(model, sequences, mask, length):
    """Logits of a whole pass over prompt and answer, the gate reading the prompt alone."""
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    read = mask * (torch.arange(sequences.shape[1]) < length)
    return model(input_ids=sequences, attention_mask=mask, gate_mask=read, use_cache=False).logits


def called(model, name, attempt, tokenizer):
    """The call that a row of the table asks for."""
    one = name in ("streamer", "assistant_model") or "assistant_model" in attempt.beside or "prompt_lookup" in name
    one = one or "prompt_lookup_num_tokens" in attempt.beside or name == "assistant_early_exit"
    inputs = {key: value[1:2] if one else value for key, value in prompt().items()}
    value = {"chunked": GenerationConfig(prefill_chunk_size=4, max_new_tokens=NEW)}.get(str(attempt.value))
    given = dict(max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True) | inputs
    given |= {key: real(each, tokenizer) for key, each in attempt.beside.items()}
    places: list = []
    if attempt.value == "positional":
        places = [given.pop("input_ids")]
        if name == "generation_config":
            places.append(GenerationConfig(max_new_tokens=2, num_beams=2))
            del given["max_new_tokens"]
    elif value is not None:
        places = [given.pop("input_ids"), value]
    else:
        given[name] = real(attempt.value, tokenizer)
    if name == "streamer":
        given["streamer"] = Streamer()
    if name == "negative_prompt_attention_mask":
        given["negative_prompt_ids"] = real("other", tokenizer)
    torch.manual_seed(0)
    return model.generate(*places, **given), inputs, given


ROWS = [
    pytest.param(name, attempt, id=f"{name}-{number}")
    for table in (GENERATION_CONFIG, GENERATE)
    for name, attempts in table.items()
    for number, attempt in enumerate(attempts)
]


@pytest.mark.parametrize(("name", "attempt"), ROWS)
def test_generate(models, tokenizer, name: str, attempt: Try):
    plain, model = models
    if words := attempt.refused or attempt.alike:
        for each in (model, plain) if attempt.alike else (model,):
            with pytest.raises(ValueError if attempt.refused else Exception, match=words):
                called(each, name, attempt, tokenizer)
        return
    out, inputs, given = called(model, name, attempt, tokenizer)
    globals()[f"check_{attempt.equal}"](model, out, inputs, given)


def check_logits(model, out, inputs, given):
    sequences = out.sequences
    each = len(sequences) // len(inputs["input_ids"])
    want = whole(model, sequences, inputs["attention_mask"].repeat_interleave(each, 0), LENGTH)
    beams = getattr(out, "beam_indices", None)
    assert len(out.logits) > 1
    for row in range(len(sequences)):
        for step, got in enumerate(out.logits):
            at = row if beams is None else int(beams[row, step])
            if at < 0 or step + LENGTH >= sequences.shape[1]:
                continue  # a beam that ended earlier
            if (sequences[row, LENGTH : LENGTH + step] == given.get("pad_token_id", 0)).any():
                continue  # a row that ended earlier
            assert relative(got[at], want[row, LENGTH - 1 + step]) < 1e-5, (row, step)


def check_greedy(model, out, inputs, given):
    assert len(inputs["input_ids"]) == 1
    ids = inputs["input_ids"]
    for _ in range(NEW):
        token = whole(model, ids, inputs["attention_mask"], LENGTH)[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
    assert torch.equal(out.sequences, ids)


def check_guided(model, out, inputs, given):
    """Each text is read by a gate of its own, as in plain passes over the one and the other."""
    check_logits(model, out, inputs, given)
    made, scale = out.sequences[:, LENGTH:], given["guidance_scale"]
    other = given.get("negative_prompt_ids", inputs["input_ids"][:, -1:])
    mask = given.get("negative_prompt_attention_mask", torch.ones_like(other))
    texts = ((inputs["input_ids"], inputs["attention_mask"]), (other, mask))
    for step, logits in enumerate(out.logits):
        wanted, against = (
            whole(model, torch.cat([ids, made[:, :step]], 1), seen, ids.shape[1])[:, -1].log_softmax(-1)
            for ids, seen in texts
        )
        token = (against + scale * (wanted - against)).argmax(-1)
        assert torch.equal(token, made[:, step])
        assert relative(logits.log_softmax(-1), wanted) < 1e-5


PAIRS = torch.ones(11, 11).tril().bool()[None, None].expand(3, 1, 11, 11)


def passes(model, name, attempt):
    """The arguments of a pass that a row of the table asks for."""
    ids = batch()["input_ids"].clamp(min=3)
    labels = ids.clone()
    labels[:, :6] = -100
    embeddings = model.get_input_embeddings()(ids)
    given = {"input_ids": ids}
    values = {
        "2-D": torch.ones_like(ids), "4-D": PAIRS,
        "of one row": torch.arange(11)[None], "restarting": torch.cat([torch.arange(6), torch.arange(5)])[None],
        "labels": labels, "some": torch.tensor([3, 8]), "all": torch.ones_like(ids), "embedded": embeddings,
        "sees the answer": PAIRS | True,
    }  # fmt: skip
    if name == "inputs_embeds":
        del given["input_ids"]
    if attempt.value in ("sees the answer", 7):
        given["labels"] = labels
    value = values.get(attempt.value, attempt.value) if isinstance(attempt.value, str) else attempt.value
    if name == "past_key_values":
        tuples = {} if "tuples" not in attempt.value else dict(return_dict=False)
        config = model.config
        cache = StaticCache(config, 16) if attempt.value == "static" else DynamicCache(config=config)
        model(input_ids=ids[:, :6], past_key_values=cache, gate_mask=torch.ones_like(ids[:, :6]), **tuples)
        return {"input_ids": ids[:, 6:], "past_key_values": cache}
    if value not in (NEVER, "neither") if isinstance(value, str) else True:
        given[name] = torch.tensor(value) if name in ("cu_seq_lens_q", "seq_idx") else value
    if name in ("cu_seq_lens_q", "seq_idx") or attempt.value == "restarting":
        given = {key: each[:1] if key == "input_ids" else each for key, each in given.items()}
    return given


PASSES = [
    pytest.param(name, attempt, id=f"{name}-{number}")
    for name, attempts in FORWARD.items()
    for number, attempt in enumerate(attempts)
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "attempt"), PASSES)
def test_forward(models, name: str, attempt: Try):
    plain, model = models
    ids = batch()["input_ids"].clamp(min=3)
    if words := attempt.refused or attempt.alike:
        for each in (model, plain) if attempt.alike else (model,):
            with pytest.raises(ValueError, match=words):
                each(**passes(model, name, attempt))
        return
    given = passes(model, name, attempt)
    out = model(**given)
    got = out.logits if hasattr(out, "logits") else next(each for each in out if isinstance(each, torch.Tensor))
    cached = name == "past_key_values"
    read = torch.arange(11) < (6 if cached or "labels" in given else 11)
    want = model(input_ids=ids, gate_mask=read.long().expand(3, -1), use_cache=False)
    if attempt.equal == "last":
        assert relative(got, want.logits[:, [3, 8] if attempt.value == "some" else [-2, -1]]) < 1e-5
        return
    assert relative(got, want.logits[:, 6:] if cached else want.logits) < 1e-5
    if attempt.equal == "hidden":
        assert [each.shape for each in out.hidden_states] == [(3, 11, 64)] * 7
        assert relative(model.get_output_embeddings()(out.hidden_states[-1]), want.logits) < 1e-5
    if attempt.equal == "loss":
        nats = torch.nn.functional.cross_entropy(
            want.logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten(), reduction="sum"
        )
        torch.testing.assert_close(out.loss, nats / (7 if name == "num_items_in_batch" else 15))


def test_copied_models_refuse_continuous_batching_too(models):
    _, model = models
    for each in (model, copy.deepcopy(model)):
        for name in ("generate_batch", "init_continuous_batching"):
            with pytest.raises(ValueError, match=rf"{name}: continuous batching.*unload"):
                getattr(each, name)([[5, 6, 7]])
