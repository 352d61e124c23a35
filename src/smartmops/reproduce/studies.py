"""What a table or figure compares: its variants, by name, and the cells they make. Runs nothing.

A variant is a line of a table: the settings that set it apart from the others, which all share data, steps and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes:
        label: What the table calls it.
        settings: Of `TrainConfig` or `FederateConfig`.
        among: Settings of which the best on a validation part of the training split is taken.
        over: What is trained first, merged into the base and frozen.
    """

    label: str
    settings: Mapping[str, Any] = field(hash=False)
    among: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    over: Variant | None = None


@dataclass(frozen=True)
class Study:
    """A table or figure.

    Attributes:
        title: Of its page.
        command: That runs a cell.
        bases: Compressed as the paper has it.
        variants: The first is what the others are measured against.
        settings: That all variants share, beside data, steps and seeds.
        note: What a reader must know of the numbers.
    """

    title: str
    command: str
    bases: tuple[str, ...]
    variants: tuple[Variant, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    note: str = ""


def one(method: str, label: str = "", **settings: Any) -> Variant:
    """A variant that is a method, or a method with other settings."""
    return Variant(label or method, {"method": method} | settings)


UNGATED, MOPS = one("prompt-tuning"), one("mops")
LORA = one("lora", lora_rank=2, lora_alpha=32)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of LoRA and IA3, tried on the validation part


def tuned(label: str, method: str, options: Sequence[Mapping[str, Any]], rates: Sequence[float] = RATES) -> Variant:
    """A variant whose rate and options are the best on the validation part."""
    among = tuple({"prompt_lr": rate, **dict(each)} for each in options for rate in rates)
    return Variant(label, {"method": method}, among)


TABLE4 = (
    UNGATED,
    MOPS,
    one("input-prompt-tuning"),
    LORA,
    one("ia3"),
    # Trained numbers as many as MoPs', and, from the injection layer up, no more to keep for the backward pass.
    tuned("lora, tuned", "lora", [{"lora_match": "parameters"}, {"lora_match": "parameters", "lora_rank": 2}]),
    tuned("lora, tuned, same memory", "lora", [{"lora_match": "memory"}]),
    tuned("ia3, tuned", "ia3", [{}], (1e-3, 3e-3, 1e-2, 3e-2)),
)


def ablation() -> Iterator[Variant]:
    """Every row of the design's section 2, the gates that nobody trains, and the literal reading of the paper."""
    yield MOPS
    yield UNGATED
    yield one("mops", "gate acts on hidden states", gate_target="hidden_states")
    yield one("mops", "gate reads the response too", gate_input="sequence")
    yield one("mops", "a gate weight a prompt", gate_granularity="prompt")
    yield one("mops", "experts see each other", expert_attention="causal")
    yield one("mops", "random prompts", init="random")
    yield one("mops", "10 recovery prompts, kept", recovery_prompts=10)
    yield one("mops", "10 recovery prompts, replaced", recovery_prompts=10, keep_recovery_prompts=False)
    yield one("mops", "gate not pretrained", gate_pretraining="none")
    yield one("mops", "gate pretrained on clusters", gate_pretraining="clusters")
    yield one("mops", "gate as pretrained", gate_lr=0.0)
    for count in (1, 2, 14, 28):
        yield one("mops", f"{count} expert{'s' * (count > 1)}", experts=count, gate_pretraining="clusters")
    for count in (1, 2):
        yield one("mops", f"the {count} highest weight{'s' * (count > 1)}", gate_top_k=count)
    yield one("uniform-gate", "even gate")
    yield one("oracle", "told the task")
    yield one("nearest-cluster", "nearest cluster, no gate")
    yield one("top-1", "SMoP's top-1")
    yield one("mops", "the paper to the letter", gate_target="hidden_states", gate_input="sequence",
              expert_attention="causal", init="random", keep_recovery_prompts=False, recovery_prompts=10)  # fmt: skip


FEDERATED = (
    one("fedprompt"),
    one("mops"),
    one("mops", "mops-expert-weighted", aggregation="expert-weighted"),
)

STUDIES = {
    "table2": Study("Central training (paper, table 2)", "train", ("dense", "90%", "85%", "75%", "7:8", "2:4"),
                    (UNGATED, MOPS)),
    "table3": Study("Federated training (paper, table 3)", "federate", ("dense", "75%", "85%", "7:8"), FEDERATED),
    "table4": Study("Against other adapters (paper, table 4)", "train", ("dense", "75%", "85%", "90%"), TABLE4),
    "table5": Study("Federated training on int8 bases (paper, table 5)", "federate",
                    ("int8+75%", "int8+85%", "int8+7:8", "int8+2:4"), FEDERATED[:2]),
    "table6": Study("Against other adapters, int8 bases (paper, table 6)", "train",
                    ("int8", "int8+75%", "int8+85%", "int8+90%"), TABLE4),
    "table8": Study("On top of a trained LoRA (paper, table 8)", "train", ("dense",),
                    (LORA, MOPS, Variant("mops over lora", {"method": "mops"}, over=LORA))),
    "figure3": Study("The injection layer (paper, figure 3)", "train", ("dense", "75%", "85%"), ()),
    "figure4": Study("Prompts of an expert (paper, figure 4)", "train", ("dense", "75%"),
                     tuple(one("mops", f"{count} prompts an expert", prompts_per_expert=count)
                           for count in (10, 1, 2, 5, 20, 40))),
    "figure5": Study("What the gate does before, during and after federated training (paper, figures 5 to 11)",
                     "federate", ("dense",), FEDERATED[1:2]),
    "ablation": Study("Every choice of the method by itself", "train", ("dense",), tuple(ablation()), note=(
        "A gate that reads the response too sees the answer when it is measured, and nothing when it generates: its "
        "perplexity is not comparable, nor is that of the paper to the letter.")),
}  # fmt: skip


def layered(layers: int) -> tuple[Variant, ...]:
    """Figure 3's variants: MoPs and ungated prompts at every layer of a model."""
    return tuple(one(method, f"{method} at layer {layer}", injection_layer=layer)
                 for layer in range(layers) for method in ("mops", "prompt-tuning"))  # fmt: skip
