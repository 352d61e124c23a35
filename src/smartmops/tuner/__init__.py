"""The method: gated prompt experts in the middle of a frozen decoder. Importing this room enters it into PEFT."""

from .config import MoPsConfig
from .layer import MoPsLayer
from .model import MoPsModel
from .registry import enter

enter("mops", MoPsConfig, MoPsModel)

__all__ = ["MoPsConfig", "MoPsLayer", "MoPsModel"]
