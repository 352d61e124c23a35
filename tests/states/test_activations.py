"""Cached activations give the losses, gradients and gate inputs of uncached ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import EXAMPLES, adapted, apart, fill, gradients, made_up, over, packed, same
from transformers import Trainer, TrainingArguments

from smartmops.base import load_base
from smartmops.states.fingerprint import fingerprint
from smartmops.tokens.batches import IGNORED, Collator, encode_all


@pytest.mark.parametrize(
    "options", [{}, {"num_recovery_prompts": 2}, {"injection_layer": 0}, {"gate_target": "hidden_states"}], ids=str
)
def test_cached_loss_and_gradients_are_the_uncached_ones(options: dict[str, Any]) -> None:
    model, rows = adapted(**options), made_up()
    cache = fill(model, rows, budget=40)
    for chosen in ([0, 1, 2, 3, 4, 5, 6, 7], [6, 1, 3]):
        got, want = gradients(model, cache.batch(chosen)), gradients(model, packed([rows[i] for i in chosen]))
        assert all(share <= 1e-5 for share in apart(got, want).values())


def test_a_bfloat16_cache_of_a_float32_model_is_close() -> None:
    model, rows = adapted(), made_up()
    cache = fill(model, rows, dtype="bfloat16")
    assert cache.batch([0])["hidden"].dtype == torch.bfloat16
    got, want = gradients(model, cache.batch(range(8))), gradients(model, packed(rows))
    assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-2)
    assert not torch.equal(got["loss"], want["loss"])


def test_a_bfloat16_model_loses_nothing_by_its_cache() -> None:
    rows = sorted(made_up(), key=lambda row: len(row.input_ids))  # so that both paths run the same rows side by side
    model = adapted(torch.bfloat16)
    cache = fill(model, rows)
    assert cache.dtype == torch.bfloat16
    got, want = gradients(model, cache.batch(range(8))), gradients(model, packed(rows))
    assert all(share <= 0.0 for share in apart(got, want).values())


def test_what_is_kept_does_not_depend_on_order_or_company() -> None:
    model, rows = adapted(), made_up()
    there, back = fill(model, rows, budget=30), fill(model, rows[::-1], budget=1000)
    for i in range(8):
        one, other = there.batch([i]), back.batch([7 - i])
        for name in ("hidden", "pooled"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    alone, together = [there.batch([i]) for i in (5, 2)], there.batch([5, 2])
    for name, value in together.items():
        assert torch.equal(value, torch.cat([each[name] for each in alone])), name
    assert together["lengths"].tolist() == [25, 4]
    assert together["labels"].tolist() == rows[5].labels + rows[2].labels


def test_what_the_gate_reads_is_what_the_padded_path_reads(tokenizer: Any) -> None:
    model, rows = adapted(num_recovery_prompts=2), encode_all(EXAMPLES, tokenizer, 200).rows
    cache = fill(model, rows, budget=100)
    padded = Collator(tokenizer)(rows)
    read = padded["attention_mask"].bool() & (padded["labels"] == IGNORED)
    want = model.base_model.pooled(padded["input_ids"], padded["attention_mask"], read)
    torch.testing.assert_close(cache.pooled, want, rtol=1e-4, atol=1e-5)


def test_a_gate_that_reads_the_sequence_gets_the_mean_over_all_of_it() -> None:
    with pytest.warns(UserWarning, match="gate_input='sequence'"):
        model = adapted(gate_input="sequence")
    cache = fill(model, made_up())
    for i in range(8):
        torch.testing.assert_close(cache.pooled[i], cache.batch([i])["hidden"].mean(0), rtol=1e-4, atol=1e-5)


def test_a_gate_that_reads_embeddings_gets_them(tmp_path: Path) -> None:
    rows = [replace(row, gate_embedding=torch.randn(5)) for row in made_up()]
    model = adapted(embedding_size=5, embedder="some/encoder")
    cache = fill(model, rows, tmp_path)
    assert torch.equal(cache.pooled, torch.stack([row.gate_embedding for row in rows]))
    got, want = gradients(model, cache.batch([3, 0])), gradients(model, packed([rows[3], rows[0]]))
    assert all(share <= 1e-5 for share in apart(got, want).values())
    with pytest.raises(ValueError, match="embeddings of width 5: give every row one"):
        fill(model, [rows[0], replace(rows[1], gate_embedding=None)])
    changed = [replace(rows[0], gate_embedding=rows[0].gate_embedding + 1), *rows[1:]]
    assert fingerprint(model, changed, cache.dtype) != cache.key


def test_dropout_is_off_while_filling_and_every_module_is_left_in_its_mode() -> None:
    model, rows = adapted(), made_up()
    want = fill(model, rows)
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    same(fill(model, rows), want)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


def test_an_int8_base_can_be_cached(base_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="int8 needs pip install 'smartmops[int8]'")
    own, _ = load_base(str(base_folder), "stored", "int8")
    model, rows = over(own), made_up()
    cache = fill(model, rows, tmp_path, budget=50)
    got, want = gradients(model, cache.batch([4, 1, 6])), gradients(model, packed([rows[i] for i in (4, 1, 6)]))
    assert all(share <= 1e-4 for share in apart(got, want).values())
    assert fingerprint(model, rows, cache.dtype) == cache.key, "a pass must not change what the weights are"
    again, _ = load_base(str(base_folder), "stored", "int8")
    assert fingerprint(over(again), rows, cache.dtype) == cache.key
    own.model.layers[0].mlp.up_proj.state_dict()["SCB"][0] *= 2
    assert fingerprint(model, rows, cache.dtype) != cache.key


def test_the_trainer_trains_from_it(tmp_path: Path) -> None:
    model, rows = adapted(), made_up()
    cache = fill(model, rows, tmp_path / "cache")
    before = float(gradients(model, packed(rows))["loss"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.1, report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=range(len(cache)), data_collator=cache).train()
    assert float(gradients(model, packed(rows))["loss"]) < before - 0.05  # dropout is on
