"""A MODEL argument in, a frozen model and its tokenizer out: built in, a folder, a GGUF, or of the hub."""

from .gradient import check_gradient, dense_weight, quantised_linears
from .load import describe, fast_dtype, load_base, quantised_as
from .names import local
from .quantised import Quantisation

__all__ = [
    "Quantisation",
    "check_gradient",
    "dense_weight",
    "describe",
    "fast_dtype",
    "load_base",
    "local",
    "quantised_as",
    "quantised_linears",
]
