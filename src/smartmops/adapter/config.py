"""All options of the method in one PEFT config. Knows names and limits; touches no tensor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from smartmops.checks.errors import AdapterError, ConfigError

from . import stored, typed
from .registry import member

CHOICES = {
    "gate_target": ("attention", "hidden_states"),
    "gate_input": ("instruction", "sequence"),
    "gate_granularity": ("expert", "prompt"),
    "expert_attention": ("isolated", "causal"),
    "init": ("hidden_states", "random"),
    "experts": ("hidden_states", "keys_values"),
    "prefix_attention": ("joint", "separate", "linear"),
    "visible_to": ("all", "answers"),
    "gate_reads": ("all", "own"),
}


def default_injection_layer(layers: int) -> int:
    """9 of 32 decoder layers (from 0), and the same share of any other number: the paper's L_int is one more."""
    return round(9 / 32 * layers)


@dataclass
class MoPsConfig(PeftConfig):
    """Mixture of Prompts: `num_experts` groups of soft prompts enter a frozen decoder at `injection_layer`.

    Symbols of the paper: E = `num_experts`, P = `prompts_per_expert`, K = E * P, L_int = `injection_layer` + 1,
    d_g = `gate_hidden_size`. One expert (E = 1) is ungated prompt tuning: a softmax over one is 1.

    Raises:
        AdapterError, ConfigError: an option is outside its limits; the message names value, limit and way out.
    """

    num_experts: int = 7
    prompts_per_expert: int = 10
    injection_layer: int | None = None  # first layer (from 0) that attends to experts; None: round(9/32 * layers)
    gate_hidden_size: int = 64
    gate_temperature: float = 1.0
    gate_top_k: int | None = None  # only the k highest gate weights stay, renormalised; None: all
    gate_renormalise: bool = True  # whether the weights that `gate_top_k` leaves sum to one; False: they stay (SMoP)
    gate_target: str = "attention"  # "hidden_states" is Algorithm 1 to the letter
    gate_input: str = "instruction"  # "sequence" (Algorithm 1) also reads the response, which leaks
    gate_granularity: str = "expert"  # "prompt": one gate weight per prompt
    expert_attention: str = "isolated"  # "causal": prompts attend to all earlier prompts
    init: str = "hidden_states"  # what `prepare` and `train` start experts from; a bare adapter starts random
    num_recovery_prompts: int = 0  # frozen prompts at the input (P^1 of the paper)
    keep_recovery_prompts: bool = True  # False: seen only below the injection layer, as in Algorithm 1
    embedding_size: int | None = None  # width of an external embedding; None: the gate reads the model itself
    embedder: str | None = None  # who computes that embedding: a folder or hub id (paper, footnote 3)
    expert_names: list[str] | None = None  # what each expert is meant for
    experts: str = "hidden_states"  # of one layer, as in the paper; "keys_values": of every layer from there up
    freeze_first_column: bool = False  # the first column of every expert stays as it starts (Cartridges do so)
    shared_prompts: int = 0  # columns beside the experts that every row sees at full strength
    prefix_attention: str = "joint"  # with the text in one softmax; "separate": in one of its own, weighted per head
    # from zero (LLaMA-Adapter); "linear": without softmax, values from zero (PrefixMemory-Tuning). The latter two need
    # experts="keys_values"
    visible_to: str = "all"  # text tokens that see experts; "answers": the assistant's header and answer alone
    answer_header: list[int] | None = None  # token ids that open an answer, for visible_to="answers"
    gate_reads: str = "all"  # of a prompt; "own": what user and application wrote, not what a template writes around it
    gate_frame: dict[str, list[int]] | None = None  # token ids around what the gate reads (see reading.py)
    gate_layer: int | None = None  # layer (from 0) whose entering hidden states the gate reads; None: injection_layer
    gate_bias: bool = False  # whether the gate adds a constant to each score (a closed-form start needs one)
    null_expert: bool = False  # whether text unlike all training instructions is left to the base (see null.py)
    null_threshold: float = 0.5  # null weight from which on no column is seen at all; 0: always, above 1: never
    routes: list[int] | None = None  # the expert that each row of the gate, then each rule of an expert added later,
    # leads to (see routes.py); None: each row to its own
    claims: int = 0  # rules of experts added later
    expert_scale: list[float] | None = None  # G in log(G * g), of each expert; None: num_experts, or prompts
    frozen_experts: list[str] | None = None  # names of experts that further training leaves as they are
    initialised: bool = False  # filled in: whether experts started from text, or were loaded
    key_value_shape: list[int] | None = None  # filled in: layers, key heads, width of keys, width of values
    modules_to_save: list[str] | None = None
    base_hidden_size: int | None = field(default=None, metadata={"help": "filled in: hidden size of the base model"})
    base_num_layers: int | None = field(default=None, metadata={"help": "filled in: layers of the base model"})
    target_modules: Any = field(default=None, repr=False)  # filled in: the injection layer's name

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = member("MOPS")
        own = {name: getattr(self, name) for name in type(self).__annotations__}
        if (said := typed.wrong(own, MoPsConfig)) is not None:
            raise ConfigError(f"{said}: give one that is")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, allowed))}")
        for name in ("num_experts", "prompts_per_expert", "gate_hidden_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: choose 1 or more")
        if self.freeze_first_column and self.prompts_per_expert < 2:
            raise ConfigError(f"freeze_first_column with prompts_per_expert={self.prompts_per_expert} leaves no "
                              "prompt to train: choose 2 prompts or more")  # fmt: skip
        self._check_key_values()
        if self.gate_input == "sequence":
            warnings.warn("gate_input='sequence': in training the gate also reads the response, which does not exist "
                          "when generating, so perplexities are not comparable", stacklevel=3)  # fmt: skip
        if self.num_recovery_prompts < 0:
            raise ConfigError(f"num_recovery_prompts={self.num_recovery_prompts}: choose 0 or more")
        if not self.gate_temperature > 0:
            raise ConfigError(f"gate_temperature={self.gate_temperature}: choose a number above 0")
        if self.gate_top_k is not None and not 1 <= self.gate_top_k <= self.num_rows:
            raise ConfigError(f"gate_top_k={self.gate_top_k}, but there are {self.num_rows} gate weights: choose 1 to "
                             f"{self.num_rows}, or None for all")  # fmt: skip
        if self.expert_names is not None and len(self.expert_names) != self.num_experts:
            raise ConfigError(
                f"{len(self.expert_names)} expert_names for num_experts={self.num_experts}: give one each"
            )
        self._check_routes()

    def _check_routes(self) -> None:
        """What `smartmops experts` writes."""
        routes = self.routes
        if (self.claims < 0 or (self.claims and routes is None)) or (routes is not None and (
            len(routes) <= self.claims or not set(routes) <= set(range(self.num_experts))
            or self.gate_granularity != "expert"
        )):  # fmt: skip
            raise ConfigError(f"routes={routes!r:.80} with claims={self.claims}: give an expert from 0 to "
                             f"{self.num_experts - 1} for each row of the gate and each claim, and gate_granularity="
                             "'expert'")  # fmt: skip
        scale = self.expert_scale
        if scale is not None and (len(scale) != self.num_experts or not all(0 < each < 1e30 for each in scale)):
            raise ConfigError(f"expert_scale={scale!r:.80}: give a number above 0 for each of the {self.num_experts} "
                             "experts, or None")  # fmt: skip
        if unknown := [name for name in self.frozen_experts or [] if name not in self.named_experts]:
            raise ConfigError(f"frozen_experts has {unknown[0]!r}, which is none of {self.named_experts}: name experts")

    def _check_key_values(self) -> None:
        shape = self.key_value_shape
        if shape is not None and (len(shape) != 4 or min(shape) < 1):
            raise ConfigError(f"key_value_shape={shape!r:.80}: it is filled in, with 4 numbers from 1")
        if self.shared_prompts < 0:
            raise ConfigError(f"shared_prompts={self.shared_prompts}: choose 0 or more")
        if self.experts == "keys_values":
            if self.gate_target == "hidden_states":
                raise ConfigError("gate_target='hidden_states' scales prompts that run through the layers, and "
                                  "experts='keys_values' do not: choose gate_target='attention'")  # fmt: skip
            if self.visible_to == "answers" and self.num_recovery_prompts:
                raise ConfigError(f"num_recovery_prompts={self.num_recovery_prompts} are seen by every token, and "
                                  "visible_to='answers' leaves instructions to the bare base: choose 0 of them, or "
                                  "visible_to='all'")  # fmt: skip
            return
        for name, only in (("prefix_attention", "joint"), ("visible_to", "all")):
            if getattr(self, name) != only:
                raise ConfigError(f"{name}={getattr(self, name)!r} needs experts='keys_values': choose that, or "
                                  f"{name}={only!r}")  # fmt: skip

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config in a folder, as PEFT reads it.

        Raises:
            ConfigError: it has a wrong option, or asks for other sizes than the tensors beside it have; before anything
                of those sizes is made.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(str(pretrained_model_name_or_path)) / (subfolder or "")
        if isinstance(config, MoPsConfig):
            stored.check_sizes(folder / "adapter_model.safetensors", config.shapes())
        return config

    def shapes(self) -> dict[str, list[int | None]]:
        """Sizes of what this config makes, by name, as far as they follow from it alone (None: from the base)."""
        columns: list[int | None] = list(self.key_value_shape or [None] * 4)  # type: ignore[list-item]
        width = self.embedding_size
        found: dict[str, list[int | None]] = {
            "mops_recovery": [self.num_recovery_prompts, None],
            "mops_gate_in": [self.gate_hidden_size, width],
            "mops_gate_out": [self.num_rows, self.gate_hidden_size],
            "mops_gate_mean": [width],
            "mops_gate_scale": [width],
        }
        if self.gate_bias:
            found["mops_gate_bias"] = [self.num_rows]
        if self.claims:
            found["mops_claim_basis"] = [self.claims, None, width]
            found["mops_claim_cut"] = [self.claims, 4]
        shared = {"shared_": self.shared_prompts} if self.shared_prompts else {}
        for name, count in ({"": self.num_prompts} | shared).items():
            if self.experts == "keys_values":
                found[f"mops_{name}keys"] = [count, *columns[:3]]
                found[f"mops_{name}values"] = [count, *columns[:2], columns[3]]
            else:
                found["mops_shared" if name else "mops_prompts"] = [count, None]
        return found

    @property
    def named_experts(self) -> list[str]:
        """What each expert is meant for, or its number where that is not known."""
        return list(self.expert_names or (f"expert {i}" for i in range(self.num_experts)))

    @property
    def reads_ahead(self) -> bool:
        """Whether the gate reads another layer than the injection layer, in a pass of its own over the bare base."""
        return self.embedding_size is None and self.gate_layer not in (None, self.injection_layer)

    @property
    def num_prompts(self) -> int:
        """K = E * P."""
        return self.num_experts * self.prompts_per_expert

    @property
    def num_groups(self) -> int:
        """How many weights the gate gives out: E, or K under `gate_granularity="prompt"`."""
        return self.num_experts if self.gate_granularity == "expert" else self.num_prompts

    @property
    def gate_is_idle(self) -> bool:
        """Whether nothing hangs on what the gate reads: a softmax over one weight is 1, and no text is left out."""
        return self.num_groups == 1 and not self.null_expert

    @property
    def num_rows(self) -> int:
        """Rows of the gate's last matrix."""
        return self.num_groups if self.routes is None else len(self.routes) - self.claims

    @classmethod
    def paper(cls, **overrides: Any) -> MoPsConfig:
        """The paper's literal reading: hidden states scaled, whole sequence pooled, causal random prompts."""
        literal: dict[str, Any] = {
            "gate_target": "hidden_states",
            "gate_input": "sequence",
            "expert_attention": "causal",
            "init": "random",
            "keep_recovery_prompts": False,
        }
        return cls(**(literal | overrides))

    def resolve(self, layers: int, hidden_size: int) -> None:
        """Fill in what depends on the base model, or check it where an adapter was trained already.

        Raises:
            AdapterError, ConfigError: the injection layer does not exist, or the adapter belongs to a base of another
                shape.
        """
        for name, mine, theirs in (
            ("hidden size", self.base_hidden_size, hidden_size),
            ("number of layers", self.base_num_layers, layers),
        ):
            if mine is not None and mine != theirs:
                raise AdapterError(f"this adapter was trained on a base model with {name} {mine}, but this model has "
                                   f"{theirs}: load the base model named in adapter_config.json")  # fmt: skip
        if self.injection_layer is None:
            self.injection_layer = default_injection_layer(layers)
        if not 0 <= self.injection_layer < layers:
            raise ConfigError(f"injection_layer={self.injection_layer}, but this model has {layers} layers: "
                              f"choose 0 to {layers - 1}")  # fmt: skip
        if self.gate_layer is not None and not 0 <= self.gate_layer <= layers:
            raise ConfigError(
                f"gate_layer={self.gate_layer}, but this model has {layers} layers: choose 0 to {layers}, "
                "or None for the injection layer"
            )
        self.base_hidden_size, self.base_num_layers = hidden_size, layers
