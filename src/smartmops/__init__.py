"""smartmops: one frozen language model, many tasks, many data sources. Importing it enters the method into PEFT."""

import logging

# peft imports these two where they are installed, and each then reports the optional kernels it has not got.
for _name in ("bitsandbytes", "torchao"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)

from .data import render  # noqa: E402
from .tuner import MoPsConfig, MoPsModel  # noqa: E402

__version__ = "0.1.0"
__all__ = ["MoPsConfig", "MoPsModel", "__version__", "render"]
