"""Two processes over gloo train what one does with the doubled batch; nobody finishes a run that another has left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smartmops.evaluation.perplexity import Evaluation
from smartmops.flow.trainer import TrainConfig, train
from smartmops.runs import ranks
from smartmops.runs.folder import Run

Make = Callable[..., TrainConfig]

SCRIPT = """
import atexit, dataclasses, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist

RANK = os.environ["RANK"]
folder = Path(sys.argv[1]).parent

def last_word():  # registered first, so it comes last
    (folder / f"group-{RANK}").write_text("open" if dist.is_initialized() else "closed")

atexit.register(last_word)
torch.set_num_threads(1)
from smartmops.fitting import loop
from smartmops.flow.trainer import TrainConfig, train

settings, ill = json.loads(Path(sys.argv[1]).read_text())
step = loop.Trainer.training_step
from smartmops.states.answer_states import AnswerStates
compute, counts = AnswerStates._compute, []

def counted(self, indices, alone=False):
    counts[-1] += len(indices)
    return compute(self, indices, alone)

AnswerStates._compute = counted

def poisoned(self, *args, **kwargs):
    return step(self, *args, **kwargs) * (float("nan") if self.state.global_step == 4 else 1)

def leaves(self, *args, **kwargs):
    if self.state.global_step == 4:
        dist.barrier()  # the first process has logged the step before
        if RANK == "1":
            raise RuntimeError("this process leaves")
    return step(self, *args, **kwargs)

for number, each in enumerate(settings):
    config = TrainConfig(**each | {"out": Path(each["out"])})
    if ill and (RANK == "1" or number):
        loop.Trainer.training_step = leaves if number else poisoned
    counts.append(0)
    try:
        found = train(config)
    except (ValueError, FileExistsError) as error:
        found = f"{type(error).__name__}: {error}"
    print("spoken by", RANK)
    (folder / f"{number}-{RANK}.json").write_text(json.dumps(found))
    (folder / f"computed-{RANK}.json").write_text(json.dumps(counts))
