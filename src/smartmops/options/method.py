"""Options of what is trained on top of a frozen base, and of how its gate starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from smartmops.checks.limits import Count, Number, Positive, Rate, Several, Text, Whole, typed, unused
from smartmops.traits import METHODS, Traits

Method = Literal[
    "mops", "prompt-tuning", "input-prompt-tuning", "lora", "ia3", "uniform-gate", "oracle", "nearest-cluster", "top-1"
]

EMBEDDED_RATE = {
    "hidden_states": 0.3,
    "random": 0.03,
}  # absolute, for hundreds of steps (experiments/office/tuning.json)

FEWEST = 20  # texts of no task that a null expert is fitted by
MOST_PROMPTS = 1_000_000  # of an adapter: more than any model attends to
NONE = "and there are none: choose the method mops"  # by whichever option a command has for that
CHOOSE = "choose the method mops and several --experts"


@dataclass(frozen=True)
class Texts:
    """A text file of enough texts."""

    def wrong(self, value: Path) -> str | None:
        """As `limits.Limit`."""
        try:
            count = len(paragraphs(value.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            return f" cannot be read ({error}): give a UTF-8 text file"
        return None if count >= FEWEST else f" holds {count} texts: give {FEWEST} or more, with an empty line between"


def paragraphs(text: str) -> list[str]:
    """Of a text, without the empty lines between."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


Unrelated = Annotated[Path, Texts()]
Embedder = Annotated[str, Text("a folder or hub id")]
Weight = Number("a weight from 0 (all is left to the base) to 1, or more than 1 (nothing is)", 0)
From = Annotated[float, Weight]


@dataclass
class Trained:
    """What is trained on top of the frozen base."""

    ABOUT: ClassVar[str] = "method"

    method: Method = "mops"
    """mops; the same experts under another gate; the same prompts without one; or PEFT's prompt tuning, LoRA and IA3"""
    lora_rank: Count = 2  # rank of LoRA
    lora_alpha: Count = 32  # alpha of LoRA, which is scaled by alpha / rank
    lora_from: Whole = 0  # first decoder layer (from 0) that LoRA adapts
    lora_match: Literal["none", "parameters", "memory"] = "none"
    """choose LoRA's rank so that as many parameters are trained as by MoPs; memory: from the injection layer up"""


@dataclass
class Experts:
    """How many experts, of what kind, and where the text meets them."""

    ABOUT: ClassVar[str] = "experts"

    experts: Count | None = None  # number of experts; by default one for each task, and 7 where rows name none
    prompts_per_expert: Count = 10  # number of prompts in each expert
    expert_kind: Literal["keys_values", "hidden_states"] = "keys_values"
    """experts are keys and values of every layer from the injection layer up, or hidden states as in the paper"""
    injection_layer: Whole | None = None
    """first decoder layer (from 0) that attends to the experts; by default round(9/32 * layers)"""
    visible_to: Literal["all", "answers"] | None = None
    """text tokens that attend to the experts; by default answers with keys_values, all with hidden_states"""
    shared_prompts: Whole = 0  # number of further prompts that every text attends to at full strength
    freeze_first_column: bool = False  # keep the first prompt of every expert as it was initialised
    prefix_attention: Literal["joint", "separate", "linear"] = "joint"
    """experts share a softmax with the text (joint), have one of their own (separate), or have none (linear)"""
    expert_attention: Literal["isolated", "causal"] = "isolated"
    """hidden-state experts attend to themselves only, or to all prompts before them"""
    init: Literal["hidden_states", "random"] = "hidden_states"
    """experts start from what the base makes of training text, or from random numbers"""


@dataclass
class Gate:
    """What the gate reads, and what its weights act on."""

    ABOUT: ClassVar[str] = "gate"

    gate_layer: Whole | None = None
    """layer whose hidden states the gate reads; by default the one where tasks are easiest to tell apart"""
    gate_target: Literal["attention", "hidden_states"] = "attention"
    """gate weights act on attention to the experts, or scale their hidden states (the paper's Algorithm 1)"""
    gate_input: Literal["instruction", "sequence"] = "instruction"
    """text that the gate reads; sequence includes the answer, which does not exist when generating"""
    gate_granularity: Literal["expert", "prompt"] = "expert"  # one gate weight for each expert, or for each prompt
    gate_hidden_size: Count = 64  # neurons of the gate's hidden layer
    gate_temperature: Positive = 1.0  # scores are divided by it; above 1 the gate is less certain
    gate_top_k: Count | None = None  # number of the highest gate weights that are kept; all by default
    gate_renormalise: bool = True  # do not make the weights that --gate-top-k keeps sum to one
    embedder: Embedder | None = None
    """second model whose embedding of the instruction the gate reads: a folder or hub id"""
    null_expert: bool | None = None
    """leave text unlike the training instructions to the base; by default with keys_values"""
    null_threshold: From = 0.5  # weight of the null expert from which a text is left to the base entirely
    unrelated: Unrelated | None = None
    """file of texts that belong to no task, to fit the null expert; by default those that are included"""


