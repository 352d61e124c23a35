"""A frozen base and the name of a method in, a trainable model and its parameter groups out. Knows no data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model

from smartmops.base import load_base
from smartmops.data.template import FILE, read_template
from smartmops.tuner import MoPsConfig, keys_values
from smartmops.tuner.config import default_injection_layer
from smartmops.tuner.engine import Engine

from . import targets
from .runs import Run, check_adapter

Method = Literal[
    "mops", "prompt-tuning", "input-prompt-tuning", "lora", "ia3", "uniform-gate", "oracle", "nearest-cluster", "top-1"
]
# The same experts under other gates: even weights; the true task; the nearest centre; the highest weight alone.
OTHER_GATES = ("uniform-gate", "oracle", "nearest-cluster", "top-1")
OURS = ("mops", "prompt-tuning", *OTHER_GATES)  # that enter at the injection layer

EMBEDDED_RATE = {
    "hidden_states": 0.3,
    "random": 0.03,
}  # absolute, for hundreds of steps (experiments/office/tuning.json)
OTHER_RATE = {"input-prompt-tuning": 0.03, "lora": 2e-3, "ia3": 1e-2}


@dataclass
class MethodConfig:
    """What is trained on top of the frozen base."""

    method: Method = "mops"
    experts: int = 7
    prompts_per_expert: int = 10
    expert_kind: Literal["keys_values", "hidden_states"] = "keys_values"  # of every layer from the injection layer up;
    # hidden_states: of that layer, as in the paper
    shared_prompts: int = 0  # columns beside the experts that every row sees at full strength
    prefix_attention: Literal["joint", "separate", "linear"] = "joint"  # with the text in one softmax; in one of its
    # own, weighted per head from zero; or without softmax
    visible_to: Literal["all", "answers"] | None = None  # text tokens that see experts; None: answers, with keys_values
    null_expert: bool | None = None  # leave text unlike the training instructions to the base; None: with keys_values
    null_threshold: float = 0.5  # weight of the null expert from which on a text is left to the base entirely
    unrelated: Path | None = None  # texts of no task, to fit the null expert by; None: those that come with the package
    gate_layer: int | None = None  # layer whose hidden states the gate reads; None: where tasks are told apart best
    # if answers alone see experts, else the injection layer
    injection_layer: int | None = None  # first decoder layer (from 0) that sees the experts; None: round(9/32 * layers)
    gate_target: Literal["attention", "hidden_states"] = "attention"
    gate_input: Literal["instruction", "sequence"] = "instruction"
    gate_granularity: Literal["expert", "prompt"] = "expert"
    expert_attention: Literal["isolated", "causal"] = "isolated"
    init: Literal["hidden_states", "random"] = "hidden_states"
    gate_hidden_size: int = 64
    gate_temperature: float = 1.0
    gate_top_k: int | None = None
    gate_renormalise: bool = True  # False: the weights that gate_top_k leaves do not sum to one
    keep_recovery_prompts: bool = True
    lora_rank: int = 2  # rank r and alpha as in the paper's appendix E
    lora_alpha: int = 32
    lora_from: int = 0  # first decoder layer (from 0) with LoRA
    lora_match: Literal["none", "parameters", "memory"] = "none"  # rank for as many trained numbers as MoPs have;
    # memory: that, and from the injection layer up, so that the backward pass goes no deeper than theirs
    relative_lr: float = 0.03  # Adam's rate for prompts, as a share of their root mean square
    prompt_lr: float | None = None  # the same, absolute, and the rate of LoRA and IA3; None: relative_lr, or tuned ones
    gate_lr: float | None = None  # Adam's rate for the gate; None: a share of 0.003 of its weights' root mean square
    embedder: str | None = None  # a second model that embeds the instruction for the gate: a folder or hub id

    @property
    def rate(self) -> float:
        """Adam's rate of everything but the gate; of prompts without a rate of their own, relative to their size."""
        if self.prompt_lr is not None:
            return self.prompt_lr
        return OTHER_RATE.get(self.method, self.relative_lr)

    @property
    def answers_alone(self) -> bool:
        """Whether experts are seen by answers alone."""
        return self.visible_to == "answers" or (self.visible_to is None and self.expert_kind == "keys_values")

    @property
    def leaves_to_base(self) -> bool:
        """Whether there is a null expert."""
        wanted = self.expert_kind == "keys_values" if self.null_expert is None else self.null_expert
        return wanted and self.method == "mops"

    @property
    def closed_form(self) -> bool:
        """Whether the gate can start from ridge scores."""
        return self.expert_kind == "keys_values" and self.gate_granularity == "expert" and self.method == "mops"

    def _excluded(self) -> str | None:
        """Names of modules below `lora_from`, as a regular expression."""
        return rf".*\.({'|'.join(map(str, range(self.lora_from)))})\..*" if self.lora_from else None

    def peft(
        self, recovery_prompts: int = 0, embedding_size: int | None = None, words: dict[str, Any] | None = None
    ) -> PeftConfig:
        """The PEFT config of the method; ungated prompts are one expert with all prompts, at the same layer.

        `words` are the fields that say how text is rendered (`answer_header`, `gate_frame`).
        """
        prompts = self.experts * self.prompts_per_expert
        if self.method == "lora":
            return LoraConfig(task_type="CAUSAL_LM", r=self.lora_rank, lora_alpha=self.lora_alpha, lora_dropout=0.05,
                              target_modules=["q_proj", "v_proj"], exclude_modules=self._excluded())  # fmt: skip
        if self.method == "ia3":
            return IA3Config(task_type="CAUSAL_LM")
        if self.method == "input-prompt-tuning":
            return PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=prompts, prompt_tuning_init="SAMPLE_VOCAB"
            )
        shared: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "injection_layer": self.injection_layer,
            "init": self.init,
            "num_recovery_prompts": recovery_prompts,
            "keep_recovery_prompts": self.keep_recovery_prompts,
            "experts": self.expert_kind,
            "prefix_attention": self.prefix_attention,
            "visible_to": "answers" if self.answers_alone else "all",
            **(words or {}),
        }
        if self.method == "prompt-tuning":
            return MoPsConfig(num_experts=1, prompts_per_expert=prompts + self.shared_prompts,
                              expert_attention="causal", **shared)  # fmt: skip
        one = self.method in ("oracle", "nearest-cluster", "top-1")
        return MoPsConfig(
            num_experts=self.experts,
            prompts_per_expert=self.prompts_per_expert,
            gate_target=self.gate_target,
            gate_input=self.gate_input,
            gate_granularity=self.gate_granularity,
            gate_hidden_size=max(self.gate_hidden_size, 2 * self.experts if self.closed_form else 0),
            gate_bias=self.closed_form,
            gate_layer=self.gate_layer if embedding_size is None else None,
            shared_prompts=self.shared_prompts,
            null_expert=self.leaves_to_base,
            null_threshold=self.null_threshold,
            gate_temperature=self.gate_temperature,
            gate_top_k=1 if one else self.gate_top_k,
            gate_renormalise=self.gate_renormalise and self.method != "top-1",
            expert_attention=self.expert_attention,
            embedding_size=embedding_size,
            embedder=self.embedder,
            **shared,
        )


