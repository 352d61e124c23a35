"""Perplexity over response tokens and answers held against references. Trains nothing, writes nothing."""