@dataclass
class KeepRecovery:
    """How far up recovery prompts are seen."""

    ABOUT: ClassVar[str] = "preparation"

    keep_recovery_prompts: bool = True  # end recovery prompts at the injection layer, as Algorithm 1 does


@dataclass
class Rates:
    """How fast each part learns."""

    ABOUT: ClassVar[str] = "rates"

    relative_lr: Rate = 0.03  # learning rate of prompts, as a share of their root mean square
    prompt_lr: Rate | None = None
    """rate of LoRA, IA3 and prompts (of keys_values a share of their size); by default --relative-lr, or tuned rates"""
    relative_gate_lr: Rate = 0.003  # learning rate of the gate, as a share of its weights' root mean square
    gate_lr: Rate | None = None  # absolute learning rate of the gate; by default --relative-gate-lr
    head_lr: Rate = 0.02  # learning rate of the weights per head of separate prefix attention, which start at zero


@dataclass
class MethodConfig(Rates, KeepRecovery, Gate, Experts, Trained):
    """What is trained on top of the frozen base, and how fast."""

    @property
    def traits(self) -> Traits:
        """What the method is."""
        return METHODS[self.method]

    @property
    def rate(self) -> float:
        """Adam's rate of everything but the gate; of prompts without a rate of their own, relative to their size."""
        if self.prompt_lr is not None:
            return self.prompt_lr
        return self.relative_lr if self.traits.rate is None else self.traits.rate

    @property
    def answers_alone(self) -> bool:
        """Whether experts are seen by answers alone."""
        return self.visible_to == "answers" or (self.visible_to is None and self.expert_kind == "keys_values")

    @property
    def leaves_to_base(self) -> bool:
        """Whether there is a null expert."""
        wanted = self.expert_kind == "keys_values" if self.null_expert is None else self.null_expert
        return wanted and self.traits.learned

    @property
    def closed_form(self) -> bool:
        """Whether the gate can start from ridge scores."""
        return self.expert_kind == "keys_values" and self.gate_granularity == "expert" and self.traits.learned

    @property
    def number(self) -> int:
        """Of experts; asked once the data have told it where the options leave it open (`reading.early.counted`)."""
        assert self.experts is not None, "the number of experts is that of the tasks, and no data were read"
        return self.experts

    @property
    def several(self) -> bool:
        """Whether there may be more than one expert."""
        return self.experts is None or self.experts > 1

    @property
    def weighs(self) -> bool:
        """Whether a gate may have more than one weight to give out."""
        return self.several or (self.granularity == "prompt" and self.prompts_per_expert > 1)

    @property
    def groups(self) -> int:
        """How many weights a gate gives out."""
        return self.number * (1 if self.granularity == "expert" else self.prompts_per_expert)

    @property
    def granularity(self) -> str:
        """What has a gate weight of its own; who is told an expert opens it whole."""
        return "expert" if self.traits.told else self.gate_granularity

    @property
    def seeks_layer(self) -> bool:
        """Whether the layer that the gate reads is to be found out."""
        given = self.gate_layer is not None or self.embedder is not None
        return not given and self.traits.reads and self.answers_alone

    def under(self, methods: Sequence[str]) -> list[MethodConfig]:
        """The same options under each of some methods."""
        given = {each.name: getattr(self, each.name) for each in fields(MethodConfig)}
        return [MethodConfig(**given | {"method": method}) for method in methods]

    def excluded(self) -> str | None:
        """Names of modules below `lora_from`, as a regular expression."""
        return rf".*\.({'|'.join(map(str, range(self.lora_from)))})\..*" if self.lora_from else None


Teaching = Literal["labels", "clusters", "none"]  # what a gate learns before training


