"""A tiny Llama as a model folder, and a cache of models for each test."""

from opened import _own_cache as _own_cache
from opened import base_folder as base_folder
