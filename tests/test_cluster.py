"""benchmarks/cluster.py: links and waiting against what can be said without it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def cluster() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import cluster

    return cluster


def test_a_ring_moves_what_the_others_have(cluster: ModuleType) -> None:
    machine = cluster.Machine(inside=100.0, outside=10.0, reached=1.0, latency=0.0)
    assert cluster.ring(800.0, 1, machine) == 0
    assert cluster.ring(800.0, 8, machine) == pytest.approx(7.0)  # 7 of 8 parts, by NVLink
    assert cluster.ring(800.0, 16, machine) == pytest.approx(750 / 80)  # by the eight cards of a node
    slow = cluster.Machine(inside=100.0, outside=10.0, reached=1.0, latency=1.0)
    assert cluster.ring(0.0, 8, slow) == 7 and cluster.ring(0.0, 64, slow) == 7 + 7


def test_planned_samples_wait_less_than_random_ones(cluster: ModuleType) -> None:
    for gpus, each in ((8, 16), (64, 4)):
        planned, random = (cluster.straggling(gpus, each, planned) for planned in (True, False))
        assert 1 <= planned < random
        assert planned <= cluster.straggling(gpus, each, True, 1)  # who meets more often waits more
    assert cluster.straggling(1, 16, True) == 1


def test_engines_hold_and_move_what_they_should(cluster: ModuleType) -> None:
    cost, machine = cluster.cost_of(), cluster.Machine()
    found = {engine: cluster.step(cost, engine, 64, 16, machine) for engine in cluster.ENGINES}
    assert found["fsdp2"] == found["zero3"]
    held = [found[engine]["gigabytes"] for engine in ("ddp", "zero2", "fsdp2")]
    assert held == sorted(held, reverse=True) and not found["ddp"]["fits"] and found["fsdp2"]["fits"]
    assert len({row["compute"] for row in found.values()}) == 1
    lazy = cluster.Machine(outside=1e9)  # a slow network is no longer hidden
    slow = {engine: cluster.step(cost, engine, 64, 16, lazy) for engine in cluster.ENGINES}
    assert all(slow[engine]["communication"] > 2 * found[engine]["communication"] for engine in cluster.ENGINES)
    assert slow["fsdp2"]["communication"] > slow["zero2"]["communication"] > slow["ddp"]["communication"]


def test_what_is_published_is_computed_as_the_table_says(cluster: ModuleType) -> None:
    rows = {row["what"] + row["how"][:3]: row for row in cluster.published()}
    assert rows["DualSpeed, LLaVA-NeXT, speed-upFLO"]["computed"] == pytest.approx(4.0, rel=0.15)
    assert rows["DualSpeed, LLaVA-1.5, speed-upFLO"]["computed"] == pytest.approx(2.1, rel=0.15)
    fewer = rows["Chain-of-Sight, pre-training with 48 tokens, of the time with 336and"]
    assert abs(fewer["off"]) < 0.02 and fewer["off"] == pytest.approx(fewer["computed"] / 0.35 - 1)
