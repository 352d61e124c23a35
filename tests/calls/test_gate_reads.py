"""The gate reads nothing that does not exist when the answer is generated: whatever comes later is changed, on every road."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

from smartmops import MoPsConfig
from smartmops.calls import reading
from smartmops.checks.errors import AdapterError
from tiny_models import VOCABULARY, build

HEADER, OPEN, CLOSE = [7, 8], [5, 6], 4
FRAME = {"user": OPEN, "header": HEADER, "close": [CLOSE], "system": [9], "default_system": []}
ANSWER = 9  # column of the first token that carries a label, below
KINDS = [
    dict(experts=experts, visible_to=visible, gate_reads=reads, gate_target=target)
    for experts, visible, reads, target in itertools.product(
        ("hidden_states", "keys_values"), ("all", "answers"), ("own", "all"), ("attention", "hidden_states")
    )
    if (experts, visible) != ("hidden_states", "answers") and (experts, target) != ("keys_values", "hidden_states")
]
EVERY = pytest.mark.parametrize("options", KINDS, ids=lambda options: " ".join(options.values()))


def adapt(**options):
    torch.manual_seed(0)
    config = MoPsConfig(**dict(num_experts=3, prompts_per_expert=2, injection_layer=2, gate_hidden_size=8,
                               gate_frame=FRAME, answer_header=HEADER, task_type="CAUSAL_LM") | options)  # fmt: skip
    model = get_peft_model(build(), config).eval()
    torch.nn.init.normal_(model.base_model.layer().mops_gate_out["default"], std=3)
    return model


def said(model, recwarn, **given) -> list[str]:
    with torch.no_grad():
        model(**given)
    return [str(each.message)[:30] for each in recwarn if "gate" in str(each.message) or "expert" in str(each.message)]


@pytest.mark.parametrize("header", [HEADER, []], ids=["header", "no header"])
@pytest.mark.parametrize("labelled", [True, False])
def test_who_scores_an_answer_that_nothing_opens_is_told_that_experts_miss_it(header, labelled, recwarn):
    ids, labels = turns()
    ids, labels = ids[:, : ANSWER + 4], labels[:, : ANSWER + 4]
    model = adapt(experts="keys_values", visible_to="answers", answer_header=header)
    found = said(model, recwarn, input_ids=ids, **{"labels": labels} if labelled else {})
    assert found == (["no labels came with this text,"] if not labelled and not header else [])


@pytest.mark.parametrize("options", [dict(num_experts=1), dict()], ids=["one expert", "told weights"])
def test_a_gate_that_decides_nothing_is_not_worried_about(options, recwarn):
    model = adapt(experts="keys_values", visible_to="answers", gate_reads="own", gate_frame=None, **options)
    ids, _ = turns()
    weights = torch.full((1, options.get("num_experts", 3)), 1 / options.get("num_experts", 3))
    given = {"input_ids": ids} | ({} if options else {"gate_weights": weights})
    assert said(model, recwarn, **given) == []
    three = adapt(experts="keys_values", visible_to="answers", gate_reads="own", gate_frame=None)
    assert said(three, recwarn, input_ids=ids) == ["this adapter's gate was taught"], "where it decides, it is"


def turns() -> tuple[torch.Tensor, torch.Tensor]:
    """A question, its answer, a later question and its answer; labels on the answers but not on what closes the first."""
    torch.manual_seed(1)
    first, answer, later, last = (torch.randint(10, VOCABULARY, (n,)).tolist() for n in (4, 4, 3, 3))
    question = [*OPEN, *first, CLOSE, *HEADER]
    ids = torch.tensor([[*question, *answer, CLOSE, *OPEN, *later, CLOSE, *HEADER, *last, CLOSE]])
    labels = torch.full_like(ids, -100)
    labels[0, ANSWER : ANSWER + 4] = ids[0, ANSWER : ANSWER + 4]
    labels[0, -4:-1] = ids[0, -4:-1]
    return ids, labels


def padded(model, ids, labels):
    model(input_ids=ids, labels=labels)


def left_padded(model, ids, labels):
    """Beside a shorter row, whose gate is its own."""
    gap = torch.full_like(ids[:, :3], 2)
    both = torch.cat([torch.cat([gap, ids], 1), torch.cat([ids, gap], 1)])
    marks = torch.cat([torch.cat([gap * 0 - 100, labels], 1), torch.cat([labels, gap * 0 - 100], 1)])
    mask = torch.ones_like(both)
    mask[0, :3], mask[1, -3:] = 0, 0
    model(input_ids=both, labels=marks, attention_mask=mask)


def packed(model, ids, labels):
    """Behind an example of its own."""
    row, marks = ids[0].repeat(2), labels[0].repeat(2)
    lengths = torch.tensor([ids.shape[1]] * 2)
    model(packed={"input_ids": row, "labels": marks, "lengths": lengths, "headers": torch.tensor([2, 2])})


ROADS = [padded, left_padded, packed]


@EVERY
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
@pytest.mark.filterwarnings("ignore:labels of some rows hold several answers")
@torch.no_grad()
def test_no_later_token_moves_the_gate(road, options):
    model, (ids, labels) = adapt(**options), turns()
    road(model, ids, labels)
    gate = model.base_model.last_gate.clone()
    for column in range(ANSWER, ids.shape[1]):
        other = ids.clone()
        other[0, column] = OPEN[0] if column % 2 else 299  # also what would open a turn
        road(model, other, torch.where(labels == -100, labels, other))
        assert torch.equal(model.base_model.last_gate, gate), f"token {column} is read"
    other = ids.clone()
    other[0, 3] = 299
    road(model, other, labels)
    assert not torch.equal(model.base_model.last_gate, gate), "no token is read at all, so this test shows nothing"


@EVERY
@pytest.mark.filterwarnings("ignore:labels of some rows hold several answers")
@torch.no_grad()
def test_every_road_reads_the_same(options):
    model, (ids, labels) = adapt(**options), turns()
    gates = []
    for road in ROADS:
        road(model, ids, labels)
        gates.append(model.base_model.last_gate[-1])
    assert all(torch.allclose(gate, gates[0], atol=1e-5) for gate in gates)


@EVERY
@pytest.mark.parametrize("masked", ["nothing", "every EOS"])
@pytest.mark.filterwarnings("ignore:labels")
@torch.no_grad()
def test_labels_over_the_whole_text_leave_the_first_token(options, masked):
    """As transformers' collator for language models makes them, which masks every EOS where that also pads."""
    model, (ids, _) = adapt(**options), turns()
    for road in ROADS:
        found = []
        for change in (0, 1):
            other = ids.clone()
            other[0, 2:4] += change
            labels = other.masked_fill(other == CLOSE, -100) if masked == "every EOS" else other
            if road is packed and options["visible_to"] == "answers":
                continue  # refused: experts that answers alone see need something before the answer
            road(model, other, labels)
            found.append(model.base_model.last_gate)
        assert len(found) == 0 or torch.equal(*found)


