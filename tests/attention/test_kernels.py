"""Every quick way of attending against plain softmax in float64: outputs and all gradients, closed gates included."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adapted import ADAPTER, adapt
from smartmops import MoPsConfig
from smartmops.attention import kernels, merged
from smartmops.attention.context import Prefix
from smartmops.attention.packed import IGNORED, Packed, Segments, each_nats, mean_loss
from smartmops.checks.errors import BaseModelError
from tiny_models import batch, relative

HEADS, WIDTH, PROMPTS, SCALE = 3, 16, 5, 0.3
LEAST = torch.finfo(torch.float32).min
LENGTHS = [6, 1, 9, 4]


def tensors(tokens: int, rows: int = 1, closed: float | None = None) -> list[torch.Tensor]:
    """query, key, value of the text; key and value of the prompts; a bias for each row and prompt."""
    torch.manual_seed(0)
    text = [torch.randn(rows, HEADS, tokens, WIDTH) for _ in range(3)]
    prompts = [torch.randn(1, HEADS, PROMPTS, WIDTH) for _ in range(2)]
    bias = torch.randn(len(LENGTHS) if rows == 1 else rows, PROMPTS)
    if closed is not None:
        bias[:, 2] = bias[0, :] = closed
    return [*text, *prompts, bias]


def plain(query, key, value, prompt_key, prompt_value, bias, segments) -> torch.Tensor:
    """Softmax over all prompts and the token's own segment up to itself, in one row of logits."""
    logits = torch.cat(
        [query @ prompt_key.transpose(-1, -2) * SCALE + bias[segments.of], query @ key.transpose(-1, -2) * SCALE], -1
    )
    tokens = query.shape[-2]
    at = torch.arange(tokens)
    seen = (segments.of[:, None] == segments.of[None]) & (at[None] <= at[:, None])
    hide = torch.cat([torch.zeros(tokens, PROMPTS, dtype=torch.bool), ~seen], -1)
    return logits.masked_fill(hide, -torch.inf).softmax(-1) @ torch.cat([prompt_value, value], -2)


def gradients(function, inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    inputs = [each.clone().requires_grad_(True) for each in inputs]
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, list(torch.autograd.grad((out * weight).sum(), inputs))


@pytest.mark.parametrize("closed", [None, LEAST, -torch.inf])
def test_text_and_prompts_merged_are_one_softmax_in_output_and_gradients(closed):
    segments = Segments(LENGTHS, torch.device("cpu"))
    inputs = tensors(sum(LENGTHS), closed=closed)
    want, want_grads = gradients(lambda *x: plain(*x, segments), [each.double() for each in inputs])
    got, got_grads = gradients(lambda *x: merged.over_segments(*x[:3], x[3:], segments, SCALE), inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for name, mine, right in zip(
        ("query", "key", "value", "prompt key", "prompt value", "bias"), got_grads, want_grads, strict=True
    ):
        assert right.abs().max() > 0, name
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()), msg=name)


