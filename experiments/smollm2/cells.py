"""What cells of the ablation and of the questions there are: data sets, variants of settings, and their examples.

Knows files of examples and names of options. Trains nothing.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from smartmops.data.tasks import read
from smartmops.rows.example import Example

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data"
STEPS, BATCH = 150, 4
# Per data set: folders, examples of each task in training, validation and test, longest example in tokens, tasks that are
# only tested (nobody trains on them). Where it differs: steps and batch size, how many tasks are drawn, the share of
# training examples that carry another task's label, the task whose training examples carry two labels.
MIXTURE: dict[str, Any] = {
    "path": ["superni/sapt_superni"], "train": 60, "validation": 15, "test": 30, "longest": 190,
    "unseen": ("task639_multi_woz_user_utterance_generation", "task181_outcome_extraction"),
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "mixture": MIXTURE,
    "paper7": {"path": ["superni/paper7"], "train": 40, "validation": 15, "test": 30, "longest": 290, "unseen": ()},
    "dolly": {"path": ["dolly15k/dolly-15k.jsonl"], "train": 80, "validation": 15, "test": 40, "longest": 190,
              "unseen": ("general_qa",)},
    "wrong-10": MIXTURE | {"wrong": 0.1},
    "wrong-30": MIXTURE | {"wrong": 0.3},
    "split": MIXTURE | {"split": "task875_emotion_classification"},
}  # fmt: skip
for count, steps in ((8, 40), (32, 100), (128, 200)):
    SETS[f"few-{count}"] = MIXTURE | {"train": count, "steps": steps}
for count in (2, 4, 8, 16, 32):
    SETS[f"growth-{count}"] = {
        "path": ["superni/sapt_superni", "superni/ni_v1"], "train": 60, "validation": 5, "test": 20, "longest": 190,
        "unseen": (), "tasks": count, "steps": 100 + 10 * count, "batch": 8,
    }  # fmt: skip
BASES: dict[str, dict[str, Any]] = {  # of `smartmops compress`
    "50": {"sparsity": 0.5}, "75": {"sparsity": 0.75}, "2-4": {"pattern": "2:4"}, "4-8": {"pattern": "4:8"},
    "int8": {"int8": True},
}  # fmt: skip
for name in ("mixture", "paper7"):
    SETS[f"{name}-answers"] = SETS[name] | {"answers": 15}  # of each task are generated and held against the right ones
    SETS |= {f"{name}-{base}": SETS[name] | {"base": base} for base in BASES}
MOPS: dict[str, Any] = {"method": "mops"}
HALF: dict[str, Any] = MOPS | {"shared": 0.5}  # of the columns, from the experts to all
SEPARATE: dict[str, Any] = MOPS | {"prefix_attention": "separate"}
LINEAR: dict[str, Any] = MOPS | {"prefix_attention": "linear"}
UNGATED: dict[str, Any] = {"method": "prompt-tuning"}
LORA: dict[str, Any] = {"method": "lora", "lora_match": "memory", "lora_alpha": 16}
# Every family that is tuned has the same number of rates to choose from; the one without a number is the default's.
VARIANTS: dict[str, dict[str, Any]] = {
    "mops": MOPS,
    "ungated": UNGATED,
    "mops gate rate 0.03": MOPS | {"relative_gate_lr": 0.03},
    "mops gate rate 0.1": MOPS | {"relative_gate_lr": 0.1},
    "mops gate rate 0": MOPS | {"relative_gate_lr": 0.0},
    "mops shared half": HALF,
    "mops shared half gate rate 0.03": HALF | {"relative_gate_lr": 0.03},
    "mops separate": SEPARATE,
    "mops separate shared half": SEPARATE | {"shared": 0.5},
    "mops separate head rate 0.1": SEPARATE | {"head_lr": 0.1},
    "mops separate from the first layer": SEPARATE | {"injection_layer": 0},
    "mops linear": LINEAR,
    "mops hidden states": MOPS | {"expert_kind": "hidden_states"},
    "mops seen by all": MOPS | {"visible_to": "all"},
    "mops shared half seen by all": HALF | {"visible_to": "all"},
    "ungated seen by all": UNGATED | {"visible_to": "all"},
    "mops from the first layer": MOPS | {"injection_layer": 0},
    "mops shared half from the first layer": HALF | {"injection_layer": 0},
    "ungated from the first layer": UNGATED | {"injection_layer": 0},
    "mops top-1": MOPS | {"gate_top_k": 1},
    "mops gate by gradient": MOPS | {"gate_start": "gradient"},
    "mops without null": MOPS | {"null_expert": False},
    "mops first column frozen": MOPS | {"freeze_first_column": True},
    "mops 30 columns": MOPS | {"prompts_per_expert": 30},
    "mops 4 columns": MOPS | {"prompts_per_expert": 4},
    "mops 600 steps": MOPS | {"steps": 600},
    "lora in all layers": LORA | {"lora_match": "parameters", "prompt_lr": 3e-3},
    "mops seen by all from the first layer": MOPS | {"visible_to": "all", "injection_layer": 0},
    "mops separate seen by all": SEPARATE | {"visible_to": "all"},
    "mops separate shared half from the first layer": SEPARATE | {"shared": 0.5, "injection_layer": 0},
    "ungated 30 columns": UNGATED | {"prompts_per_expert": 30},
    "ungated separate": UNGATED | {"prefix_attention": "separate"},
    "uniform gate": {"method": "uniform-gate"},
    "oracle": {"method": "oracle"},
    "nearest cluster": {"method": "nearest-cluster"},
    "mops by clusters": MOPS | {"gate_pretraining": "clusters"},
    "paper's literal": {
        "method": "mops", "expert_kind": "hidden_states", "gate_target": "hidden_states", "gate_input": "sequence",
        "expert_attention": "causal", "init": "random", "null_expert": False, "visible_to": "all",
    },
    "mops top-2": MOPS | {"gate_top_k": 2},
    "ungated 20 columns": UNGATED | {"experts": 2},
    "lora as 20 columns": LORA | {"experts": 2, "prompt_lr": 3e-3},
    "one lora for each task": LORA | {"prompt_lr": 3e-3, "apart": True},
    "one lora for each task behind our gate": LORA | {"prompt_lr": 3e-3, "apart": True, "gated": True},
    "x-lora 300 steps": LORA | {"prompt_lr": 3e-3, "mixed": True},  # half of them of the LoRAs, half of the gate
    "activated lora": LORA | {"prompt_lr": 3e-3, "activated": True},
}  # fmt: skip
WHOLE: dict[str, Any] = {"prefix_attention": "separate", "visible_to": "all", "injection_layer": 0}
VARIANTS |= {
    "mops separate seen by all from the first layer": MOPS | WHOLE,
    "mops separate shared half seen by all from the first layer": HALF | WHOLE,
    "ungated separate seen by all from the first layer": UNGATED | WHOLE,
}
for rate in (0.01, 0.06, 0.1):
    VARIANTS[f"mops separate seen by all from the first layer rate {rate:g}"] = MOPS | WHOLE | {"relative_lr": rate}
for rate in (0.003, 0.01, 0.03):
    VARIANTS[f"ia3 rate {rate:g}"] = {"method": "ia3", "prompt_lr": rate}
    VARIANTS[f"input prompts rate {rate:g}"] = {"method": "input-prompt-tuning", "prompt_lr": rate}
    VARIANTS[f"prefix tuning rate {rate:g}"] = UNGATED | {"prompt_lr": rate, "peft_prefix": True}
FROZEN = ("frozen", "frozen with 4 examples", "frozen with a system prompt")  # nothing is trained
OURS_ALONE = ("shared", "apart", "gated", "mixed", "activated", "peft_prefix")  # what no option of `train` is called
for rate in (0.01, 0.02, 0.06):
    VARIANTS[f"mops rate {rate:g}"] = MOPS | {"relative_lr": rate}
    VARIANTS[f"ungated rate {rate:g}"] = UNGATED | {"relative_lr": rate}
    VARIANTS[f"mops shared half rate {rate:g}"] = HALF | {"relative_lr": rate}
for rate in (0.01, 0.1):
    VARIANTS[f"mops separate rate {rate:g}"] = SEPARATE | {"relative_lr": rate}
    VARIANTS[f"mops linear rate {rate:g}"] = LINEAR | {"relative_lr": rate}
for rate in (3e-4, 1e-3, 3e-3, 1e-2):
    VARIANTS[f"lora rate {rate:g}"] = LORA | {"prompt_lr": rate}


def examples(name: str, tokenizer: Any) -> dict[str, list[Example]]:
    """Training, validation and test examples, of tasks nobody trains on (`unseen`) and of no task (`unrelated`)."""
    if folder := os.environ.get("EXAMPLES"):
        rows = json.loads((Path(folder) / f"{name}.json").read_text())
        return {part: [Example(**row | {"history": ()}) for row in found] for part, found in rows.items()}
    kind = SETS[name]
    every = [example for path in kind["path"] for example in read(str(DATA / path), keep_general_qa=True)]
    random.Random(0).shuffle(every)
    found: dict[str, list[Example]] = {part: [] for part in ("train", "validation", "test", "unseen")}
    taken: dict[str, int] = defaultdict(int)
    texts: set[str] = set()
    plan = [("test", kind["test"]), ("validation", kind["validation"]), ("train", kind["train"])]
    room = sum(count for _, count in plan)
    ends = [(name, sum(c for _, c in plan[: i + 1])) for i, (name, _) in enumerate(plan)]
    for example in every:
        text = f"{example.instruction}\n{example.context}"
        if taken[example.category] >= room or text in texts:
            continue
        if len(tokenizer(f"{text}\n{example.response}")["input_ids"]) > kind["longest"] - 30:
            continue
        texts.add(text)
        number, taken[example.category] = taken[example.category], taken[example.category] + 1
        part = next(name for name, end in ends if number < end)
        if example.category in kind["unseen"]:
            if part == "test":
                found["unseen"].append(example)
        else:
            found[part].append(example)
    kept = _tasks(kind, found["train"])
    for part in ("train", "validation", "test"):
        found[part] = [example for example in found[part] if example.category in kept]
    found["train"] = _labelled(kind, found["train"], sorted(kept))
    found["unrelated"] = paragraphs()
    return found


def _tasks(kind: dict[str, Any], train: list[Example]) -> set[str]:
    """Tasks with enough examples; of a set that draws some of them, those, each draw within the next larger one."""
    counts = Counter(example.category for example in train)
    if "tasks" not in kind:
        fewest = min(10, kind["train"])
        return {task for task, count in counts.items() if count >= fewest}
    full = sorted(task for task, count in counts.items() if count == kind["train"])
    random.Random(0).shuffle(full)
    return set(full[: kind["tasks"]])


def _labelled(kind: dict[str, Any], train: list[Example], tasks: list[str]) -> list[Example]:
    """Training examples with the labels that the set gives them; the gate and the experts' starts read these."""
    draw = random.Random(0)
    found = []
    for number, example in enumerate(train):
        label = example.category
        if draw.random() < kind.get("wrong", 0.0):
            label = draw.choice([task for task in tasks if task != label])
        if label == kind.get("split"):
            label = f"{label} {number % 2 + 1}"
        found.append(replace(example, category=label))
    return found


def paragraphs(count: int = 24) -> list[Example]:
    """Encyclopedic text of no task: the first half of a paragraph asked, the second answered."""
    lines = [line.strip() for line in (DATA / "text" / "wiki.test.raw").read_text(encoding="utf-8").splitlines()]
    chosen = [line for line in lines if 300 < len(line) < 500 and not line.startswith("=")]
    random.Random(0).shuffle(chosen)
    halves = [line.split(" ") for line in chosen[:count]]
    return [Example(" ".join(w[: len(w) // 2]), "", " ".join(w[len(w) // 2 :]), "wiki") for w in halves]
