"""Experts and gate: pooled text to weights, prompts to keys and values, text of no task to nothing. No files."""