@pytest.mark.parametrize("closed", [None, LEAST, -torch.inf])
@pytest.mark.parametrize("short", [merged.SHORT, 0])
def test_what_came_before_a_segment_is_part_of_its_softmax(closed, short, monkeypatch):
    """Two query heads share a key head; one segment has nothing before it."""
    monkeypatch.setattr(merged, "SHORT", short)
    segments, before = Segments(LENGTHS, torch.device("cpu")), torch.tensor([5, 0, *[3] * (len(LENGTHS) - 2)])
    query, key, value, prompt_key, prompt_value, bias = tensors(sum(LENGTHS), closed=closed)
    inputs = [query.repeat(1, 2, 1, 1) + 0.1, key, value, prompt_key, prompt_value, bias]
    past = [torch.randn(len(LENGTHS), HEADS, 5, WIDTH) for _ in range(2)]
    hidden = (torch.arange(5) >= before[:, None])[segments.of].flatten()  # of every token's row of past columns

    def together(query, key, value, prompt_key, prompt_value, bias):
        earlier = [each.double()[segments.of].permute(1, 0, 2, 3).flatten(1, 2)[None] for each in past]
        mine = torch.arange(segments.of.numel()).repeat_interleave(5)[None] == torch.arange(len(segments.of))[:, None]
        logits = (query @ earlier[0].repeat_interleave(2, 1).transpose(-1, -2) * SCALE).masked_fill(
            ~mine | hidden, -torch.inf
        )
        key, value, prompt_key, prompt_value = (
            x.repeat_interleave(2, 1) for x in (key, value, prompt_key, prompt_value)
        )
        prompts = query @ prompt_key.transpose(-1, -2) * SCALE + bias[segments.of]
        at = torch.arange(len(segments.of))
        seen = (segments.of[:, None] == segments.of[None]) & (at[None] <= at[:, None])
        own = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, -torch.inf)
        values = torch.cat([earlier[1].repeat_interleave(2, 1), prompt_value, value], -2)
        return torch.cat([logits, prompts, own], -1).softmax(-1) @ values

    def merging(*x):
        return merged.over_segments(*x[:3], x[3:], segments, SCALE, (*past, before))

    want, want_grads = gradients(together, [each.double() for each in inputs])
    got, got_grads = gradients(merging, inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for name, mine, right in zip(
        ("query", "key", "value", "prompt key", "prompt value", "bias"), got_grads, want_grads, strict=True
    ):
        assert right.abs().max() > 0, name
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()), msg=name)


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("closed", [None, LEAST, -torch.inf])
@pytest.mark.parametrize("times", [1, 2])
def test_inference_over_rows_is_one_softmax(queries, masked, closed, times):
    query, key, value, prompt_key, prompt_value, bias = tensors(7, rows=2, closed=closed)
    query = torch.cat([query, query.flip(-1)], 1)[:, : HEADS * times, -queries:]
    hide = torch.ones(queries, 7, dtype=torch.bool).triu(8 - queries).expand(2, 1, -1, -1).clone()
    if masked:
        hide[0, ..., :3] = True
    mask = torch.zeros(hide.shape).masked_fill(hide, LEAST) if masked else None
    got = merged.over_rows(query, key, value, mask, Prefix(prompt_key, prompt_value, bias).ready(query), SCALE)
    key, value, prompt_key, prompt_value = (
        each.repeat_interleave(times, 1) for each in (key, value, prompt_key, prompt_value)
    )
    logits = torch.cat(
        [
            query @ prompt_key.transpose(-1, -2) * SCALE + bias[:, None, None],
            (query @ key.transpose(-1, -2) * SCALE).masked_fill(hide, -torch.inf),
        ],
        -1,
    ).double()
    want = logits.softmax(-1) @ torch.cat([prompt_value.expand(2, -1, -1, -1), value], -2).double()
    everywhere = ~(hide.all(-1).squeeze(1) & (bias <= LEAST).all(-1)[:, None])
    assert everywhere.any()
    kept = everywhere[:, None, :, None].expand_as(want)
    torch.testing.assert_close(got.double()[kept], want[kept], rtol=1e-5, atol=1e-6)


class Another(kernels.Native):
    """The same kernel under another name, so that it is given the mask."""

    sdpa = False

    @property
    def function(self):
        return ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_the_bias_in_a_head_dimension_is_the_bias_in_the_mask(monkeypatch):
    """The same padded batch, forward and backward, with the extra dimension and with torch's math kernel."""
    found = {}
    for way in ("head dimension", "mask"):
        _, model = adapt("llama", "sdpa", task_type="CAUSAL_LM")
        if way == "mask":
            monkeypatch.setattr(kernels, "_carry", None)  # must not be reached
            for layer in model.get_base_model().mops_engine.layers:
                for module in layer.mops_attention:
                    module.mops_native = Another(module.mops_native.eager, module.mops_native.config)
        inputs = batch()
        unlabelled = inputs["gate_mask"].bool() | (inputs["attention_mask"] == 0)
        labels = inputs["input_ids"].masked_fill(unlabelled, IGNORED)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        found[way] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found["mask"].keys() == found["head dimension"].keys() and found["mask"]
    for name, right in found["mask"].items():
        torch.testing.assert_close(
            found["head dimension"][name], right, rtol=1e-4, atol=1e-5 * float(right.abs().max())
        )


