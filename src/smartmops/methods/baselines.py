"""A frozen base and the name of a method in, a trainable model and its parameter groups out. Knows no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig
from transformers import AutoTokenizer

from smartmops.adapter.config import default_injection_layer
from smartmops.base import load_base, local
from smartmops.base.names import CHOICES, readable
from smartmops.checks.errors import BaseModelNotFound, RunError
from smartmops.checks.folders import expanded
from smartmops.experts import keys_values
from smartmops.options.method import MethodConfig
from smartmops.runs.adapters import adapter_on, check_config, load_adapter
from smartmops.runs.folder import Run, check_adapter
from smartmops.states.fingerprint import TOKENIZER, of_tokenizer, of_weights
from smartmops.tokens.template import FILE, read_template
from smartmops.tuner import MoPsConfig, MoPsModel
from smartmops.tuner.engine import Engine

from . import targets


def peft_config(
    config: MethodConfig,
    recovery_prompts: int = 0,
    embedding_size: int | None = None,
    words: dict[str, Any] | None = None,
) -> PeftConfig:
    """The PEFT config of the method; ungated prompts are one expert with all prompts, at the same layer.

    `words` are the fields that say how text is rendered (`answer_header`, `gate_frame`).
    """
    return BUILDERS[config.traits.adapter](config, recovery_prompts, embedding_size, words or {})


def _mops(
    config: MethodConfig, recovery_prompts: int, embedding_size: int | None, words: dict[str, Any]
) -> MoPsConfig:  # fmt: skip
    traits = config.traits
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "injection_layer": config.injection_layer,
        "init": config.init,
        "num_recovery_prompts": recovery_prompts,
        "keep_recovery_prompts": config.keep_recovery_prompts,
        "experts": config.expert_kind,
        "prefix_attention": config.prefix_attention,
        "freeze_first_column": config.freeze_first_column,
        "visible_to": "answers" if config.answers_alone else "all",
        **words,
    }
    if traits.gate == "none":
        prompts = config.number * config.prompts_per_expert + config.shared_prompts
        return MoPsConfig(num_experts=1, prompts_per_expert=prompts, expert_attention="causal", **shared)
    least = config.number if traits.told else 1  # a gate that is told the expert passes a number on for each
    return MoPsConfig(
        num_experts=config.number,
        prompts_per_expert=config.prompts_per_expert,
        gate_target=config.gate_target,
        gate_input=config.gate_input,
        gate_granularity=config.granularity,
        gate_hidden_size=max(config.gate_hidden_size, 2 * config.number if config.closed_form else least),
        gate_bias=config.closed_form,
        gate_layer=config.gate_layer if embedding_size is None else None,
        shared_prompts=config.shared_prompts,
        null_expert=config.leaves_to_base,
        null_threshold=config.null_threshold,
        gate_temperature=config.gate_temperature,
        gate_top_k=1 if traits.one_expert else config.gate_top_k,
        gate_renormalise=config.gate_renormalise and traits.gate != "highest",
        expert_attention=config.expert_attention,
        embedding_size=embedding_size,
        embedder=config.embedder,
        **shared,
    )


BUILDERS: dict[str, Callable[..., PeftConfig]] = {
    "mops": _mops,
    "prompts": lambda config, *_: PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=config.number * config.prompts_per_expert,
        prompt_tuning_init="SAMPLE_VOCAB"),
    "lora": lambda config, *_: LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"], exclude_modules=config.excluded()),
    "ia3": lambda *_: IA3Config(task_type="CAUSAL_LM"),
}  # fmt: skip


def load_run(path: Path) -> tuple[Any, Any, Run]:
    """The adapted model of a run in eval mode, its tokenizer, and the run; a run's own base wins over the one it names.

    The tokenizer's chat template is the one that the run was trained with, or none, whatever the base has today.

    Raises:
        FileNotFoundError: no finished run, or no adapter, at `path`.
        ValueError: the adapter file is damaged, or belongs to another base model.
        BaseModelNotFound: the base is not where it was.
        RunError: the weights of the base, or its tokenizer, have changed since the run was trained.
    """
    run = Run.open(path)
    check_adapter(run.adapter_dir)  # before the base, which may be large
    check_config(run.adapter_dir / "adapter_config.json")
    named = base_of(run)
    with _found(run, named):
        base, tokenizer = load_base(named, run.config["arguments"].get("dtype", "float32"))
    now, then = of_weights(base), run.read_inputs()
    if any(then.get(name, each) != each for name, each in now.items()):
        raise RunError(f"{named} is not the base that {run.path} was trained on, its weights are others: bring "
                       "that one back, or train again")  # fmt: skip
    return load_adapter(base, run.adapter_dir), _as_trained(run, named, tokenizer), run


def tokenizer_of(run: Run) -> Any:
    """The tokenizer of a run as `load_run` returns it, without the base; errors as there."""
    named = base_of(run)
    with _found(run, named), readable(named):
        return _as_trained(run, named, AutoTokenizer.from_pretrained(local(named)))


@contextmanager
def _found(run: Run, named: str) -> Iterator[None]:
    """Says of a base that is not there whose it is, and does not let the hub give one of its name instead."""
    here = f"bring it back, or link it to {run.path / 'base'}"
    if run.lacks(named, expanded(named)):
        elsewhere = "" if Path(named).is_absolute() else ", from another folder"
        raise BaseModelNotFound(f"MODEL {named} does not exist here, but {run.path} was trained on it{elsewhere}: "
                                f"{here}")  # fmt: skip
    try:
        yield
    except BaseModelNotFound as error:
        raise BaseModelNotFound(f"{str(error).removesuffix(f': {CHOICES}')}, but {run.path} was trained on it: "
                                f"{here}") from error  # fmt: skip


def _as_trained(run: Run, named: str, tokenizer: Any) -> Any:
    """A base's tokenizer with the chat template of the run, or none; another tokenizer is refused."""
    then = run.read_inputs().get(TOKENIZER)
    if then is not None and of_tokenizer(tokenizer) != then:
        raise RunError(f"the tokenizer of {named} is not the one that {run.path} was trained with, so the same "
                       "text is other tokens: bring that one back, or train again")  # fmt: skip
    tokenizer.chat_template = read_template(run.adapter_dir / FILE) if (run.adapter_dir / FILE).is_file() else None
    return tokenizer


