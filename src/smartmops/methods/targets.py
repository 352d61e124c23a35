"""The modules that LoRA and IA3 adapt in an architecture: PEFT's own choice, else the same parts by their names."""

from __future__ import annotations

from typing import Any

from peft import IA3Config, LoraConfig
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA,
)

from smartmops.checks.errors import ConfigError

# Where PEFT does not know the architecture: names of what makes queries and values, keys and values, and of what leads
# out of a feed-forward part; the first whose modules are all there.
FUSED = (["query_key_value"], ["qkv_proj"], ["c_attn"], ["Wqkv"])
QUERIES_VALUES = (["q_proj", "v_proj"], *FUSED, ["q_b_proj", "kv_b_proj"], ["q_proj", "kv_b_proj"])
KEYS_VALUES = (["k_proj", "v_proj"], *FUSED, ["kv_b_proj"])
FEEDFORWARD = (["down_proj"], ["fc2"], ["dense_4h_to_h"], ["mlp.c_proj"], ["c_proj"], ["w2"])


def choose(base: Any, config: LoraConfig | IA3Config) -> None:
    """Set `target_modules` (and IA3's `feedforward_modules`) to those of `base`.

    Raises:
        ConfigError: PEFT does not know the architecture, and none of the usual names is found in it.
    """
    kind = base.config.get_text_config().model_type
    if isinstance(config, LoraConfig):
        config.target_modules = _found(base, LORA.get(kind), QUERIES_VALUES, "lora")
        return
    if kind in IA3 and _has(base, IA3[kind]):
        config.target_modules, config.feedforward_modules = list(IA3[kind]), list(IA3_FEEDFORWARD[kind])
        return
    config.feedforward_modules = _found(base, None, FEEDFORWARD, "ia3")
    config.target_modules = _found(base, None, KEYS_VALUES, "ia3") + config.feedforward_modules


def modules(base: Any, targets: list[str]) -> list[Any]:
    """The modules of `base` that have one of these names."""
    ends = tuple(f".{name}" for name in targets)
    return [module for name, module in base.named_modules() if f".{name}".endswith(ends)]


def _has(base: Any, targets: Any) -> bool:
    return isinstance(targets, list) and all(modules(base, [name]) for name in targets)


def _found(base: Any, known: Any, usual: tuple[list[str], ...], method: str) -> list[str]:
    for targets in (known, *usual):
        if _has(base, targets):
            return list(targets)
    raise ConfigError(f"--method {method}: {type(base).__name__} has none of the modules that it adapts "
                      f"({'; '.join(' and '.join(each) for each in usual)}): choose mops or prompt-tuning")  # fmt: skip
