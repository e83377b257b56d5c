"""On a pretended device: attached methods bring what the host must know in one copy a forward pass, and work."""

import re
from itertools import cycle
from pathlib import Path

import pytest
import torch
from families import CONFIGS, batch_of, made
from test_families import made as family_made
from test_families import script

from pretended import DEVICE, Pretended, move, on_device
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.compress import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
MORE = int(re.search(r"^\| `attach`, more than .* \| (\d+) \|$", PAGE, re.MULTILINE)[1])  # waits, as the page says
SKIPPER = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")
LLAVA = "llava, clip + llama"


def forward(model, batch, precision="fp32"):
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(**batch).loss


def step(model, batch, precision="fp32"):
    """Loss and gradients of a pass forward and backward, on the CPU."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = forward(model, batch, precision)
    loss.backward()
    grads = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach().cpu(), grads


def waited(mode, model, batch, precision="fp32"):
    mode.take()
    forward(model, batch, precision).backward()
    return mode.take()


def sparse(model, method, skipper=SKIPPER):
    handle = attach(model, CompressorConfig(keep=0.5, method=method), skipper)
    handle.step(1, 0.5)
    return handle


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name, method", [*zip(CONFIGS, cycle(METHODS), strict=False)])
def test_one_copy_to_the_host_a_pass_and_what_the_cpu_gives(name, method, precision):
    """Every tensor is where it is used: an operation on two devices is an error. Loss and gradients are the CPU's."""
    of_loss, of_grads = (1e-6, 1e-5) if precision == "fp32" else (4e-3, 8e-2)  # measured 1e-7, 2e-6; 2e-3, 4e-2
    model = made(name)
    batch = batch_of(name, model, (1, 2))
    handle = sparse(model, method)
    wanted, grads = step(model, batch, precision)
    handle.detach()
    with Pretended() as mode:
        move(model)
        batch = on_device(batch)
        plain = waited(mode, model, batch, precision)
        handle = sparse(model, method)
        found = waited(mode, model, batch, precision)
        assert len(found) <= len(plain) + MORE, found
        handle.step(1, 0.5)  # the same draws
        loss, there = step(model, batch, precision)
        assert (loss - wanted).abs() <= of_loss * wanted and grads.keys() == there.keys()  # kernels differ a little
        # That of a bias of keys is zero but for rounding.
        error = {key: (grad - there[key]).abs().max() / (1e-2 + grad.abs().max()) for key, grad in grads.items()}
        assert max(error.values()) <= of_grads
        with handle.disabled():
            assert len(waited(mode, model, batch, precision)) == len(plain)


@pytest.mark.parametrize("method", METHODS)
def test_packed_samples_and_labels_on_visual_tokens(method):
    model = made(LLAVA)
    one, two = (batch_of(LLAVA, model, (images,), seed=images) for images in (1, 2))
    batch = {key: torch.cat([one[key], two[key]], 1) for key in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(each["input_ids"].shape[1]) for each in (one, two)])[None]
    batch |= {"pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]), "use_cache": False}
    with Pretended() as mode:
        move(model)
        batch = on_device(batch)
        plain = waited(mode, model, batch)
        handle = sparse(model, method)
        assert len(waited(mode, model, batch)) <= len(plain) + MORE
        handle.detach()
        handle = attach(model, CompressorConfig(keep=0.5, method=method), supervised_logits_only=True)
        assert len(waited(mode, model, batch)) <= len(plain) + MORE and handle.take_passes()[0].labels
        batch["labels"] = batch["input_ids"].clone()
        with pytest.warns(UserWarning, match="labels of this batch stood on visual tokens"):
            assert len(waited(mode, model, batch)) <= len(plain) + MORE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", ["compress", "gather"])
def test_an_index_left_on_the_host_is_seen(monkeypatch, place, precision):
    """The bug that these tests are for."""
    monkeypatch.setattr(f"sparsight.sparse.{place}.to_device", lambda array, device: torch.from_numpy(array))
    name = LLAVA if place == "compress" else "qwen3_vl"
    model = made(name)
    batch = batch_of(name, model, (1, 2))
    with Pretended() as mode:
        move(model)
        batch = on_device(batch)
        plain = waited(mode, model, batch, precision)
        sparse(model, "uniform")
        if place == "gather":  # as an index in brackets, a GPU takes it, and waits
            assert len(waited(mode, model, batch, precision)) > len(plain) + MORE
        else:
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                waited(mode, model, batch, precision)


def test_autocast_is_that_of_cuda():
    """Which types operations have there; that of the CPU leaves `index_put` and others alone."""
    x, index = torch.ones(2, 2), torch.tensor([1])
    with Pretended(), torch.autocast(DEVICE.type, torch.bfloat16):
        x, index = on_device((x, index))
        low = torch.nn.functional.linear(x, x)
        assert low.dtype == (x @ x).dtype == torch.bfloat16
        assert {each.dtype for each in (low.softmax(-1), low.exp(), low.sum())} == {torch.float32}
        assert x.index_put((index,), low[:1]).dtype == x.scatter_add(0, index[None], low).dtype == torch.float32
        assert low.index_put((index,), low[:1]).dtype == torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("name", script.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_one_copy_more_in_every_family(name):
    try:
        model = family_made(name)
        batch = script.batch_of(model)
        attach(model, CompressorConfig(keep=0.5)).detach()
        script.gradients(model, batch)
    except Exception as error:
        pytest.skip(f"not attached to: {error}")
    with Pretended() as mode:
        move(model)
        batch = on_device(batch)
        plain = len(waited(mode, model, batch))
        for method in METHODS:
            handle = sparse(model, method, None)
            assert len(waited(mode, model, batch)) <= plain + MORE
            handle.detach()
