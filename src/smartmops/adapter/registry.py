"""Enters a method into PEFT, whose `PeftType` is a closed enum. Knows no method."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


class Emptied(dict[str, PeftConfig]):
    """The configs of a model whose last adapter was deleted.

    `PeftModel` goes on to ask for the config of the adapter it takes for the active one, and fails where that is gone;
    so that one is still answered, until another adapter is added.
    """

    def __init__(self, name: str, config: PeftConfig) -> None:
        super().__init__()
        self.gone = {name: config}

    def __missing__(self, name: str) -> PeftConfig:
        if self:
            raise KeyError(name)
        return self.gone[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), next(iter(self.gone.items())), None, None, iter(self.items())


def enter(name: str, config: type[PeftConfig], model: type[Any]) -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and transformers' own adapter loading know the method."""
    if member(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)


def member(name: str) -> PeftType:
    """`PeftType.<name>`; where PEFT does not have it, made as `class PeftType(str, Enum)` would have made it."""
    if name not in PeftType.__members__:
        new = str.__new__(PeftType, name)
        new._name_, new._value_ = name, name
        PeftType._member_map_[name] = new
        PeftType._value2member_map_[name] = new
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, new)
    return PeftType[name]
