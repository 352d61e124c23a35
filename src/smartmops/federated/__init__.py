"""Federated training: clients keep their data; adapters travel. Knows rounds and messages; no architecture."""