@dataclass
class GatePretraining:
    """How the gate learns which expert an instruction is meant for."""

    ABOUT: ClassVar[str] = "preparation"

    gate_pretraining: Teaching = "labels"
    """what the gate learns before training: the task of an instruction, its cluster, or nothing"""
    gate_start: Literal["auto", "ridge", "gradient"] = "auto"
    """how the gate is pretrained: in closed form (ridge) or by Adam (gradient); auto: ridge with keys_values"""
    gate_pretraining_steps: Whole = 200  # Adam steps of gate pretraining, each on all instructions
    gate_pretraining_lr: Rate = 1e-2  # learning rate of gate pretraining (Adam)
    expert_names: Annotated[tuple[str, ...], Several("summary")] | None = None
    """task of each expert; by default the tasks of the data, sorted"""


def method_problems(config: MethodConfig, methods: Sequence[str]) -> Iterator[str]:
    """What options of our own methods have to do with each other, and with the methods that are trained."""
    ours = any(METHODS[method].ours for method in methods)
    if ours and config.expert_kind == "hidden_states":
        for name, wanted in (("visible_to", config.visible_to == "answers"),
                             ("prefix_attention", config.prefix_attention != "joint")):  # fmt: skip
            if wanted:
                yield (f"{typed(name)} {getattr(config, name)} needs --expert-kind keys_values, but it is "
                       f"hidden_states: choose that, or leave {typed(name)} away")  # fmt: skip
    if ours and config.expert_kind == "keys_values" and config.gate_target == "hidden_states":
        yield ("--gate-target hidden_states scales prompts that run through the layers, and those of --expert-kind "
               "keys_values do not: choose --gate-target attention, or --expert-kind hidden_states")  # fmt: skip
    if ours and config.freeze_first_column and config.prompts_per_expert < 2:
        yield (f"--freeze-first-column with --prompts-per-expert {config.prompts_per_expert} leaves no prompt to "
               "train: choose 2 prompts or more")  # fmt: skip
    if config.gate_top_k is not None and config.experts is not None and config.gate_top_k > config.groups:
        yield (f"--gate-top-k {config.gate_top_k}, but there are {config.groups} gate weights: choose 1 to "
               f"{config.groups}, or leave it away for all")  # fmt: skip
    highest = any(METHODS[each].gate == "highest" for each in methods)
    if highest and config.gate_granularity == "prompt" and config.weighs:
        yield ("--gate-granularity prompt gives every prompt a weight, and top-1 would keep one prompt alone: choose "
               "--gate-granularity expert")  # fmt: skip
    if config.experts is not None and config.experts * config.prompts_per_expert > MOST_PROMPTS:
        yield (f"--experts {config.experts} of --prompts-per-expert {config.prompts_per_expert} are "
               f"{config.experts * config.prompts_per_expert} prompts: choose {MOST_PROMPTS} at most")  # fmt: skip


def method_idle(config: MethodConfig, methods: Sequence[str]) -> Iterator[str]:
    """Which options of experts, gate and rates do nothing as the others are."""
    traits = [METHODS[method] for method in methods]
    ours, lora = any(each.ours for each in traits), any(each.adapter == "lora" for each in traits)
    sized = lora and config.lora_match != "none"  # by experts that are not trained
    experts = f"experts, {NONE}"
    acting = {
        ("lora_alpha", "lora_match"): (lora, "LoRA, which is not trained here: choose that method"),
        ("lora_rank",): (lora and not sized, "LoRA of a given size: choose that method, without --lora-match"),
        ("lora_from",): (lora and config.lora_match != "memory", "LoRA of given layers: choose that method, without "
                                                                 "--lora-match memory"),
        ("experts", "prompts_per_expert"): (ours or sized or any(each.adapter == "prompts" for each in traits),
                                            f"prompts, {NONE}"),
        ("expert_kind", "injection_layer", "shared_prompts"): (ours or sized, experts),
        ("init", "visible_to", "freeze_first_column", "prefix_attention"): (ours, experts),
        ("expert_attention",): (any(each.gate != "none" for each in traits) and config.expert_kind == "hidden_states",
                                "experts that run through the layers: choose the method mops with --expert-kind "
                                "hidden_states"),
        ("gate_renormalise",): (config.gate_top_k is not None, "the weights that --gate-top-k keeps: give that"),
        ("head_lr",): (ours and config.prefix_attention == "separate", "--prefix-attention separate: choose that"),
        ("relative_lr",): (config.prompt_lr is None and any(each.rate is None for each in traits),
                           "prompts without a --prompt-lr: train such"),
    }  # fmt: skip
    for names, (acts, of) in (acting | _gate_acting(config, config.under(methods), sized)).items():
        yield from unused(config, names, acts, f"is of {of}, or leave it away")
    yield from unused(config, ("relative_gate_lr",), config.gate_lr is None, "gives way to --gate-lr: leave one of "
                      "them away")  # fmt: skip


