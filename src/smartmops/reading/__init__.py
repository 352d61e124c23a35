"""A base and DATA in, a base beside its rows out: read, split, held out, encoded, or refused with a way out.

Knows no adapter and trains nothing.
"""
