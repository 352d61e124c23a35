"""Caches whose columns are all there from the start, most of them empty, and prompts without padding."""

from __future__ import annotations

import pytest
import torch

from adapted import adapt
from tiny_models import VOCABULARY, relative

IDS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["static", "sliding_window", "hybrid"])
@pytest.mark.parametrize("options", [{}, dict(gate_target="hidden_states", num_recovery_prompts=2)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_without_padding(name, options, cache, kernel):
    """Such rows come with no mask at all, under which no token may see the empty columns behind it."""
    _, model = adapt(name, kernel, **options)
    out = model.generate(input_ids=IDS, cache_implementation=cache, max_new_tokens=4, eos_token_id=None,
                         output_logits=True, return_dict_in_generate=True)  # fmt: skip
    read = (torch.arange(out.sequences.shape[1]) < 9).long().expand(3, -1)
    with torch.no_grad():
        want = model(input_ids=out.sequences, gate_mask=read, use_cache=False).logits
    for step, got in enumerate(out.logits):
        assert relative(got, want[:, 8 + step]) < 1e-5
