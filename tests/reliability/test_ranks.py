"""R01 to R04, R06 to R08, R23, R24: two ranks, one of them with text alone, compressor and skipper on."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import all_ranks
import audio_families
import audio_ranks
import bridge_ranks
import pytest
import ranks
import torch
from families import FAMILIES, made
from safetensors.torch import load_file

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.blank import blank_features, blank_image

pytestmark = pytest.mark.xdist_group("ranks")  # two processes of pytest would start them twice


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Ranks:
    kind: str
    folder: Path

    def found(self, module):
        """What each rank of a module wrote."""
        return [torch.load(self.folder / module / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """Two ranks under DDP or FSDP, started once; the last module tells accelerate that CPUs are accelerators."""
    kind, folder = request.param, tmp_path_factory.mktemp("ranks")
    modules = ["ranks", "audio_ranks", "skipped", *(["bridge_ranks", "sharded"] if kind == "fsdp" else [])]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), all_ranks.__file__, str(folder), kind, *modules]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)  # a hang is a failure
    assert done.returncode == 0, done.stderr[-3000:]
    return Ranks(kind, folder)


EITHER = pytest.mark.parametrize("both", ["ddp", "fsdp"], indirect=True, scope="module")
SHARDED = pytest.mark.parametrize("both", ["fsdp"], indirect=True, scope="module")


def check_gradients(found, wanted, where):
    """Equal up to rounding; what is missing would be zero."""
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert [n for n in wanted if n not in found and wanted[n].abs().sum() > 0] == []
    for key, gradient in found.items():
        error = (gradient - wanted.get(key, torch.zeros_like(gradient))).abs().max()
        assert error <= 1e-5 * largest, (where, key, error)


@pytest.mark.slow
@EITHER
def test_r01_gradients_of_two_ranks_are_those_of_one_process(both):
    first, second = both.found("ranks")
    drawn = [first["long", step] for step in range(ranks.LONG)]
    assert drawn == [second["long", step] for step in range(ranks.LONG)] and any(any(off) for off in drawn)
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())
    for name in ranks.NAMES:
        model, handle = ranks.prepared(name, False)
        for step in range(ranks.STEPS + 1):
            if step < ranks.STEPS:
                handle.step(step, 0.0)
            else:
                handle.detach()
            batches = ranks.batches(name, model, step)
            for batch in batches:
                ranks.loss_of(model, batch, ranks.labels_in(batches), 1).backward()
            handle.clear_gradients()
            wanted = ranks.gradients(model)
            for recompute in (False, True):
                for found in (first, second):
                    off, calls, gradients = found[name, recompute, step]
                    assert off == handle.skipped  # R06
                    assert calls == 1  # R04
                    check_gradients(gradients, wanted, (name, recompute, step))
            model.zero_grad()
    losses = []
    for batch in ranks.batches(ranks.PROBE_NAME, made(ranks.PROBE_NAME), 0):
        model = made(ranks.PROBE_NAME)
        handle = attach(model, CompressorConfig(keep=0.25))
        model(**batch)
        losses.append(list(handle.dense_probe().values()))
    assert losses[1][0] == losses[1][1] != losses[0][0]  # one rank has text alone
    for found, alone in zip((first, second), losses, strict=True):
        assert found["probe"] == pytest.approx(alone)
    for name in ranks.VIDEOS:
        model, handle = ranks.prepared(name, False)
        batches = ranks.with_video(name, model)
        for batch in batches:
            ranks.loss_of(model, batch, ranks.labels_in(batches), 1).backward()
        handle.clear_gradients()
        wanted = ranks.gradients(model)
        for found in (first, second):
            calls, gradients = found["video", name]
            assert calls == 2  # R04: the second one has images alone
            check_gradients(gradients, wanted, name)


@pytest.mark.slow
@EITHER
def test_a_rank_without_audio(both):
    """Under DDP as one process; where the encoder's shards have to be gathered by all ranks, all are told why not."""
    for second in (1, 0):
        model = audio_families.made(audio_ranks.NAME)
        attach(model, CompressorConfig(keep=0.5))
        batches = audio_ranks.batches(model, second)
        for batch in batches:
            ranks.loss_of(model, batch, ranks.labels_in(batches), 1).backward()
        for found in both.found("audio_ranks"):
            if both.kind == "fsdp" and not second:
                assert "some ranks' batches have audio, others none" in found["0"]
            else:
                check_gradients(found[str(second)], ranks.gradients(model), second)


@pytest.mark.slow
@EITHER
def test_F07_on_two_ranks_a_skipped_layer_is_not_updated(both):
    """Weights, moments and step count of AdamW with weight decay, bit by bit; what others give are zeros."""
    for found in both.found("skipped"):
        before, after, later = found["tensors"].values()
        assert len(before) == 4 * 9 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(after, later, strict=True))
        if both.kind == "ddp":
            assert len(found["told"]) == 1 and "call handle.clear_gradients() before each step" in found["told"][0]
    first, second = (found["tensors"]["2"] for found in both.found("skipped"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@SHARDED
def test_r23_a_sharded_bridge_is_whole_in_its_file(both, tiny_vlm):
    whole = tiny_vlm(bridge_ranks.LAYOUT)[0].model.multi_modal_projector.state_dict()  # the one that the ranks made
    for found in (load_file(both.folder / "bridge_ranks" / "bridge.safetensors"), *both.found("bridge_ranks")):
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.slow
@SHARDED
def test_r24_resumed_in_shards_is_the_run_that_was_never_interrupted(both):
    for whole, resumed, itself in both.found("sharded"):
        assert (
            both.folder / "sharded" / "run" / "checkpoint-2" / "model.safetensors"
        ).is_file()  # that has the other names
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        assert all(torch.equal(tensor, itself[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_r02_a_blank_image_fits_every_family(name):
    """And reaches every parameter of the vision tower that an image reaches."""
    model = made(name)
    handle = attach(model, CompressorConfig(keep=1.0))
    owner = model.model
    blank_features(owner, torch.zeros(1)).backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**ranks.batch_of(name, model)).loss.backward()
    inside = handle.parts.decoder + ".", handle.parts.head + "."
    wanted = {key for key, p in model.named_parameters() if p.grad is not None and not key.startswith(inside)}
    assert wanted and wanted <= reached | {"model.image_newline"}
    assert all(value.numel() <= 2**15 for value in blank_image(owner, torch.zeros(1)).values())


def test_r02_a_model_that_takes_images_in_another_form_is_told():
    model = made("llava, clip + llama")
    model.config.vision_config.image_size = 7
    with pytest.raises(ValueError, match="A blank image did not fit this model .*put one image into every rank"):
        blank_features(model.model, torch.zeros(1))
