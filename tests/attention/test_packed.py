"""Examples laid end to end give the losses and gradients of the same examples padded, on every architecture."""

from __future__ import annotations

import pytest
import torch

from adapted import adapt
from smartmops.attention import kernels
from smartmops.attention.packed import IGNORED
from tiny_models import KERNELS, VOCABULARY

LENGTHS = (7, 11, 4, 9)


def rows(seed: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same examples padded on the right, and packed; the last four tokens of each are its response."""
    torch.manual_seed(seed)
    longest = max(LENGTHS)
    ids, labels, mask = (torch.full((len(LENGTHS), longest), fill) for fill in (0, IGNORED, 0))
    for i, n in enumerate(LENGTHS):
        ids[i, :n] = torch.randint(3, VOCABULARY, (n,))
        labels[i, n - 3 : n] = ids[i, n - 3 : n]
        mask[i, :n] = 1
    real = mask.bool()
    padded = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return padded, {"input_ids": ids[real], "labels": labels[real], "lengths": torch.tensor(LENGTHS)}


def gradients(model, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def differing(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    """Names of gradients that are not those wanted, up to rounding; every one wanted must be there and not be 0."""
    assert got.keys() == want.keys()
    assert all(grad.abs().max() > 0 for grad in want.values())
    return [name for name, grad in want.items()
            if not torch.allclose(got[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))]  # fmt: skip


@pytest.fixture(params=["padded attention", "merged attention"], autouse=True)
def way(request, monkeypatch):
    """Both ways of attending: segments padded into rows, and one by one with the prefix merged in."""
    monkeypatch.setattr(kernels, "LONG", 1 if request.param == "merged attention" else 10**6)
    return request.param


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_packed_loss_and_gradients_are_those_of_padded_rows(name, kernel):
    _, model = adapt(name, kernel, num_recovery_prompts=2, task_type="CAUSAL_LM")
    padded, packed = rows()
    want, want_grads = gradients(model, **padded, use_cache=False)
    got, got_grads = gradients(model, packed=packed)
    assert got == pytest.approx(want, rel=1e-5)
    assert differing(got_grads, want_grads) == []


@pytest.mark.parametrize(
    "options",
    [
        {"gate_target": "hidden_states"},
        {"expert_attention": "causal"},
        {"gate_granularity": "prompt"},
        {"gate_top_k": 1},
        {"num_experts": 1, "prompts_per_expert": 6},
        {"injection_layer": 0},
        {"injection_layer": 5},
        {"num_recovery_prompts": 2, "keep_recovery_prompts": False},
    ],
    ids=str,
)
def test_every_option_can_be_packed(options):
    _, model = adapt("llama", "sdpa", task_type="CAUSAL_LM", **options)
    padded, packed = rows()
    want, want_grads = gradients(model, **padded, use_cache=False)
    got, got_grads = gradients(model, packed=packed)
    assert got == pytest.approx(want, rel=1e-5)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-9)
