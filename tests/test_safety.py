"""Manifests and locks: what differs from what was saved is named, and a folder has one run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from ranks_here import forked
from small_runs import quiet, recipe_values, save_encoder, stage_values
from sparsight.doctor import examine
from sparsight.errors import UserError
from sparsight.pipeline import load, run
from sparsight.pipeline.files import load_any
from sparsight.safety import LOCK, MANIFEST, check_manifest, faults, locked, write_manifest
from sparsight.settings.recipe import Recipe
from sparsight.training.checkpoints import last_checkpoint

ROUNDS = 50  # of each, a checkpoint and a model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints and a model."""
    folder = tmp_path_factory.mktemp("saved")
    values = recipe_values(save_encoder(folder / "encoder"), evaluation={"kind": "none"})
    values["stages"] = [stage_values(samples=8, checkpoints=2)]
    run(Recipe.model_validate(values), folder / "run", quiet())
    return folder / "run" / "pretrain"


def damage(folder: Path, draw: random.Random) -> tuple[set[str], str]:
    """Do one thing to a folder that disks, copies and people do; the files that it hits, and its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    kind = draw.choice(("cut", "flip in the header", "flip", "zeros", "empty", "missing", "swap", "another's"))
    heavy = [path for path in files if path.suffix in (".safetensors", ".pt", ".pth")]
    file = draw.choice(heavy if kind in ("flip", "zeros") else files)
    content = bytearray(file.read_bytes())
    if kind == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind.startswith("flip"):
        at = draw.randrange(min(64, len(content)) if "header" in kind else len(content))
        content[at] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif kind == "zeros":
        at = next(at for at in range(draw.randrange(len(content) // 2), len(content)) if content[at])
        content[at : at + 512] = bytes(len(content[at : at + 512]))
        file.write_bytes(content)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "missing":
        file.unlink()
    else:
        other = draw.choice([each for each in files if each.read_bytes() != content])
        file.write_bytes(other.read_bytes())
        if kind == "swap":
            other.write_bytes(content)
            return {file.name, other.name}, kind
    return {file.name}, kind


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def named(said: str, hit: set[str]) -> bool:
    """A damaged manifest is named alone: what it says of others is not known."""
    return all(name in said for name in hit) or (MANIFEST in hit and MANIFEST in said)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_D02_a_damaged_checkpoint_is_named_passed_over_and_kept(saved: Path, tmp_path: Path, seed: int) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path, dirs_exist_ok=True)
    hit, kind = damage(tmp_path / "checkpoint-2", random.Random(seed))
    before, console = contents(tmp_path), quiet()
    assert last_checkpoint(tmp_path, console) == str(tmp_path / "checkpoint-1"), kind
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert named(said, hit) and "it is now" in said, (kind, said)
    after = {name.replace("damaged-", ""): content for name, content in contents(tmp_path).items()}
    assert after == before and (tmp_path / "damaged-checkpoint-2").is_dir()


@pytest.mark.parametrize("seed", range(100, 100 + ROUNDS))
def test_D02_a_damaged_model_is_named_and_not_loaded(saved: Path, tmp_path: Path, seed: int) -> None:
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    hit, kind = damage(folder, random.Random(seed))
    before = contents(folder)
    if MANIFEST in hit and kind == "missing":  # as of an older version: told, and loaded
        with pytest.warns(UserWarning, match=f"no {MANIFEST}"):
            load(folder)
        assert [check.status for check in examine(folder)] == ["warning"]
        return
    with pytest.raises(UserError) as told:
        load(folder)
    found = " ".join(check.name for check in examine(folder) if check.status == "damaged")
    assert named(str(told.value), hit) and named(found, hit), (kind, str(told.value))
    assert contents(folder) == before


def test_D02_swapped_checkpoints_are_noticed(saved: Path, tmp_path: Path) -> None:
    """Each is whole, under another's name."""
    for step, other in ((1, 2), (2, 1)):
        shutil.copytree(saved / "checkpoints" / f"checkpoint-{step}", tmp_path / f"checkpoint-{other}")
    console = quiet()
    assert last_checkpoint(tmp_path, console) is None
    assert "this is checkpoint-1" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert {path.name for path in tmp_path.iterdir()} == {"damaged-checkpoint-1", "damaged-checkpoint-2"}


