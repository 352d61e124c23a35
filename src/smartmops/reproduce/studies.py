"""What a table or figure compares: its variants, by name. Runs nothing.

A variant is a line of a table: the settings that set it apart from the others, which all share data, steps and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["bases", "variants", "curve", "gates", "unseen", "answers", "interference"]  # how a page shows it


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes:
        label: What the table calls it.
        settings: Of `TrainConfig` or `FederateConfig`; `fewer_steps` are taken off the table's.
        among: Settings of which the best on a validation part of the training split is taken.
        like: The variant whose settings are taken over first, chosen ones included.
        over: What is trained first, merged into the base and frozen.
        at: Where it stands on a figure's axis.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    among: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    like: Variant | None = None
    over: Variant | None = None
    at: int | None = None


@dataclass(frozen=True)
class Study:
    """A table or figure.

    Attributes:
        title: Of its page.
        kind: How its page shows it.
        bases: Compressed as the paper has it; choices by validation are made on the first.
        variants: The first is what the others are measured against.
        command: That runs a cell.
        axis: Of a figure: what `Variant.at` is.
        note: What a reader must know of the numbers.
        datas: That the paper has it for, or that say most.
    """

    title: str
    kind: Kind
    bases: tuple[str, ...]
    variants: tuple[Variant, ...]
    command: Literal["train", "federate"] = "train"
    axis: str = ""
    note: str = ""
    datas: tuple[str, ...] = ("dolly", "superni")


def one(method: str, label: str = "", among: Sequence[Mapping[str, Any]] = (), **settings: Any) -> Variant:
    """A variant that is a method, or a method with other settings."""
    return Variant(label or method, {"method": method} | settings, tuple(among))


def rates(*values: float, **settings: Any) -> list[dict[str, Any]]:
    """Adam's rates, each with the same settings."""
    return [{"prompt_lr": value} | settings for value in values]


HIDDEN, RANDOM = (0.3, 1.0, 3.0, 10.0), (0.03, 0.1, 0.3, 1.0)  # rates of prompts from hidden states, and of random ones
UNGATED, MOPS = one("prompt-tuning", among=rates(*HIDDEN)), one("mops", among=rates(*HIDDEN))
LORA = one("lora", lora_rank=2, lora_alpha=32, prompt_lr=1e-3)  # the paper's appendix E
IA3 = one("ia3", prompt_lr=1e-3)
FEW = (1e-3, 3e-3, 1e-2)
TUNED_LORA = one("lora", "lora, tuned", [*rates(*FEW, lora_match="parameters"), *rates(*FEW, lora_match="none")])


def altered(label: str, like: Variant = MOPS, **settings: Any) -> Variant:
    """MoPs with other settings, at the rate chosen for MoPs."""
    return Variant(label, settings, like=like)


TABLE4 = (
    UNGATED,
    MOPS,
    one("input-prompt-tuning", among=rates(0.01, 0.03, 0.1, 0.3)),
    LORA,
    IA3,
    TUNED_LORA,
    one("lora", "lora, tuned, same memory", rates(*FEW, lora_match="memory")),
    one("ia3", "ia3, tuned", rates(3e-3, 1e-2, 3e-2)),
)
LITERAL = {"gate_target": "hidden_states", "gate_input": "sequence", "expert_attention": "causal", "init": "random",
           "keep_recovery_prompts": False, "recovery_prompts": 10}  # fmt: skip


def ablation() -> Iterator[Variant]:
    """Every row of the design's section 2, the gates that nobody trains, and the literal reading of the paper."""
    yield MOPS
    yield UNGATED
    yield one("mops", "gate acts on hidden states", rates(*HIDDEN), gate_target="hidden_states")
    yield altered("gate reads the response too", gate_input="sequence")
    yield altered("a gate weight a prompt", gate_granularity="prompt")
    yield altered("experts see each other", expert_attention="causal")
    yield one("mops", "random prompts", rates(*RANDOM), init="random")
    yield altered("10 recovery prompts, kept", recovery_prompts=10)
    yield altered("10 recovery prompts, kept, same steps", recovery_prompts=10, fewer_steps=20)
    yield altered("10 recovery prompts, replaced", recovery_prompts=10, keep_recovery_prompts=False)
    yield altered("gate not pretrained", gate_pretraining="none")
    yield altered("gate pretrained on clusters", gate_pretraining="clusters")
    yield altered("gate as pretrained", gate_lr=0.0)
    for count in (1, 2, 14, 28):
        yield altered(f"{count} expert{'s' * (count > 1)}", experts=count, gate_pretraining="clusters")
    for count in (1, 2):
        yield altered(f"the {count} highest weight{'s' * (count > 1)}", gate_top_k=count)
    yield altered("even gate", method="uniform-gate")
    yield altered("told the task", method="oracle")
    yield altered("nearest cluster, no gate", method="nearest-cluster")
    yield altered("SMoP's top-1", method="top-1")
    yield one("mops", "the paper to the letter", rates(*RANDOM), **LITERAL)


