"""Gated prefix attention. Keys, values and a bias in, attended hidden states out. No experts, no adapter, no tokens."""
