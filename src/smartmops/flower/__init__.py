"""Flower as the engine beyond one process: its messages, its relays, its simulation."""
