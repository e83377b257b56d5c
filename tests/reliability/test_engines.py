"""D08: a recipe of two stages, with tokens scaled in between, under each engine on two ranks = in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import own_trainer
import pytest
import torch
from families import made
from safetensors.torch import load_file
from test_ranks import free_port
from transformers import AutoModelForImageTextToText

from small_runs import quiet
from sparsight.devices.ranks import touched
from sparsight.pipeline import run
from sparsight.pipeline.launch import ENGINES, write_config
from sparsight.reporting.runlog import read_run

TOLERANCE = 2e-5  # of weights and losses; found: see docs/engines.md


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("engines")
    engines.prepare(found)
    return found


def launched(engine: str, folder: Path, out: Path, cases: str, *more: str, ranks: int = 2, timeout: int = 280) -> str:
    """Started by `accelerate launch` with the configuration that ``--engine`` writes; what it said, if it failed."""
    command = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    if engine != "ddp":
        command = ["accelerate.commands.launch", "--config_file", str(write_config(engine, ranks, out))]
        command += ["--main_process_port", str(free_port())]
    return said([*command, engines.__file__, str(folder), str(out), cases, *more], timeout)


def said(module: list[str], timeout: int) -> str:
    """What a module of Python said, if it failed."""
    command = [sys.executable, "-m", *module]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    return "" if done.returncode == 0 else done.stderr


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest of losses, and of weights in all stages' models."""
    runs = [read_run(each) for each in (one, other)]
    assert [len(stage.steps) for stage in runs[0].stages] == [len(stage.steps) for stage in runs[1].stages] == [4, 4]
    losses = [[step["loss"] for stage in each.stages for step in stage.steps] for each in runs]
    found = [0.0]
    for file in sorted(one.glob("*/model/*.safetensors")):
        a, b = load_file(file), load_file(other / file.relative_to(one))
        assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
        found += [float((a[name] - b[name]).abs().max()) for name in a]
    return max(abs(a - b) for a, b in zip(*losses, strict=True)), max(found)


def table(result: dict[str, dict[str, str]]) -> str:
    """A row for each case, a column for each engine."""
    lines = ["| | " + " | ".join(result) + " |", "|---" * (len(result) + 1) + "|"]
    cases = next(iter(result.values()))
    lines += [
        f"| {engines.SAID[case]} | " + " | ".join(found[case] for found in result.values()) + " |" for case in cases
    ]
    return "\n".join(lines) + "\n"


def cut(run: Path) -> None:
    """As if killed in the middle of the second stage."""
    for gone in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / "finetune" / gone)


def check_watched(folder: Path, out: Path) -> None:
    """Of skipped layers weights and moments are the same bit by bit, with AdamW and weight decay; of others they are
    not. The first step of a stage does not count, as there are no moments before it."""
    for rank in (0, 1):
        found = json.loads((out / f"watched-{rank}.json").read_text())
        later = [each for each in found if each["held"] == each["later"]]
        assert {each["skipped"] for each in later} == {False, True}
        assert all(each["all"] if each["skipped"] else not each["all"] for each in later)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_D08_two_stages_under_fsdp2_are_those_of_one_process(tmp_path: Path, folder: Path, ranks: int) -> None:
    """All that a stage may do, in two; what stages hand on is loaded by plain transformers. Resumed in the second
    stage, from shards, it is the same run bit by bit; on twice as many ranks, up to rounding."""
    one = run(engines.recipe(folder, "mixed"), tmp_path / "one", quiet())
    assert launched("fsdp2", folder, tmp_path, "mixed,decayed", "watch") == ""
    check_watched(folder, tmp_path)  # F07
    losses, weights = differences(tmp_path / "one", tmp_path / "mixed")
    assert losses < TOLERANCE and weights < TOLERANCE
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "mixed" / one.relative_to(tmp_path / "one"))
    assert type(model).__name__ == "SparsightForConditionalGeneration"
    stages = read_run(tmp_path / "mixed").stages
    assert [step["step"] for stage in stages for step in stage.steps] == [1, 2, 3, 4] * 2  # the log is written once
    assert all(len(step["memory_by_rank"]) == 2 for stage in stages for step in stage.steps)
    assert any(step["layers_run"] < step["layers"] for step in stages[0].steps)
    state = tmp_path / "mixed" / "finetune" / "checkpoints" / "checkpoint-2"
    assert len(list((state / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2

    shutil.copytree(tmp_path / "mixed", tmp_path / "whole")
    cut(tmp_path / "mixed")
    assert launched("fsdp2", folder, tmp_path, "mixed", "resume", ranks=ranks) == ""
    losses, weights = differences(tmp_path / "whole", tmp_path / "mixed")
    assert max(losses, weights) < (TOLERANCE if ranks > 2 else 1e-30)


def test_D07_what_zero3_partitions_is_given_no_gradient_of_zero() -> None:
    """DeepSpeed marks it, and leaves an empty tensor; a gradient of that size would be refused."""
    whole, partitioned = (torch.nn.Parameter(torch.ones(size)) for size in (2, 0))
    partitioned.ds_id = 0
    touched(torch.zeros(1), [whole, partitioned]).sum().backward()
    assert whole.grad is not None and partitioned.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_D07_two_stages_under_deepspeed_are_those_of_one_process(tmp_path: Path, folder: Path, engine: str) -> None:
    """The skipper too: each layer has a group of the optimizer. On another number of ranks a checkpoint is refused."""
    pytest.importorskip("deepspeed")
    case = "mixed" if engine == "zero2" else "split"
    run(engines.recipe(folder, case), tmp_path / "one", quiet())
    assert launched(engine, folder, tmp_path, f"{case},muon,skipper,decayed", "watch") == ""
    if engine == "zero2":
        check_watched(folder, tmp_path)  # F07
    assert max(differences(tmp_path / "one", tmp_path / case)) < TOLERANCE
    assert (tmp_path / "skipper.refused").exists() == (engine == "zero3")
    assert "Muon needs whole matrices" in (tmp_path / "muon.refused").read_text()
    assert not (tmp_path / "muon").exists()
    cut(tmp_path / case)
    assert launched(engine, folder, tmp_path, case, "resume", ranks=1) == ""
    assert "shards of 2 ranks" in (tmp_path / f"{case}.refused").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp1", "zero2", "zero3"])
def test_text_that_goes_through_skipped_layers_asks_nothing_of_an_engine(tmp_path: Path, engine: str) -> None:
    """Of no flat shard a part rests: in transformers' own Trainer, too, two ranks are one process."""
    if engine != "fsdp1":
        pytest.importorskip("deepspeed")
    one, logged = own_trainer.trained(tmp_path / "one")
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    assert said([*command, own_trainer.__file__, str(tmp_path), engine], 280) == ""
    two, also_logged = torch.load(tmp_path / f"{engine}.pt")
    layers = [[step["layers_run"] for step in log[:-1]] for log in (logged, also_logged)]
    assert layers[0] == layers[1] and min(layers[0]) < 1
    assert {name for name, _ in made(own_trainer.NAME).named_parameters()} <= two.keys() <= one.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in two) < TOLERANCE


def test_the_table_in_the_docs_is_that_of_the_newest_results() -> None:
    root, cells = Path(__file__).parents[2], dict[str, dict[str, str]]()
    for file in sorted(root.glob("benchmarks/results/engines-cpu-*.json")):
        cells |= json.loads(file.read_text())["cells"]
    assert table({name: cells[name] for name in ENGINES if name in cells}) in (root / "docs" / "engines.md").read_text()
