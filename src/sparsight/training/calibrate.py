"""How fast this computer runs a recipe's model: real steps at a few numbers of visual tokens, and a line through."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.bridges import build_bridge
from sparsight.cost.forecast import StageCost
from sparsight.counting import device_name, timed
from sparsight.modeling import SparsightForConditionalGeneration
from sparsight.training.stages import add_lora, select_trainable

SECONDS = 30.0
TERMS = ("pass", "linear", "attention")


class Passes:
    """Forward and backward passes of a stage behind the encoder, with any bridge, on random pictures and words."""

    def __init__(self, model: SparsightForConditionalGeneration, cost: StageCost) -> None:
        self.model, self.cost, stage, config = model, cost, cost.stage, model.config
        self.device, self.precision = model.device, cost.recipe.precision
        count = cost.micro_batch
        self.images = max(1, round(count * stage.conversation.images))
        pixels = torch.randn(self.images, 3, config.image_size, config.image_size, device=self.device)
        self.encode = lambda: model.model.encode_images(pixels)
        with torch.no_grad(), self.autocast():
            self.levels = tuple(level.float() for level in self.encode())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def set_bridge(self, bridge: Any) -> StageCost:
        """Take another bridge; returns what the stage costs with it."""
        config, stage = self.model.config, self.cost.stage.model_copy(update={"bridge": bridge})
        config.bridge_config = bridge.model_dump()
        built = build_bridge(bridge, config.level_widths, config.text_config.hidden_size).to(self.device)
        self.model.model.multi_modal_projector = built.requires_grad_("bridge" in stage.learning_rate.parts())
        return replace(self.cost, stage=stage)

    def run(self) -> None:
        config, conversation, count = self.model.config, self.cost.stage.conversation, self.cost.micro_batch
        each, text = self.images // count * config.num_image_tokens, max(2, round(conversation.text))
        ids = torch.randint(5, 200, (count, each + text), device=self.device)
        ids[ids == config.image_token_id] += 1
        ids[:, :each] = config.image_token_id
        labels = ids.clone()
        labels[:, : -max(1, round(conversation.learnt))] = -100
        encoded = {"image": BaseModelOutputWithPooling(hidden_states=self.levels)} if each else None
        with self.autocast():
            out = self.model(
                input_ids=ids,
                labels=labels,
                attention_mask=torch.ones_like(ids),
                mm_encoder_outputs=encoded,
                loss_only=True,
                use_cache=False,
            )
        out.loss.backward()
        self.model.zero_grad(set_to_none=True)


def in_turn(passes: Passes, bridges: Sequence[Any], seconds: float) -> list[tuple[dict[str, float], float]]:
    """FLOPs by part of a pass with each bridge, and its median seconds; bridges take turns, at least three times, for
    about so many seconds in all."""
    times: list[list[float]] = [[] for _ in bridges]
    flops: list[dict[str, float]] = [{} for _ in bridges]
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        for number, bridge in enumerate(bridges):
            flops[number] = passes.set_bridge(bridge).micro_batch_flops()
            if turn == 0:
                passes.run()
            times[number].append(timed(passes.run, passes.device))
        if time.perf_counter() > end and turn >= 2:
            return [(parts, statistics.median(taken)) for parts, taken in zip(flops, times, strict=True)]
    raise AssertionError


def ready(model: SparsightForConditionalGeneration, cost: StageCost) -> Passes:
    """A model as the stage trains it."""
    add_lora(model, cost.stage, seed=0)
    select_trainable(model, cost.stage)
    model.train().model.vision_tower.eval()
    if cost.stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Passes(model, cost)


def calibrate(
    model: SparsightForConditionalGeneration, cost: StageCost, bridges: Sequence[Any], seconds: float
) -> dict[str, Any]:
    """Seconds of a pass, of a FLOP of linear maps, of attention and of the encoder, and of a parameter's update.

    Args:
        model: of the recipe; it is used up.
        cost: the stage to run.
        bridges: settings to run it with, from few tokens to many.
        seconds: about how long.
    """
    passes = ready(model, cost)
    taken = in_turn(passes, bridges, seconds)
    with torch.no_grad(), passes.autocast():
        encoder = min(timed(passes.encode, passes.device) for _ in range(3)) / passes.images
    frozen = replace(cost.trains, vision=False)
    encoder /= cost.shapes[0].flops(cost.stage.image_size, cost.recipe.vision_levels, frozen)
    found = fit(*zip(*taken, strict=True)) | {"encoder": encoder, "optimizer": _update(model, passes.device)}
    return found | {"device": device_name(passes.device), "measured": [median for _, median in taken]}


def _update(model: Any, device: torch.device) -> float:
    """Seconds of AdamW for each parameter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return min(timed(optimizer.step, device) for _ in range(3)) / sum(p.numel() for p in trained)


def fit(parts: Sequence[dict[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds of a pass, and of each FLOP of linear maps and of attention: no negative ones, least relative squares."""
    attention = np.array([part["language_attention"] for part in parts])
    linear = np.array([sum(part.values()) for part in parts]) - attention
    terms = np.stack([np.ones(len(parts)), linear, attention], 1) / np.array(seconds)[:, None]
    best, least = [0.0] * 3, np.inf
    for size in (1, 2, 3):
        for columns in itertools.combinations(range(3), size):
            scale = terms[:, columns].max(0)
            solution = np.linalg.lstsq(terms[:, columns] / scale, np.ones(len(parts)), rcond=None)[0] / scale
            error = float(((terms[:, columns] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least:
                best, least = [0.0] * 3, error
                for column, value in zip(columns, solution, strict=True):
                    best[column] = float(value)
    return dict(zip(TERMS, best, strict=True))