def load_run(path: Path) -> tuple[Any, Any, Run]:
    """The adapted model of a run in eval mode, its tokenizer, and the run; a run's own base wins over the one it names.

    The tokenizer's chat template is the one that the run was trained with, whatever the base has today.

    Raises:
        FileNotFoundError: no finished run, or no adapter, at `path`.
        ValueError: the adapter file is damaged, or belongs to another base model.
    """
    run = Run.open(path)
    check_adapter(run.adapter_dir)
    dtype = run.config["arguments"].get("dtype", "float32")
    base, tokenizer = load_base(base_of(run), dtype)
    if (run.adapter_dir / FILE).is_file():
        tokenizer.chat_template = read_template(run.adapter_dir / FILE)
    return PeftModel.from_pretrained(base, run.adapter_dir).eval(), tokenizer, run


def base_of(run: Run) -> str:
    """MODEL of a run: the base in its own folder, or the one it names."""
    own = run.path / "base"
    return str(own) if own.is_dir() else str(run.config["base"])


def template_of(run: Run) -> str:
    """The template that a run was trained with, for the tokenizer that `load_run` returns."""
    return "chat" if (run.adapter_dir / FILE).is_file() else "plain"


def matched(base: Any, config: MethodConfig) -> MethodConfig:
    """The settings of LoRA with the rank, and the first layer, that `lora_match` asks for on this base."""
    if config.method != "lora" or config.lora_match == "none":
        return config
    hidden, layers = base.config.hidden_size, base.config.num_hidden_layers
    first = config.lora_from
    if config.lora_match == "memory":
        first = default_injection_layer(layers) if config.injection_layer is None else config.injection_layer
    lora: Any = config.peft()
    targets.choose(base, lora)
    of_rank_one = sum(map(_both_sides, targets.modules(base, lora.target_modules))) * (layers - first) / layers
    mops: Any = replace(config, method="mops").peft()
    gate = mops.gate_hidden_size * (hidden + config.experts) + mops.gate_bias * config.experts
    wanted = (config.experts * config.prompts_per_expert + config.shared_prompts) * _column(base, config) + gate
    return replace(config, lora_from=first, lora_rank=max(1, round(wanted / of_rank_one)))