"""


def launch(
    folder: Path, *configs: TrainConfig, ill: bool = False
) -> tuple[subprocess.CompletedProcess[str], list[list[Any]]]:
    """Two processes run `train` on each config; also what each returned, or said as it refused.

    With `ill`, the second process has no number for a loss in the fifth step of the first config, and leaves without
    a word to the first in the fifth step of the second config.
    """
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "settings.json").write_text(json.dumps([[asdict(c) for c in configs], ill], default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "script.py"), str(folder / "settings.json")]
    found = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    said = [[json.loads(f.read_text()) for f in sorted(folder.glob(f"{n}-*.json"))] for n in range(len(configs))]
    return found, said


def closed(folder: Path) -> list[str]:
    """Whether the processes had closed their group when they ended, where they were not killed by the launcher."""
    return [file.read_text() for file in sorted(folder.glob("group-*"))]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """40 examples whose answers have 2 to 41 letters: hardly a step has halves of equally many response tokens."""
    file = tmp_path / "uneven.jsonl"
    rows = [
        {"instruction": f"{word} number {i}.", "response": word[0].upper() * (2 + 2 * i + (word[0] == "b")),
         "category": word[0]}
        for i in range(20)
        for word in ("apple", "banana")
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_the_doubled_batch(config: Make, tmp_path: Path, uneven: Path) -> None:
    """30 training examples are 5 whole steps of an epoch; 8 steps also cross into the second."""

    def both(name: str, size: int, **changes: Any) -> TrainConfig:
        return config(data=str(uneven), out=tmp_path / name, batch_size=size, eval_every=4,
                      validation_share=1 / 6, **changes)  # fmt: skip

    cases: dict[str, dict[str, Any]] = {
        "cached": {"prompt_lr": 0.01},
        "on-disk": {"activations": str(tmp_path / "cache"), "prompt_lr": 0.01, "recovery_prompts": 2},
        "ia3": {"method": "ia3", "prompt_lr": 0.01},
        "answers": {"expert_kind": "keys_values", "prompt_lr": 0.01},
    }
    taken = [both(f"{name}-two", 3, **each) for name, each in cases.items()]
    done, said = launch(tmp_path / "two", *taken, taken[0], replace(taken[0], resume=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert closed(tmp_path / "two") == ["closed"] * 2
    assert [text.split(":")[0] for text in said[-2]] == ["RunExists"] * 2, "the second did not start it again"
    assert said.pop() == said[0] and said.pop(), "taken up again, a finished run is read"
    own = {"train": 15, "validation": 3}  # half of each part's rows
    for computed in (json.loads((tmp_path / "two" / f"computed-{rank}.json").read_text()) for rank in range(2)):
        assert computed[: len(cases)] == [0, 0, 0, sum(own.values())], "each takes its part of the states"
    for (name, each), returned in zip(cases.items(), said, strict=True):
        alone = train(both(f"{name}-one", 6, **each))
        one, two = Run.open(tmp_path / f"{name}-one"), Run.open(tmp_path / f"{name}-two")
        assert returned == [two.read_metrics()] * 2, "both return what the first wrote"
        weights, wanted = adapter(two.path), adapter(one.path)
        assert weights.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
        for metric in ("overall", "per_task"):
            assert two.read_metrics()["perplexity"][metric] == pytest.approx(alone["perplexity"][metric], rel=1e-5)
        assert two.read_metrics()["tokens"] == alone["tokens"]
        assert two.read_metrics()["best"]["step"] == alone["best"]["step"] and two.read_metrics()["gained"]
        rows, expected = two.read_curves(), one.read_curves()
        assert [row["step"] for row in rows] == [row["step"] for row in expected], "each row is logged once"
        assert [r.get("loss", r.get("eval_perplexity")) for r in rows] == pytest.approx(
            [r.get("loss", r.get("eval_perplexity")) for r in expected], rel=1e-4
        )
        assert two.read_gates() is None or two.read_gates()["experts"] == ["a", "b"]  # type: ignore[index]
    assert done.stdout.count("train: 30 examples") == len(cases) and "spoken by 1" not in done.stdout


@pytest.mark.slow
def test_no_run_is_finished_when_one_process_diverges_or_leaves(config: Make, tmp_path: Path) -> None:
    diverging, left = config(out=tmp_path / "diverging"), config(out=tmp_path / "left", save_every=100)
    done, (said, nothing) = launch(tmp_path / "two", diverging, left, ill=True)
    assert closed(tmp_path / "two")[-1] == "closed", "also by who leaves with an error"
    assert len(said) == 2 and said[0] == said[1] and "Diverged: loss became nan at step 5" in said[0]
    assert all(torch.isfinite(value).all() for value in adapter(diverging.out).values())
    assert not Run.open(diverging.out, unfinished=True).finished
    assert done.returncode != 0 and "this process leaves" in done.stderr and not nothing
    run = Run.open(left.out, unfinished=True)
    assert run.last_step() == 4 and not run.finished and not run.adapter_dir.exists()


def test_one_evaluation_of_parts_is_the_evaluation_of_the_whole() -> None:
    parts = [Evaluation(0.0, {"a": 2.0, "b": 8.0}, {"a": 3, "b": 1}), Evaluation(0.0, {"a": 4.0}, {"a": 3})]
    found = Evaluation.merged(parts)
    assert found.tokens == {"a": 6, "b": 1}
    assert found.per_task == pytest.approx({"a": 8**0.5, "b": 8.0})
    assert found.overall == pytest.approx(2 ** ((3 + 6 + 3) / 7))


def test_one_process_is_itself() -> None:
    value = torch.tensor(3.0)
    assert ranks.mean(value) is value and ranks.share(5, value.device) == 1.0 and ranks.rank() == 0
    with pytest.raises(KeyError, match="word"):
        ranks.first_does(lambda: {}["word"])