def layered(layers: int) -> tuple[Variant, ...]:
    """Figure 3's variants: MoPs and ungated prompts at every layer of a model."""
    return tuple(Variant(f"{like.label} at layer {layer}", {"injection_layer": layer}, like=like, at=layer)
                 for layer in range(layers) for like in (UNGATED, MOPS))  # fmt: skip


def held_out(tasks: Sequence[str]) -> tuple[Variant, ...]:
    """Each task unseen in training once: ungated prompts and MoPs on all the others."""
    return tuple(Variant(f"{like.label} without {task}", {"hold_out": task}, like=like)
                 for task in tasks for like in (UNGATED, MOPS))  # fmt: skip


FEDERATED = (
    one("fedprompt"),
    one("mops"),
    one("mops", "mops-expert-weighted", aggregation="expert-weighted"),
)
MEASURED = {"answers_per_task": 20, "interference_examples": 16}
ASKED = tuple(Variant(f"{like.label}, asked", MEASURED, like=like) for like in (UNGATED, MOPS, TUNED_LORA))

STUDIES = {
    "table2": Study("Central training (paper, table 2)", "bases", ("dense", "90%", "85%", "75%", "7:8", "2:4"),
                    (UNGATED, MOPS)),
    "table3": Study("Federated training (paper, table 3)", "bases", ("dense", "75%", "85%", "7:8"), FEDERATED,
                    "federate"),
    "table4": Study("Against other adapters (paper, table 4)", "bases", ("dense", "75%", "85%", "90%"), TABLE4,
                    datas=("dolly",)),
    "table5": Study("Federated training on int8 bases (paper, table 5)", "bases",
                    ("int8+75%", "int8+85%", "int8+7:8", "int8+2:4"), FEDERATED[:2], "federate", datas=("dolly",)),
    "table6": Study("Against other adapters, int8 bases (paper, table 6)", "bases",
                    ("int8", "int8+75%", "int8+85%", "int8+90%"), TABLE4, datas=("dolly",)),
    "table8": Study("On top of a trained LoRA (paper, table 8)", "variants", ("dense",),
                    (TUNED_LORA, MOPS, Variant("mops over lora", like=MOPS, over=TUNED_LORA)), datas=("dolly",)),
    "figure3": Study("The injection layer (paper, figure 3)", "curve", ("dense",), (), axis="injection layer, from 0",
                     datas=("dolly",)),
    "figure4": Study("Prompts of an expert (paper, figure 4)", "curve", ("dense",), tuple(
        Variant(f"{like.label}, {count} prompts an expert", {"prompts_per_expert": count}, like=like, at=count)
        for count in (1, 2, 5, 10, 20, 40) for like in (UNGATED, MOPS)), axis="prompts an expert (of seven)",
        datas=("dolly",)),
    "figure5": Study("What the gate does before, during and after federated training (paper, figures 5 and 9 to 11)",
                     "gates", ("dense",), FEDERATED[1:2], "federate"),
    "figure6": Study("What the gate does before, during and after central training (paper, figures 6 to 8)",
                     "gates", ("85%", "75%", "7:8"), (MOPS,)),
    "ablation": Study("Every choice of the method by itself", "variants", ("dense",), tuple(ablation()), note=(
        "A gate that reads the response too sees the answer when it is measured, and has none to see when it "
        "generates: its perplexity, and that of the paper to the letter, are not comparable with the others.")),
    "unseen": Study("Tasks never seen in training", "unseen", ("dense",), ()),
    "answers": Study("Answers, not only perplexity", "answers", ("dense",), ASKED),
    "interference": Study("Interference: do the tasks' gradients agree?", "interference", ("dense",), ASKED[:2]),
}  # fmt: skip