@EVERY
@pytest.mark.parametrize("way", [dict(prompt_lookup_num_tokens=3), "helper"], ids=["prompt lookup", "assisted"])
@torch.no_grad()
def test_guessed_tokens_are_not_read(options, way):
    model = adapt(**options)
    unit = torch.tensor([[*OPEN, 20, 21, 22, CLOSE, *HEADER]])
    ids = torch.cat([unit, unit], 1)
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, min_new_tokens=5
    )
    want = model.generate(**inputs)
    gate = model.base_model.last_gate
    way = dict(assistant_model=build(seed=3)) if way == "helper" else way
    assert torch.equal(model.generate(**inputs, **way), want)
    assert torch.equal(model.base_model.last_gate, gate)


@torch.no_grad()
def test_a_gate_mask_of_the_prompt_serves_guessed_tokens_too():
    model = adapt()
    ids = torch.tensor([[20, 21, 22, 23, 20, 21, 22, 23, 20, 21]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    mask = (torch.arange(10) < 4).long()[None]
    want = model.generate(**inputs, gate_mask=mask)
    gate = model.base_model.last_gate
    assert torch.equal(model.generate(**inputs, gate_mask=mask, prompt_lookup_num_tokens=3), want)
    assert torch.allclose(model.base_model.last_gate, gate, atol=1e-6)


def conversation() -> tuple[torch.Tensor, torch.Tensor]:
    """A first prompt, and what a user adds to its answer: the end of the turn, a second question and a header."""
    torch.manual_seed(3)
    first, second = (torch.randint(10, VOCABULARY, (n,)).tolist() for n in (6, 5))
    return torch.tensor([[*OPEN, *first, CLOSE, *HEADER]]), torch.tensor([[CLOSE, *OPEN, *second, CLOSE, *HEADER]])


@EVERY
@pytest.mark.parametrize("kind", ["dynamic", "static", "prefilled"])
@pytest.mark.parametrize("known", [{}, {"answer_header": [], "gate_frame": None}], ids=["header", "no header"])
def test_a_further_turn_over_the_same_cache_has_a_gate_of_its_own(options, kind, known):
    model, (first, more) = adapt(**options, **known), conversation()
    cache = StaticCache(model.config, 64) if kind == "static" else DynamicCache(config=model.config)
    if kind == "prefilled":  # as one who keeps the cache of a system prompt does
        with torch.no_grad():
            model(input_ids=first[:, :-2], past_key_values=cache)
        ids = first
    else:
        answered = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
        ids = torch.cat([answered, more], 1)
    got = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    gate = model.base_model.last_gate
    assert torch.equal(got, model.generate(input_ids=ids, max_new_tokens=5, eos_token_id=None))
    torch.testing.assert_close(gate, model.base_model.last_gate, rtol=0, atol=0)


@EVERY
def test_an_answer_that_goes_on_over_its_cache_keeps_its_gate(options):
    model, (first, _) = adapt(**options), conversation()
    whole = model.generate(input_ids=first, max_new_tokens=8, eos_token_id=None)
    gate, cache = model.base_model.last_gate, DynamicCache(config=model.config)
    begun = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=3, eos_token_id=None)
    tokens = cache.get_seq_length()
    passes = []
    model.base_model.model.register_forward_pre_hook(
        lambda m, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(
        whole, model.generate(input_ids=begun, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    )
    assert passes[0] == begun.shape[1] - tokens, "nothing is read again"
    torch.testing.assert_close(gate, model.base_model.last_gate, rtol=0, atol=0)


def test_a_further_turn_by_hand_is_refused():
    model, (first, more) = adapt(experts="keys_values", visible_to="answers"), conversation()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=first, past_key_values=cache)
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)
        with pytest.raises(AdapterError, match="open a further answer, and past_key_values were read for what stood"):
            model(input_ids=more, past_key_values=cache)
    with pytest.raises(AdapterError, match="give the whole conversation to generate, or start from an empty cache"):
        model.generate(input_ids=more, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("told", [{"gate_weights": [[0.0, 1.0, 0.0]]}, {"gate_mask": [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]]}],
                         ids=["weights", "mask"])  # fmt: skip
def test_what_the_gate_is_told_beside_a_filled_cache_is_heard_or_refused(told):
    model, (first, _) = adapt(experts="keys_values", visible_to="answers"), conversation()
    told = {name: torch.tensor(value) for name, value in told.items()}
    want = model.generate(input_ids=first, max_new_tokens=4, eos_token_id=None, **told)
    gate, cache = model.base_model.last_gate, DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=first[:, :-1], past_key_values=cache)
        with pytest.raises(AdapterError, match="past_key_values of 10 tokens, for which the gate was read already"):
            model(input_ids=first[:, -1:], past_key_values=cache, **told)
        with pytest.raises(AdapterError, match="past_key_values of 10 tokens, for which the gate was read already"):
            embeds = model.get_input_embeddings()(first)
            model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=1, **told)
    got = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=4, eos_token_id=None, **told)
    assert torch.equal(got, want) and torch.equal(gate, model.base_model.last_gate)


