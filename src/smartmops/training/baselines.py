"""A frozen base and the name of a method in, a trainable model and its parameter groups out. Knows no data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model

from smartmops.base import load_base
from smartmops.data.template import FILE, read_template
from smartmops.tuner import MoPsConfig
from smartmops.tuner.config import default_injection_layer

from .runs import Run, check_adapter

Method = Literal[
    "mops", "prompt-tuning", "input-prompt-tuning", "lora", "ia3", "uniform-gate", "oracle", "nearest-cluster", "top-1"
]
# The same experts under other gates: even weights; the true task; the nearest centre; the highest weight alone.
OTHER_GATES = ("uniform-gate", "oracle", "nearest-cluster", "top-1")
OURS = ("mops", "prompt-tuning", *OTHER_GATES)  # that enter at the injection layer

# Adam's rates for hundreds of steps (experiments/office/tuning.json); a few dozen steps want ten times as much.
PROMPT_RATE = {"hidden_states": 0.3, "random": 0.03}
OTHER_RATE = {"input-prompt-tuning": 0.03, "lora": 2e-3, "ia3": 1e-2}


@dataclass
class MethodConfig:
    """What is trained on top of the frozen base."""

    method: Method = "mops"
    experts: int = 7
    prompts_per_expert: int = 10
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
    prompt_lr: float | None = None  # Adam's rate for prompts (and for LoRA, IA3); None: the tuned default of the method
    gate_lr: float = 1e-3
    embedder: str | None = None  # a second model that embeds the instruction for the gate: a folder or hub id

    @property
    def rate(self) -> float:
        """Learning rate of everything but the gate."""
        if self.prompt_lr is not None:
            return self.prompt_lr
        return OTHER_RATE.get(self.method, PROMPT_RATE[self.init])

    def _excluded(self) -> str | None:
        """Names of modules below `lora_from`, as a regular expression."""
        return rf".*\.({'|'.join(map(str, range(self.lora_from)))})\..*" if self.lora_from else None

    def peft(self, recovery_prompts: int = 0, embedding_size: int | None = None) -> PeftConfig:
        """The PEFT config of the method; ungated prompts are one expert with all K prompts, at the same layer."""
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
        }
        if self.method == "prompt-tuning":
            return MoPsConfig(num_experts=1, prompts_per_expert=prompts, expert_attention="causal", **shared)
        one = self.method in ("oracle", "nearest-cluster", "top-1")
        return MoPsConfig(
            num_experts=self.experts,
            prompts_per_expert=self.prompts_per_expert,
            gate_target=self.gate_target,
            gate_input=self.gate_input,
            gate_granularity=self.gate_granularity,
            gate_hidden_size=self.gate_hidden_size,
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
    own = run.path / "base"
    dtype = run.config["arguments"].get("dtype", "float32")
    base, tokenizer = load_base(str(own) if own.is_dir() else run.config["base"], dtype)
    if (run.adapter_dir / FILE).is_file():
        tokenizer.chat_template = read_template(run.adapter_dir / FILE)
    return PeftModel.from_pretrained(base, run.adapter_dir).eval(), tokenizer, run


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
    kinds = [m for n, m in base.named_modules() if n.rpartition(".")[2] in ("q_proj", "v_proj")]
    if not kinds:
        raise ValueError("lora_match needs modules named q_proj and v_proj, and this model has none: choose lora_rank")
    of_rank_one = sum(m.in_features + m.out_features for m in kinds) * (layers - first) / layers
    gate = config.gate_hidden_size * (hidden + config.experts)
    wanted = config.experts * config.prompts_per_expert * hidden + gate
    return replace(config, lora_from=first, lora_rank=max(1, round(wanted / of_rank_one)))


def build(base: Any, config: MethodConfig, recovery: torch.Tensor | None = None, width: int | None = None) -> Any:
    """The base with a fresh adapter of the method; `recovery` [R, hidden] are frozen prompts at the input.

    Raises:
        ValueError: the settings do not fit the base.
    """
    config = matched(base, config)
    count = 0 if recovery is None or config.method not in OURS else len(recovery)
    model = get_peft_model(base, config.peft(count, width))
    if count and recovery is not None:
        model.base_model.layer().mops_recovery["default"].data.copy_(recovery)
    return model


def parameter_groups(model: Any, config: MethodConfig) -> list[dict[str, Any]]:
    """Trainable parameters for Adam: the gate at its own rate, the rest at the method's."""
    gate = [p for n, p in model.named_parameters() if p.requires_grad and "mops_gate" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "mops_gate" not in n]
    groups = [{"params": rest, "lr": config.rate}]
    return [*groups, {"params": gate, "lr": config.gate_lr}] if gate else groups
