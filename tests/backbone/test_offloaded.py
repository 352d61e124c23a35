"""A base larger than its device: weights that wait in main memory or on disk until they run change no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from smartmops import MoPsConfig, prepare
from smartmops.attention.packed import IGNORED
from smartmops.rows.example import Example
from tiny_models import LAYERS, VOCABULARY, build

KINDS: dict[str, dict[str, Any]] = {
    "keys-values": {"experts": "keys_values"},
    "seen-by-answers": {"experts": "keys_values", "visible_to": "answers"},
    "hidden-states": {},
    "recovered": {"num_recovery_prompts": 2},
}
ROWS, LENGTH, QUESTION = 3, 11, 6


def adapted(base: Any, **options: Any) -> Any:
    own = {"num_experts": 3, "prompts_per_expert": 4, "injection_layer": 2, "gate_hidden_size": 8}
    torch.manual_seed(0)
    return get_peft_model(base, MoPsConfig(**own | options, task_type="CAUSAL_LM"))


def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def answers(model: Any) -> list[list[int]]:
    prompt = ids()[:, :QUESTION]
    return (
        model.eval()
        .generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)[
            :, QUESTION:
        ]
        .tolist()
    )


def learned(model: Any, packed: bool) -> tuple[list[float], list[list[int]]]:
    """Losses of a few steps, and what the model then answers."""
    given = {"input_ids": ids(), "labels": ids()}
    given["labels"][:, :QUESTION] = IGNORED
    if packed:
        lengths = torch.full((ROWS,), LENGTH)
        given = {"packed": {name: value.flatten() for name, value in given.items()} | {"lengths": lengths}}
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, answers(model)


def offloaded(where: str, folder: Path) -> Any:
    base = build()
    if where == "cpu":
        return cpu_offload(base, execution_device=torch.device("cpu"))
    if where == "disk":
        return disk_offload(base, folder, execution_device=torch.device("cpu"))
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu") | {"lm_head": "disk"}
    places |= {f"model.layers.{i}": "cpu" if i < LAYERS // 2 else "disk" for i in range(LAYERS)}
    return dispatch_model(base, places, main_device="cpu", offload_dir=folder)


@pytest.mark.filterwarnings("ignore:the experts of adapter")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("where", ["cpu", "disk", "dispatched"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_wait_elsewhere_train_and_answer_alike(
    kind: str, where: str, packed: bool, tmp_path: Path
) -> None:
    base = offloaded(where, tmp_path)
    assert any(p.is_meta for p in base.parameters())
    model = adapted(base, **KINDS[kind])
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    got, want = learned(model, packed), learned(adapted(build(), **KINDS[kind]), packed)
    assert got[0] == pytest.approx(want[0], rel=1e-6) and len(set(want[0])) > 1
    assert got[1] == want[1]


@pytest.mark.parametrize("kind", ["keys-values", "hidden-states"])
def test_device_map_auto_from_preparing_to_the_trainer(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    build().save_pretrained(tmp_path / "base")
    examples = [Example(f"Name {word} number {i}.", "", f"The {word} {i}.", word) for i in range(6)
                for word in ("apple", "bee", "cat")]  # fmt: skip
    rows = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": [IGNORED] * QUESTION + row[QUESTION:]}
            for row in ids().tolist()]  # fmt: skip

    def run(name: str, **placed: Any) -> tuple[list[float], list[list[int]]]:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **placed)
        assert any(p.is_meta for p in base.parameters()) == bool(placed)
        model = adapted(base, **KINDS[kind])
        prepare(model, tokenizer, examples)
        arguments = TrainingArguments(output_dir=str(tmp_path / name), max_steps=2, logging_steps=1, report_to="none",
                                      per_device_train_batch_size=ROWS, use_cpu=True, disable_tqdm=True,
                                      learning_rate=0.01)  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return [each["loss"] for each in trainer.state.log_history if "loss" in each], answers(model)

    got = run("small", device_map="auto", max_memory={"cpu": 240_000}, offload_folder=tmp_path / "off")
    want = run("large")
    assert got[0] == pytest.approx(want[0], rel=1e-6) and got[1] == want[1]


def test_a_base_that_only_the_first_process_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading of FSDP to false"):
        adapted(build())