def test_logits_in_chunks_are_logits_at_once(monkeypatch):
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (23,))
    hidden = torch.randn(23, 8, requires_grad=True)
    want = F.cross_entropy(hidden @ weight.T, targets)
    (right,) = torch.autograd.grad(want, hidden)
    monkeypatch.setattr("smartmops.attention.packed.CHUNK", 50 * 4)  # four rows at a time
    got = mean_loss(lambda h: h @ weight.T, hidden, targets, 50)
    (mine,) = torch.autograd.grad(2 * got, hidden)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine, 2 * right)
    each = each_nats(lambda h: h @ weight.T, hidden, targets, 50)
    torch.testing.assert_close(each.mean(), want)


def test_a_segment_never_predicts_the_first_token_of_the_next():
    packed = Packed(
        torch.tensor([3, 2]), torch.tensor([IGNORED, 5, 6, 7, 8]), input_ids=torch.zeros(5, dtype=torch.int64)
    )
    at, targets = packed.targets()
    assert at.tolist() == [0, 1, 3] and targets.tolist() == [5, 6, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.tensor([2, 2])}, "a packed batch of 5 tokens has 5 labels and lengths that add up to 4"),
        ({"input_ids": None}, "holds neither input_ids nor hidden"),
    ],
)
def test_a_packed_batch_that_does_not_fit_is_refused(changes, message):
    whole = {
        "lengths": torch.tensor([3, 2]),
        "labels": torch.zeros(5, dtype=torch.int64),
        "input_ids": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        Packed.of(whole | changes)


def test_a_packed_batch_without_the_causal_task_type_is_refused():
    _, model = adapt()
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM'"):
        model(packed={"lengths": torch.tensor([2]), "labels": torch.tensor([1, 2]), "input_ids": torch.tensor([1, 2])})


@pytest.mark.parametrize(("first", "then"), [("sdpa", "eager"), ("eager", "sdpa")])
@torch.no_grad()
def test_a_kernel_that_is_set_later_serves_adapter_and_base(first, then):
    """Masks are made for the kernel that is set: of none at all, which is causal to sdpa, eager would hide nothing."""
    _, model = adapt(kernel=first)
    ids = batch()["input_ids"][1:2]

    def found() -> list[torch.Tensor]:
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        return [base, model(input_ids=ids).logits, model(**batch()).logits[batch()["attention_mask"].bool()]]

    before = found()
    model.get_base_model().set_attn_implementation(then)
    assert all(relative(got, want) < 1e-5 for got, want in zip(found(), before, strict=True))


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2", "flash_attention_3", "paged|sdpa"])
@torch.no_grad()
def test_a_kernel_that_takes_no_bias_is_refused_after_the_adapter_too(kernel):
    _, model = adapt(task_type="CAUSAL_LM")
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    packed = {"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9), "lengths": torch.tensor([6])}
    model.get_base_model().config._attn_implementation_internal = kernel  # some are not installed here
    for attempt in (
        lambda: model(**given),
        lambda: model(packed=packed),
        lambda: model.generate(**given, max_new_tokens=2),
        lambda: model.generate(**given, max_new_tokens=2, cache_implementation="static"),
        lambda: model.add_adapter("second", MoPsConfig(**ADAPTER, task_type="CAUSAL_LM")),
    ):
        with pytest.raises(BaseModelError, match=f"attn_implementation='{re.escape(kernel)}' cannot carry a gate"):
            attempt()
