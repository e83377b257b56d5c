"""The figures of each step: time, tokens, layers and executed FLOPs, for its record in the run log."""

from __future__ import annotations

import ctypes
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from sparsight.cost import Trains, bridge_flops
from sparsight.devices.copies import Sent, to_device
from sparsight.devices.peaks import peak_flops
from sparsight.devices.precision import default_device, device_name
from sparsight.devices.ranks import process_state, several_ranks
from sparsight.modeling import SparsightForConditionalGeneration
from sparsight.modeling.encoders import count_flops
from sparsight.settings.bridges import bridge_settings
from sparsight.sparse.attach import Pass
from sparsight.sparse.executed import language_shapes, pass_flops


@dataclass
class StepCounter:
    """Counts the micro-batches of a step.

    Args:
        encoder_flops: of one image (`count_flops`); at native resolution, each new size is counted as it comes.
        precision: bf16 or fp32: the peak of this device, where it is known, gives ``mfu``.
        resident: bytes of the process before the run, which are not its own.
    """

    model: SparsightForConditionalGeneration
    trains: Trains
    encoder_flops: float
    precision: str = "bf16"
    resident: int = 0

    def __post_init__(self) -> None:
        self.peak = peak_flops(device_name(default_device()), self.precision)
        self.shapes = language_shapes(self.model.config.text_config)
        self.bridge = bridge_settings(self.model.config.bridge_config)
        self.layers = self.layers_run = self.shapes[0].layers
        self.flops_of_grid: dict[tuple[int, int], float] = {}
        self.clear()

    def clear(self) -> None:
        """Begin the next step."""
        self.counts: dict[str, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu = cpu_seconds()
        self.losses: list[torch.Tensor] = []  # of this rank's micro-batches
        self.passes: list[list[str]] = []  # ids of their samples
        self.norm = torch.zeros(())  # of the gradients
        self.replaced: list[dict[str, Any]] = []  # entries of bad samples, see `TrainingSet`
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def add(self, inputs: Mapping[str, Any], info: Mapping[str, Any], done: Pass | None = None) -> None:
        """Count a forward and backward pass over a batch, with its figures (``info``) from the `Collator`; ``done`` is
        what the methods left of it, where they are on."""
        (rows, length), visual = inputs["input_ids"].shape, info["visual_tokens"]
        done = done or Pass(rows, length, length, self.layers, visual, visual)
        parts = self._parts(info, inputs.get("mm_encoder_outputs") is not None, done)
        for part, flops in parts.items():
            self.flops[part] += flops
        self.last_flops, self.layers_run = sum(parts.values()), done.layers_run
        self.passes.append(info["ids"])
        self.counts["samples"] += len(info["ids"])
        self.counts["visual_tokens"] += visual
        self.counts["visual_tokens_kept"] += done.visual_out
        self.counts["text_tokens"] += info["filled"] - visual
        self.counts["padding_tokens"] += rows * length - info["filled"]

    def _parts(self, info: Mapping[str, Any], cached: bool, done: Pass) -> dict[str, float]:
        """FLOPs of a pass by part; for encoder and bridge, smaller maps of a batch are padded."""
        config, images, grids = self.model.config, info["images"], info["grids"]
        encoder, (high, wide) = images * self.encoder_flops, config.map_size
        if grids:
            encoder, (high, wide) = sum(map(self._of_grid, grids)), map(max, zip(*grids, strict=True))
        widths, out = config.level_widths, config.text_config.hidden_size
        bridge = bridge_flops(self.bridge, widths, out, (high, wide), images, self.trains)
        language = pass_flops(done, self.shapes, self.trains, info["supervised"])
        return {"encoder": 0.0 if cached else encoder, "bridge": bridge, **language}

    def _of_grid(self, grid: tuple[int, int]) -> float:
        """FLOPs of the encoder for an image of so many rows and columns of patches."""
        if grid not in self.flops_of_grid:
            tower: Any = self.model.model.vision_tower
            height, width = (patches * tower.config.patch_size for patches in grid)
            self.flops_of_grid[grid] = count_flops(tower, (height, width), self.model.config.vision_levels)
        return self.flops_of_grid[grid]

    def record(self) -> Callable[[], tuple[dict[str, Any], list[float], float]]:
        """Send off what the device knows of the step. Called, the result waits for it, and gives the step's record:
        counts and FLOPs of all ranks, their mean loss and bytes, and this rank's seconds; then the losses of this
        rank's micro-batches, and the gradients' norm."""
        state = process_state()
        own = [0.0] * state.num_processes
        own[state.process_index] = _memory(self.resident)
        counts, parts = [*self.counts], [*self.flops]
        numbers = np.array([*self.counts.values(), *self.flops.values(), *own], dtype=np.float64)
        mine, ranks = torch.stack([self.norm, *self.losses]), state.num_processes
        if several_ranks():
            mine = mine.double()
            everyone = torch.cat([mine[1:].sum()[None], to_device(numbers, mine.device)])
            torch.distributed.all_reduce(everyone)
            mine = torch.cat([mine, everyone])
        sent, seconds, passes = Sent(mine), dict(self.seconds), len(self.losses)
        known = {"replaced": len(self.replaced), "layers_run": self.layers_run, "layers": self.layers}
        spent = {"seconds": seconds, "cpu_seconds": max(0.0, cpu_seconds() - self.cpu)}

        def read() -> tuple[dict[str, Any], list[float], float]:
            norm, *values = sent.read()
            losses, (loss, *found) = values[:passes], values[passes:] or [sum(values), *numbers.tolist()]
            memory = [round(each) for each in found[-ranks:]]
            flops = dict(zip(parts, found[len(counts) : -ranks], strict=True))
            reached = sum(flops.values()) / ranks / max(sum(seconds.values()), 1e-9)
            return (
                {
                    **{name: round(number) for name, number in zip(counts, found, strict=False)},
                    **known,
                    "loss": loss / ranks,
                    "flops": sum(flops.values()),
                    "flops_by_part": flops,
                    **({} if self.peak is None else {"mfu": reached / self.peak}),
                    **spent,
                    "memory_bytes": max(memory),
                    **({"memory_by_rank": memory} if ranks > 1 else {}),
                },
                losses,
                norm,
            )

        return read


def cpu_seconds() -> float:
    """CPU time of this process, and of those that load data for it, also where they have ended."""
    own = psutil.Process()
    seconds = math.fsum(own.cpu_times()[:4])  # user and system: its own, and those of children that have ended
    for child in own.children():
        with suppress(psutil.Error):  # it ends just now, and counts in the next step
            seconds += math.fsum(child.cpu_times()[:2])
    return seconds


def resident_now() -> int:
    """Bytes that the process holds once all that can be freed is freed."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps freed blocks, other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def _memory(resident: int) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return max(0, psutil.Process().memory_info().rss - resident)
