"""Lengths after compression padded to a multiple: shapes that a GPU likes, and the same loss and gradients."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batch_of, made

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach

HALF_OFF = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")


@pytest.mark.parametrize("images", [(1, 1), (1, 2)], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_to_a_multiple_changes_nothing(name: str, images: tuple[int, int]) -> None:
    """Also beyond the length that a row had before: 64 is more than most have."""
    model = made(name)
    batch = batch_of(name, model, images if name != "paligemma" else (1, 1))
    found = []
    for multiple in (1, 8, 64):
        handle = attach(model, CompressorConfig(keep=0.5, pad_to_multiple_of=multiple), HALF_OFF)
        handle.step(3, 0.0)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        (done,) = handle.take_passes()
        found.append(
            (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, done)
        )
        handle.detach()
    (wanted, gradients, short), *others = found
    for (loss, those, done), multiple in zip(others, (8, 64), strict=True):
        assert done.length == -(-short.length // multiple) * multiple and done.visual_out == short.visual_out
        assert torch.allclose(loss, wanted, rtol=1e-6) and those.keys() == gradients.keys()
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, gradient in those.items():
            assert (gradient - gradients[key]).abs().max() <= 1e-6 * largest, key


def test_without_being_asked_a_cpu_pads_nothing_and_generation_never_does() -> None:
    model = made("llava, clip + llama")
    batch = batch_of("llava, clip + llama", model)
    for settings, training in (({}, True), ({"pad_to_multiple_of": 64}, False)):
        handle = attach(model.train(training), CompressorConfig(keep=0.5, **settings), train_only=False)
        model(**batch)
        assert handle.passes[0].length == 16
        handle.detach()
