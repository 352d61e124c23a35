"""A cache written in place against transformers' own, which copies everything at every step."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from smartmops.backbone.growing import GrowingLayer, make_room
from tiny_models import build

STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(1, 5)),
    st.tuples(st.just("select"), st.permutations([0, 1])),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("grad"), st.integers(1, 3)),
    st.tuples(st.just("inference"), st.integers(1, 70)),
    st.tuples(st.just("reset"), st.none()),
)


def columns(seed: int, tokens: int) -> torch.Tensor:
    return torch.randn(2, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))


def play(layer: DynamicLayer, step: str, of, seed: int) -> DynamicLayer:
    """One step on a layer, which may be another one afterwards."""
    if step in ("append", "grad", "inference"):
        with torch.inference_mode(step == "inference"), torch.set_grad_enabled(step == "grad"):
            got = layer.update(columns(seed, of), -columns(seed, of))
            assert got[0] is layer.keys and got[1] is layer.values
    elif step == "crop" and layer.get_seq_length() > of:
        layer.crop(-of)
    elif step == "select" and layer.get_seq_length():
        layer.batch_select_indices(torch.tensor(of))
    elif step == "copy":
        return copy.deepcopy(layer)
    elif step == "reset":
        layer.reset()
    return layer


@given(st.lists(STEPS, max_size=12))
def test_it_holds_what_transformers_holds_and_what_it_handed_out_never_changes(steps):
    ours, theirs, handed = GrowingLayer(), DynamicLayer(), []
    for seed, (step, of) in enumerate(steps):
        ours, theirs = play(ours, step, of, seed), play(theirs, step, of, seed)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
            handed.append((ours.keys, theirs.keys.clone()))
    assert all(torch.equal(got, want) for got, want in handed)


@torch.no_grad()
def test_a_step_writes_its_own_columns_and_moves_seldom():
    layer, places = GrowingLayer(), []
    for step in range(1000):
        places.append(layer.update(columns(step, 1), columns(step, 1))[0].data_ptr())
    moves = sum(before != after for before, after in pairwise(places))
    assert 1 <= moves <= 12, f"{moves} moves in 1,000 steps"
    (buffer, _) = layer.buffers["keys"]
    assert buffer.shape[-2] <= 1000 * 1.25 + 64


def test_only_plain_layers_of_an_empty_cache_are_replaced():
    mixed = DynamicCache(config=build("gemma3_text", sliding_window=4).config)
    kinds = [type(layer) for layer in mixed.layers]
    make_room(mixed)
    assert [type(layer) for layer in mixed.layers] == [
        GrowingLayer if kind is DynamicLayer else DynamicSlidingWindowLayer for kind in kinds
    ]
    assert len(set(kinds)) == 2
    full = DynamicCache(config=build().config)
    full.update(columns(0, 3), columns(0, 3), 0)
    make_room(full)
    assert {type(layer) for layer in full.layers} == {DynamicLayer}
    offloaded = DynamicCache(config=build().config)
    offloaded.offloading = True
    make_room(offloaded)
    assert {type(layer) for layer in offloaded.layers} == {DynamicLayer}


@pytest.mark.parametrize("rows", [[[0, 0, 1], [1, 1, 1]], [[0, 1, 1], [0, 0, 1]]])
@torch.no_grad()
def test_columns_that_come_end_to_end_lie_where_the_tokens_are(rows):
    layer, real = GrowingLayer(), torch.tensor(rows).bool()
    layer.arriving = real
    came = torch.randn(1, 3, int(real.sum()), 4)
    key, value = layer.update(came, -came)
    assert key is came and torch.equal(value, -came)
    assert torch.equal(layer.keys.transpose(1, 2)[real], came[0].transpose(0, 1))
    assert not layer.keys.transpose(1, 2)[~real].any() and torch.equal(layer.values, -layer.keys)
    later = columns(0, 1)
    assert torch.equal(layer.update(later, later)[0][..., 3:, :], later)
