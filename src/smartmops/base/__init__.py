"""A MODEL argument in, a frozen model and its tokenizer out: built in, a folder, a GGUF, or from the hub."""

from .gradient import check_gradient, dense_weight, quantised_linears
from .load import Quantisation, describe, load_base, local, quantised_as

__all__ = [
    "Quantisation",
    "check_gradient",
    "dense_weight",
    "describe",
    "load_base",
    "local",
    "quantised_as",
    "quantised_linears",
]