def _both_sides(module: Any) -> int:
    """Inputs and outputs of a linear layer; GPT-2's has no names for them, and its weight the other way round."""
    if hasattr(module, "in_features"):
        return int(module.in_features + module.out_features)
    return int(sum(module.weight.shape))


def _column(base: Any, config: MethodConfig) -> int:
    """Trained numbers of one prompt column."""
    if config.expert_kind == "hidden_states":
        return int(base.config.hidden_size)
    layers = int(base.config.num_hidden_layers)
    first = default_injection_layer(layers) if config.injection_layer is None else config.injection_layer
    adapted = "mops_engine" in base.__dict__
    engine = Engine.on(base)
    _, heads, key, value = keys_values.probe(engine.backbone, layers - 1).shape
    if not adapted:
        engine.remove()
    return (layers - first) * heads * (key + value)


def build(
    base: Any, config: MethodConfig, recovery: torch.Tensor | None = None, width: int | None = None,
    words: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The base with a fresh adapter of the method; `recovery` [R, hidden] are frozen prompts at the input.

    Raises:
        ValueError: the settings do not fit the base.
    """
    config = matched(base, config)
    count = 0 if recovery is None or config.method not in OURS else len(recovery)
    adapter = config.peft(count, width, words)
    if isinstance(adapter, LoraConfig | IA3Config):
        targets.choose(base, adapter)
    model = get_peft_model(base, adapter)
    if count and recovery is not None:
        model.base_model.layer().mops_recovery["default"].data.copy_(recovery)
    return model


GATE_SHARE = 0.003  # of the gate's weights: their rate where none is given
HEAD_RATE = 0.02  # of the weights per head, which start at zero and so have no size


def parameter_groups(model: Any, config: MethodConfig) -> list[dict[str, Any]]:
    """Trainable parameters for Adam, each with the rate that suits its size.

    Keys and values are held in units of their own size, so that their rate is relative as it stands; hidden states are
    not. A rate that was given is taken as it is.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [{"params": [parameter], "lr": _rate_of(name, parameter, config)} for name, parameter in trained]


def _rate_of(name: str, parameter: torch.Tensor, config: MethodConfig) -> float:
    size = float(parameter.detach().float().pow(2).mean().sqrt())
    if "mops_gate" in name:
        return config.gate_lr if config.gate_lr is not None else GATE_SHARE * max(size, 0.02)
    if "mops_head_weight" in name:
        return HEAD_RATE
    relative = config.prompt_lr is None and ("mops_prompts" in name or "mops_shared." in name)
    return config.rate * size if relative else config.rate