def base_of(run: Run) -> str:
    """MODEL of a run: the base in its own folder, or the one it names."""
    own = run.path / "base"
    return str(own) if own.is_dir() else str(run.config["base"])


def template_of(run: Run) -> str:
    """The template that a run was trained with, for the tokenizer that `load_run` returns."""
    return "chat" if (run.adapter_dir / FILE).is_file() else "plain"


def matched(base: Any, config: MethodConfig) -> MethodConfig:
    """The settings of LoRA with the rank, and the first layer, that `lora_match` asks for on this base."""
    if config.traits.adapter != "lora" or config.lora_match == "none":
        return config
    hidden, layers = base.config.hidden_size, base.config.num_hidden_layers
    first = config.lora_from
    if config.lora_match == "memory":
        first = default_injection_layer(layers) if config.injection_layer is None else config.injection_layer
    lora: Any = peft_config(config)
    targets.choose(base, lora)
    of_rank_one = sum(map(_both_sides, targets.modules(base, lora.target_modules))) * (layers - first) / layers
    mops: Any = peft_config(replace(config, method="mops"))
    gate = mops.gate_hidden_size * (hidden + config.number) + mops.gate_bias * config.number
    wanted = (config.number * config.prompts_per_expert + config.shared_prompts) * _column(base, config) + gate
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
    adapted = hasattr(base, "mops_engine")
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
    count = len(recovery) if recovery is not None and config.traits.ours else 0
    adapter = peft_config(config, count, width, words)
    if isinstance(adapter, LoraConfig | IA3Config):
        targets.choose(base, adapter)
    model = adapter_on(base, adapter)
    if count and recovery is not None:
        model.base_model.layer().mops_recovery["default"].data.copy_(recovery)
    return model


GATE_SIZE = 0.02  # taken for that of weights that start at zero


def parameter_groups(model: Any, config: MethodConfig) -> list[dict[str, Any]]:
    """Trainable parameters for Adam, each with the rate that suits its size.

    Keys and values are held in units of their own size, so that their rate is relative as it stands; hidden states are
    not. A rate that was given is taken as it is.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [{"params": [parameter], "lr": _rate_of(name, parameter, config)} for name, parameter in trained]


def trained_numbers(model: Any) -> int:
    """How many numbers of a model training changes: those that a gradient reaches."""
    count: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tuner = model.base_model
    return count - tuner.layer().untrained(tuner.active_adapters[0]) if isinstance(tuner, MoPsModel) else count


def _rate_of(name: str, parameter: torch.Tensor, config: MethodConfig) -> float:
    size = float(parameter.detach().float().pow(2).mean().sqrt())
    if "mops_gate" in name:
        return config.gate_lr if config.gate_lr is not None else config.relative_gate_lr * (size or GATE_SIZE)
    if "mops_head_weight" in name:
        return config.head_lr
    relative = config.prompt_lr is None and ("mops_prompts" in name or "mops_shared." in name)
    return config.rate * size if relative else config.rate
