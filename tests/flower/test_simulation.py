"""Flower's simulation against plain calls: the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smartmops.checks.errors import OutOfMemory
from smartmops.federated.federate import FederateConfig, federate
from smartmops.flower.simulation import clients_of, simulate

Make = Callable[..., FederateConfig]


def test_a_simulation_ends_with_the_bits_of_plain_calls(config: Make, tmp_path: Path) -> None:
    settings = config(rounds=2, out=tmp_path / "plain")
    plain = federate(settings)
    found = simulate(replace(settings, out=tmp_path / "flower", engine="flower-simulation", actors=2))
    wanted = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    arrays = load_file(tmp_path / "flower" / "adapter" / "adapter_model.safetensors")
    assert wanted.keys() == arrays.keys() and all(torch.equal(wanted[name], arrays[name]) for name in wanted)
    assert found["perplexity"] == plain["perplexity"]
    assert found["bytes_down"] == plain["bytes_down"]
    assert found["holdings"] == plain["holdings"]


def test_errors_come_through_as_they_are(config: Make) -> None:
    with pytest.raises(ValueError, match="--actors 0: choose 1 or more"):
        simulate(config(engine="flower-simulation", actors=0))
    with pytest.raises(ValueError, match="--actors 100000, but this machine has"):
        simulate(config(engine="flower-simulation", actors=100_000))
    with pytest.raises(ValueError, match="--clients-per-round 9, but there are 5 clients"):
        simulate(config(engine="flower-simulation", actors=1, clients_per_round=9))


def test_actors_that_ray_ends_for_want_of_memory_are_told_with_the_way_out(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")  # below what any machine has in use
    with pytest.raises(OutOfMemory, match=r"^out of memory: lower .*actors \(now 2\)"):
        simulate(config(engine="flower-simulation", actors=2))


def test_clients_are_counted_as_the_partition_names_them(config: Make, clients_folder: Path) -> None:
    assert clients_of(config(clients=7)) == 7
    assert clients_of(config(clients_data=clients_folder)) == 3
