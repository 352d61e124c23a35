"""The method: gated prompt experts in the middle of a frozen decoder. Importing this room enters it into PEFT."""

from smartmops.adapter.config import MoPsConfig
from smartmops.adapter.registry import enter

from .layer import MoPsLayer
from .model import MoPsModel

enter("mops", MoPsConfig, MoPsModel)

__all__ = ["MoPsConfig", "MoPsLayer", "MoPsModel"]
