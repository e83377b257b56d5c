"""R14: samples of none to three images have the same gradients in one batch as alone, with every kind of bridge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.sources import Sample
from sparsight.settings.bridges import ChainOfSightConfig, LinearConfig, ResamplerConfig
from tiny import ListSource, conversation

BRIDGES = [
    LinearConfig(),
    ResamplerConfig(tokens=6, width=32, heads=2),
    ChainOfSightConfig("1:4,2:1", width=32, heads=2),
]
ANSWERS = ("12 apples.", "A small dog stands there.", "47", "A house, two trees and a boat.")


def gradients(model: Any, processor: Any, items: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, summed over labels, and its gradients."""
    batch = Collator(processor.tokenizer.pad_token_id)(items)
    batch.pop("info")
    model.zero_grad(set_to_none=True)
    loss = model(**batch, loss_only=True).loss * (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)])
@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.kind)
def test_a_batch_has_the_gradients_of_its_samples_alone(tiny_vlm, bridge: Any, order: tuple[int, ...]) -> None:
    model, processor = tiny_vlm(bridge)
    samples = [
        Sample(f"s{images}", conversation(answer=answer, images=images), tuple(range(images, 2 * images)))
        for images, answer in enumerate(ANSWERS)
    ]
    data = TrainingSet(ListSource(*samples), processor, 4)
    loss, together = gradients(model, processor, [data[index] for index in order])
    alone = [gradients(model, processor, [data[index]]) for index in range(4)]
    assert loss == pytest.approx(sum(float(each) for each, _ in alone), rel=1e-5)
    assert any("vision_tower" in name for name in together) and any("projector" in name for name in together)
    for name, found in together.items():
        right = sum(part[name] for _, part in alone if name in part)
        scale = right.abs().max() + 1e-6
        assert ((found - right).abs().max() / scale) < 1e-3, name
        assert ((found - right).mean().abs() / scale) < 1e-4, name