def test_without_a_header_what_follows_alone_is_refused():
    model, (first, more) = adapt(experts="keys_values", visible_to="answers", answer_header=[]), conversation()
    cache = DynamicCache(config=model.config)
    model.generate(input_ids=first, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    with pytest.raises(AdapterError, match="give the whole text to generate, or start from an empty cache"):
        model.generate(input_ids=more[:, :5], past_key_values=cache, max_new_tokens=2)


def left_and_right() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 12, 9 and 1 tokens padded on the left, and of 10, 7 and 4 on the right; which tokens are real."""
    ids = torch.randint(10, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(4))
    at, lengths = torch.arange(12), torch.tensor([12, 9, 1, 10, 7, 4])[:, None]
    real = torch.where(torch.arange(6)[:, None] < 3, at >= 12 - lengths, at < lengths)
    return ids, real


CAUSAL, EYE = torch.ones(12, 12, dtype=torch.bool).tril(), torch.eye(12, dtype=torch.bool)
MASKS = {
    "keys": lambda real: CAUSAL & real[:, None],
    "keys and themselves": lambda real: CAUSAL & real[:, None] | EYE,
    "both": lambda real: CAUSAL & real[:, None] & real[:, :, None],
    "both and themselves": lambda real: CAUSAL & real[:, None] & real[:, :, None] | EYE,
    "empty rows see all": lambda real: (seen := CAUSAL & real[:, None]) | ~seen.any(-1, keepdim=True),
    "a window of 3": lambda real: CAUSAL & real[:, None] & ~CAUSAL.tril(-3) | EYE,
}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_padding_that_sees_itself_in_a_mask_of_pairs_is_no_text(mask, additive):
    model, (ids, real) = adapt(), left_and_right()
    model(input_ids=ids, attention_mask=real.long())
    read = model.base_model.last_gate
    pairs = mask(real)[:, None]
    assert torch.equal(reading.shown(pairs[:, 0], 0), real)
    if additive:
        pairs = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    found = model(input_ids=ids, attention_mask=pairs)
    assert found.logits[real].isfinite().all()
    if mask is not MASKS["a window of 3"]:  # which this model has none of
        torch.testing.assert_close(model.base_model.last_gate, read, rtol=1e-5, atol=1e-6)


def test_every_token_of_texts_that_do_not_see_each_other_is_real():
    text = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    pairs = (text[:, None] == text) & torch.ones(8, 8, dtype=torch.bool).tril()
    shared = torch.ones(8, 8, dtype=torch.bool).tril()
    shared[5:, 3:5] = False  # two answers behind one prompt
    assert reading.shown(torch.stack([pairs, shared]), 0).all()


@torch.no_grad()
def test_a_token_behind_a_cache_stands_where_it_would_with_a_mask_of_tokens():
    model, (ids, real) = adapt(), left_and_right()
    ids, real, found = ids[:3], real[:3], []
    for pairs in (False, True):
        cache = DynamicCache(config=model.config)
        for first, last in ((0, 10), (10, 11), (11, 12)):
            seen = (MASKS["keys and themselves"](real)[:, None, first:last, :last]) if pairs else real[:, :last].long()
            out = model(input_ids=ids[:, first:last], attention_mask=seen, past_key_values=cache)
        found.append(out.logits)
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-4, atol=1e-5)  # the third is all padding at first


NO_HEADER = {"answer_header": [], "gate_frame": None}


@pytest.mark.parametrize("options", [{}, dict(experts="keys_values"), dict(experts="keys_values", visible_to="answers")],
                         ids=str)  # fmt: skip
@torch.no_grad()
def test_who_gives_a_prompt_in_parts_by_hand_is_told_once_that_the_gate_reads_the_first(options, recwarn):
    model, (first, _) = adapt(**options, **NO_HEADER), conversation()

    def told(*parts, **given) -> int:
        recwarn.clear()
        cache = DynamicCache(config=model.config)
        for part in parts:
            name = "inputs_embeds" if part.is_floating_point() else "input_ids"
            model(**{name: part}, past_key_values=cache, **(given if part is parts[0] else {}))
        return sum("the gate has read what these held at first alone" in str(each.message) for each in recwarn)

    assert told(first, first[:, :1], first[:, 1:2]) == 0, "an answer comes token by token"
    assert told(first[:, :6], first[:, 6:], gate_weights=torch.tensor([[0.0, 1.0, 0.0]])) == 0, "no gate decides"
    assert told(first[:, :6], model.get_input_embeddings()(first[:, 6:])) == 1
    assert told(first[:, :6], first[:, 6:]) == 0, "it was said"


@pytest.mark.parametrize("options", [{}, dict(experts="keys_values"), dict(experts="keys_values", visible_to="answers")],
                         ids=str)  # fmt: skip
@torch.no_grad()
def test_a_prompt_that_was_cropped_and_ends_otherwise_is_read_again_or_refused(options):
    model, (first, _) = adapt(**options, **NO_HEADER), conversation()
    other = first.clone()
    other[:, -3:] = torch.tensor([30, 31, 32])
    want = model.generate(input_ids=other, max_new_tokens=4, eos_token_id=None)

    last = 2 if options.get("visible_to") == "answers" else 1  # where answers alone see experts, their first is unread

    def cropped(tokens: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.cat([other[:, :-last], first[:, -last:]], 1), past_key_values=cache)
        cache.crop(-tokens)
        return cache

    for tokens in (last, last + 1):
        cache = cropped(tokens)
        with pytest.raises(AdapterError, match="input_ids come where past_key_values were cropped, and the gate has"):
            model(input_ids=other[:, -tokens:], past_key_values=cache)
        with pytest.raises(AdapterError, match="inputs_embeds come where past_key_values were cropped"):
            model(inputs_embeds=model.get_input_embeddings()(other[:, -tokens:]), past_key_values=cache)
        with pytest.raises(AdapterError, match="come where past_key_values were cropped"):
            model.generate(input_ids=other[:, -1:], past_key_values=cache, max_new_tokens=1)
        got = model.generate(input_ids=other, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
        assert torch.equal(got, want)


@EVERY
@torch.no_grad()
def test_a_cropped_cache_that_gets_back_what_the_gate_has_read_goes_on(options, recwarn):
    model, (ids, _) = adapt(**options, **NO_HEADER), conversation()
    rows = torch.cat([ids, ids.roll(1, 1)])
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=rows, past_key_values=cache).logits
    gate = model.base_model.last_gate
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    recwarn.clear()
    again = model(input_ids=rows.flip(0)[:, -3:], past_key_values=cache).logits
    torch.testing.assert_close(again.flip(0), logits[:, -3:], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.base_model.last_gate, gate.flip(0)) and not [
        w for w in recwarn if "gate" in str(w.message)
    ]
    model(input_ids=rows[:, :1], past_key_values=cache)
    cache.crop(-1)
    model(input_ids=rows[:, 1:2], past_key_values=cache)  # another token of the answer