def _gate_acting(
    config: MethodConfig, tried: Sequence[MethodConfig], sized: bool
) -> dict[tuple[str, ...], tuple[bool, str]]:
    """Of options of the gate, whether they act under the methods that are tried, and what they are of."""
    gates = {each.traits.gate for each in tried if each.weighs}
    leaves = any(each.leaves_to_base for each in tried)  # as a single expert may, too
    read, learned = leaves or gates & {"learned", "highest", "even"}, gates & {"learned", "highest"}
    away, shaped = f"and there is none: {CHOOSE}", sized and config.expert_kind == "keys_values"
    return {
        ("gate_target",): (leaves or bool(gates - {"none"}), f"a gate over several experts, {away}"),
        ("gate_granularity",): (shaped or bool(learned or ("even" in gates and config.gate_top_k is not None)),
                                f"a gate that learns, {away}"),
        ("embedder",): (bool(read), f"a gate that reads, {away}"),
        ("gate_layer", "gate_input"): ((bool(read) and config.embedder is None) or "nearest" in gates,
                                       f"a gate that reads the model's own states: {CHOOSE}, without --embedder"),
        ("gate_temperature", "gate_lr", "relative_gate_lr"): (bool(learned), f"a gate that learns, {away}"),
        ("gate_hidden_size",): (bool(learned) or sized, f"a gate that learns, {away}"),
        ("gate_top_k",): (bool(gates & {"learned", "even"}), f"a gate that weighs several experts: {CHOOSE}"),
        ("null_expert",): (any(each.traits.learned for each in tried), "a gate that is taught, and there is none: "
                                                                       "choose the method mops"),
        ("null_threshold", "unrelated"): (leaves, "a null expert, and there is none: choose --null-expert"),
    }  # fmt: skip


def gate_idle(config: GatePretraining, method: MethodConfig, methods: Sequence[str]) -> Iterator[str]:
    """Which options of the gate's pretraining do nothing, because there is none, or in closed form."""
    tried = method.under(methods)
    reads = method.several and any(each.traits.reads for each in tried)
    learned = method.several and any(each.traits.learned for each in tried) and config.gate_pretraining != "none"
    closed = any(each.closed_form for each in tried)
    placed = any(each.seeks_layer and (each.weighs or each.leaves_to_base) for each in tried)
    yield from unused(config, ("gate_pretraining",), reads or placed,
                      f"is of a gate that learns which expert is meant, and there is none: {CHOOSE}, or "
                      "leave it away")  # fmt: skip
    yield from unused(config, ("expert_names",), reads and config.gate_pretraining == "labels",
                      f"is of a gate that learns labels: {CHOOSE}, or leave it away")  # fmt: skip
    yield from unused(config, ("gate_start",), learned, f"is of a gate that is pretrained: {CHOOSE}, or leave it away")
    if learned and not closed and config.gate_start == "ridge":
        yield ("--gate-start ridge needs --expert-kind keys_values and --gate-granularity expert: choose those, or "
               "leave it away")  # fmt: skip
    yield from unused(
        config, ("gate_pretraining_steps", "gate_pretraining_lr"),
        learned and (config.gate_start == "gradient" or not closed),
        "is of a gate that Adam pretrains: choose --gate-start gradient, or leave it away",
    )  # fmt: skip


def gate_problems(config: GatePretraining, experts: int | None) -> Iterator[str]:
    """What the names of experts have to do with their number."""
    names = config.expert_names
    if names is not None and experts is not None and len(names) > experts:
        yield (f"--expert-names {' '.join(names)} are {len(names)} names, but there are --experts {experts}: name "
               f"{experts} at most, or choose --experts {len(names)}")  # fmt: skip


def unmet_by_shape(config: MethodConfig, methods: Sequence[str], layers: int) -> Iterator[str]:
    """Which options name layers that a base of so many `layers` has not got."""
    last = layers - 1
    ours = any(METHODS[method].ours for method in methods)
    if ours and config.injection_layer is not None and config.injection_layer > last:
        yield f"--injection-layer {config.injection_layer}, but this model has {layers} layers: choose 0 to {last}"
    if ours and config.gate_layer is not None and config.gate_layer > layers:
        yield (f"--gate-layer {config.gate_layer}, but this model has {layers} layers: choose 0 to {layers}, or leave "
               "it away")  # fmt: skip
    if config.lora_from > last and any(METHODS[method].adapter == "lora" for method in methods):
        yield f"--lora-from {config.lora_from}, but this model has {layers} layers: choose 0 to {last}"