def test_a_whole_folder_is_passed_and_its_card_may_be_edited(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    (folder / "README.md").write_text("mine")
    check_manifest(folder)
    assert faults(folder) == {} and [check.status for check in examine(folder)] == ["ok"]
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(contents(folder)) == set(listed) | {MANIFEST, "README.md"}
    load(folder)
    assert {check.status for check in examine(saved.parent)} == {"ok"}  # all that a run has saved
    with pytest.raises(UserError, match="found nothing saved"):
        examine(tmp_path / "none")


def test_shards_in_folders_below_are_covered(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / "pytorch_model_fsdp_0").mkdir(exist_ok=True)
        (tmp_path / "pytorch_model_fsdp_0" / f"__{rank}_0.distcp").write_bytes(bytes(1000) + bytes([rank]))
    write_manifest(tmp_path)
    (tmp_path / "pytorch_model_fsdp_0" / "__1_0.distcp").write_bytes(bytes(1000) + bytes([0]))
    assert faults(tmp_path) == {
        "pytorch_model_fsdp_0/__1_0.distcp": "has the content of pytorch_model_fsdp_0/__0_0.distcp"
    }


def test_D12_all_that_a_manifest_lists_is_on_the_disk_before_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen, fsync = shutil.copytree(saved / "checkpoints" / "checkpoint-2", tmp_path / "c"), [], os.fsync
    (folder / MANIFEST).unlink()

    def flushed(number: int) -> None:
        seen.append((os.fstat(number).st_ino, (folder / MANIFEST).exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", flushed)
    write_manifest(folder)
    listed = {(folder / name).stat().st_ino for name in json.loads((folder / MANIFEST).read_text())["files"]}
    before = {inode for inode, sealed in seen if not sealed}
    assert listed | {folder.stat().st_ino, (folder / MANIFEST).stat().st_ino} <= before
    assert {folder.stat().st_ino, folder.parent.stat().st_ino} <= {inode for inode, sealed in seen if sealed}


@pytest.mark.filterwarnings("ignore:.*has no sparsight_manifest")
def test_D02_weights_that_are_missing_are_no_random_ones(saved: Path, tmp_path: Path) -> None:
    """Without a manifest, too, and in a model of transformers."""
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    (folder / MANIFEST).unlink()
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for loader in (load, load_any):
        with pytest.raises(UserError, match=f"1 weights are missing, such as .*{name}"):
            loader(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": config["model_type"]}))
    with pytest.raises(UserError, match=r"config.json lacks \['text_config', 'vision_config'\]"):
        load(folder)  # and builds no model of 7B, which is transformers' default
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a model of type 'None'"):
        load(folder)


# ---------------------------------------------------------------------------------------- locks

HOLD = "import sys, time; from pathlib import Path; from sparsight.safety import locked\n"
HOLD += "with locked(Path(sys.argv[1]), int(sys.argv[2])): print('held', flush=True); time.sleep(100)"


@pytest.fixture
def holder() -> Callable:
    """Starts processes that hold a folder, and ends them."""
    started = []

    def start(folder: Path, rank: int = 0) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder), str(rank)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_D03_a_folder_that_a_process_holds_is_refused_with_its_name(tmp_path: Path, holder: Callable) -> None:
    process = holder(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
        with locked(tmp_path):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).is_file()  # of a dead process: taken over
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_D03_a_rank_whose_launcher_and_first_rank_are_dead_still_holds(tmp_path: Path, holder: Callable) -> None:
    first, second = holder(tmp_path), holder(tmp_path, 1)
    first.kill()
    first.wait()
    with pytest.raises(UserError, match=f"process {second.pid} on"):
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("resume", [True, False])
def test_D03_a_second_run_beside_a_living_one_is_refused(
    saved: Path, tmp_path: Path, holder: Callable, resume: bool
) -> None:
    process = holder(tmp_path / "run")
    values = recipe_values(saved.parents[1] / "encoder", stages=[stage_values(samples=4)])
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
        run(Recipe.model_validate(values), tmp_path / "run", quiet(), resume=resume, overwrite=not resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert not list(tmp_path.glob("run-old*"))


@pytest.mark.parametrize("resume", [False, True])
def test_D05_machines_that_share_no_folder_are_told_before_training(saved: Path, tmp_path: Path, resume: bool) -> None:
    """The first rank has checkpoints, the other an empty disk under the same name: all ranks end alike, and name it."""
    for machine in range(2):
        (tmp_path / f"disk{machine}").mkdir()
    if resume:
        shutil.copytree(saved.parent, tmp_path / "disk0" / "run")
        shutil.rmtree(tmp_path / "disk0" / "run" / "pretrain" / "model")
    values = recipe_values(saved.parents[1] / "encoder", evaluation={"kind": "none"})
    values["stages"] = [stage_values(samples=8, checkpoints=2)]

    def work(rank: int) -> None:
        os.chdir(tmp_path / f"disk{rank}")
        try:
            run(Recipe.model_validate(values), "run", quiet(), resume=resume)
        except UserError as error:
            raise SystemExit(5 if "run is another folder for rank 1 on " in str(error) else str(error)) from None

    assert forked(tmp_path, work) == [5, 5]
    assert not list((tmp_path / "disk1").rglob("*.jsonl"))


# ---------------------------------------------------------------------------------------- in a run


def test_D01_a_damaged_stage_is_told_and_trained_again(saved: Path, tmp_path: Path) -> None:
    """From its last checkpoint, to the same weights."""
    out = shutil.copytree(saved.parent, tmp_path / "run")
    values = recipe_values(saved.parents[1] / "encoder", evaluation={"kind": "none"})
    values["stages"] = [stage_values(samples=8, checkpoints=2)]
    file, console = out / "pretrain" / "model" / "model.safetensors", quiet()
    file.write_bytes(file.read_bytes()[:1000])
    run(Recipe.model_validate(values), out, console, resume=True)
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "model.safetensors: 1000 bytes where" in said and "trained again" in said
    assert (out / "pretrain" / "damaged-model" / file.name).stat().st_size == 1000
    one, other = load_file(file), load_file(saved / "model" / file.name)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_plain_trainers_are_given_damaged_checkpoints_no_more(tmp_path: Path) -> None:
    """`SafeCheckpoints` in tests/training/test_checkpoints.py; without it, `last_checkpoint` alone serves, too."""
    model = torch.nn.Linear(1, 1)
    (tmp_path / "checkpoint-3").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoint-3" / "pytorch_model.bin")
    assert last_checkpoint(tmp_path, quiet()) is None and (tmp_path / "damaged-checkpoint-3").is_dir()
    with pytest.raises(ValueError, match="No valid checkpoint"):
        Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")).train(True)


def test_a_lock_whose_file_is_gone_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before it ends between our opening of the file and our lock on it."""
    import fcntl

    lock = fcntl.lockf

    def late(*args: object) -> None:
        (tmp_path / LOCK).unlink(missing_ok=True)
        lock(*args)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(UserError, match="just began or ends"), locked(tmp_path):
        pass
