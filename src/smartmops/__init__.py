"""smartmops: one frozen language model, many tasks, many data sources. Importing it enters the method into PEFT."""

from .tuner import MoPsConfig, MoPsModel

__version__ = "0.1.0"
__all__ = ["MoPsConfig", "MoPsModel", "__version__"]
