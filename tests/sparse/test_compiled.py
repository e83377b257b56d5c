"""torch.compile beside the methods: what a graph holds is a plain layer, however many of them are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import batch_of, made
from torch import _dynamo as dynamo
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from tiny import make_vlm

NAME = "llava, clip + llama"
METHODS = CompressorConfig(keep=0.5), SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")


class Graphs:
    """A backend that counts graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


@pytest.mark.parametrize("compiled_first", [True, False])
def test_two_graphs_for_all_layers_and_none_after_the_first_epoch(compiled_first: bool) -> None:
    """One for the first length, one for all others: the layers share them. Losses are those of the plain layers."""
    model, graphs = made(NAME), Graphs()
    model.set_attn_implementation("sdpa")
    # Rows of several lengths, so that there is a mask; without one, it is two graphs more.
    batches = [
        batch_of(NAME, model, images, seed) | {"use_cache": False}
        for seed, images in enumerate([(1, 2), (2, 3), (1, 3)])
    ]
    wanted, counts, skipped = [], [], set()
    for compiled in (False, True):
        if compiled and compiled_first:
            for layer in model.model.language_model.layers:
                layer.compile(backend=graphs)
        handle = attach(model, *METHODS)
        if compiled and not compiled_first:
            for layer in handle.layers:
                layer.compile(backend=graphs)
        for number in range(2 * len(batches)):
            handle.step(number, 0.0)
            loss = model(**batches[number % len(batches)]).loss
            loss.backward()
            if not compiled:
                wanted.append(loss.detach())
                continue
            assert torch.allclose(loss, wanted[number], rtol=1e-6)
            counts.append(graphs.count)
            skipped.add(handle.skipped)
        handle.detach()
    assert counts[len(batches) - 1 :] == [2] * (len(batches) + 1) and len(skipped) > 3
    assert not dynamo.utils.counters["recompile_limit"]


def test_the_bridge_is_one_graph() -> None:
    model, _ = make_vlm("1:4,2:1,3:1")  # the last grid does not divide the map
    bridge, graphs = model.model.multi_modal_projector, Graphs()
    levels = [torch.randn(2, 8, 8, 32) for _ in range(2)]
    compiled = torch.compile(bridge, fullgraph=True, backend=graphs)
    assert torch.allclose(compiled(levels), bridge(levels), atol=1e-6) and graphs.count == 1


def test_the_step_of_our_model_is_one_graph() -> None:
    """With fixed lengths, from features: the loss of supervised positions alone, and its gradients."""
    model, _ = make_vlm("1:16", vision_levels=[2])
    model.train().model.language_model.set_attn_implementation("sdpa")
    model.model.vision_tower.requires_grad_(False)  # pixels: tests/modeling/test_upstream.py
    batch, graphs = batch_of("sparsight", model, (1, 1)) | {"use_cache": False, "loss_only": True}, Graphs()
    levels = model.model.encode_images(batch.pop("pixel_values"))
    batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(hidden_states=levels)}
    trained = [p for p in model.parameters() if p.requires_grad]
    found, wanted = torch.compile(model, fullgraph=True, backend=graphs)(**batch).loss, model(**batch).loss
    assert torch.allclose(found, wanted, rtol=1e-6) and graphs.count == 1
    for one, other in zip(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
