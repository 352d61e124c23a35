"""Ratios of speed and memory, each with its target, from sides that took turns in one run."""
