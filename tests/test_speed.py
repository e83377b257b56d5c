"""The speed benchmark runs, and counts what it should; how long a step takes is not a matter for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forked import Forks
from sparsight import assets

ROOT = Path(__file__).parents[1]
GPU = """
import sys
folder, *arguments, short = sys.argv[1:]
sys.path.insert(0, folder)
import gpu
for sys.argv in (["gpu.py", *arguments], ["gpu.py", *arguments[:-1], short, "--minutes", "0.0001"]):
    gpu.main()
"""
TWICE = """
import sys
folder, *arguments = sys.argv[1:]
sys.path.insert(0, folder)  # modules of tests have the same names
import speed
for group in ("methods", "idle"):
    sys.argv = ["speed.py", *arguments, group]
    speed.main()
"""


def test_the_gpu_script_writes_group_after_group_and_ends_in_its_minutes(fresh: Forks, tmp_path: Path) -> None:
    """On the CPU with tiny sizes: what the Trainer was given trains, and what is measured is in the file."""
    out, none = tmp_path / "gpu.json", tmp_path / "none.json"
    sizes = ["--device", "cpu", "--rounds", "1", "--batch", "2", "--only", "trainer", "--out", out]
    told = fresh.run(GPU, ROOT / "benchmarks", *sizes, none, check=True, timeout=300).stdout
    groups = {group["group"]: group["rows"] for group in json.loads(out.read_text())["groups"]}
    ways = [row["variant"].split(", ")[-1] for row in groups["trainer"]]
    assert ways == [f"{tokens} tokens" for tokens in (576, 576, 336, 80, 32)]
    assert all(row["seconds"] > 0 and row["batch"] == 2 for row in groups["trainer"])
    assert "minutes are over" in told and not none.exists()


@pytest.mark.skipif(
    assets.smollm2_folder() is None or assets.efficientnet_lite0_weights() is None, reason="`make assets` fetches them"
)
def test_groups_go_into_one_file_and_flops_are_those_of_the_ways(fresh: Forks, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    sizes = ["--layers", "2", "--batch", "1", "--rounds", "1", "--out", str(out), "--only"]
    fresh.run(TWICE, ROOT / "benchmarks", *sizes, check=True, cwd=ROOT, timeout=300)
    groups = {group["group"]: group["rows"] for group in json.loads(out.read_text())["groups"]}
    assert list(groups) == ["methods", "idle"]
    ratios = {row["variant"]: row["flops_ratio"] for rows in groups.values() for row in rows}
    assert ratios["dense"] == ratios["attached, idle"] == 1
    assert ratios["half of the layers, 0.25 of the tokens"] < ratios["keep 0.25 of the tokens"] < 0.6
    assert ratios["half of the layers off"] < ratios["a fifth of the layers off"] == 1  # of two layers none is a fifth
