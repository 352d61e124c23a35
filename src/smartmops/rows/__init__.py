"""The record that passes between rooms, where many of them are kept, and what is wrong with a file. Text only."""

from .example import Example, conversation

__all__ = ["Example", "conversation"]
