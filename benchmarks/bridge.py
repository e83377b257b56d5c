"""Time of the Chain-of-Sight bridge, forward and backward, at the paper's shapes, against two others.

`loop` is the obvious version: nn.MultiheadAttention, one window after the other. `global` is one resampler with as many
tokens that all see the whole map. The three take turns in one process, so that the machine's moods hit them alike; what
counts is the ratio, next to that of the FLOPs, which torch counts for all three.

    python benchmarks/bridge.py [--device cuda] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import device_name, now, timing_options, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsight.bridges import build_bridge
from sparsight.devices.precision import precision_on
from sparsight.pipeline import autocast
from sparsight.settings.bridges import ChainOfSightConfig, ResamplerConfig

# patches per side, layout; 27 is SigLIP's map, which no grid divides
SHAPES = [(16, "cos-80"), (16, "cos-336"), (27, "cos-336"), (32, "cos-80"), (32, "cos-336"), (32, "cos-1296")]
CONTEXT, WIDTH, HEADS, LANGUAGE, LEVELS = 1024, 1024, 16, 4096, 2


class LoopBlock(nn.Module):
    """What one would write first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_query, self.norm_context, self.norm_mlp = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(CONTEXT),
            nn.LayerNorm(WIDTH),
        )
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=CONTEXT, vdim=CONTEXT, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, q_BQD: torch.Tensor, x_BPC: torch.Tensor) -> torch.Tensor:
        x_BPC = self.norm_context(x_BPC)
        q_BQD = q_BQD + self.attention(self.norm_query(q_BQD), x_BPC, x_BPC, need_weights=False)[0]
        return q_BQD + self.mlp(self.norm_mlp(q_BQD))


class Loop(nn.Module):
    def __init__(self, settings: ChainOfSightConfig) -> None:
        super().__init__()
        self.scales = settings.scales.scales
        self.queries = nn.ParameterList(torch.randn(s.grid**2, s.queries, WIDTH) * 0.02 for s in self.scales)
        self.blocks = nn.ModuleList(nn.ModuleList(LoopBlock() for _ in range(LEVELS)) for _ in self.scales)
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LANGUAGE)

    def forward(self, levels_BLMC: list[torch.Tensor]) -> torch.Tensor:
        side, tokens = levels_BLMC[0].shape[1], []
        for scale, queries, blocks in zip(self.scales, self.queries, self.blocks, strict=True):
            cuts = [index * side // scale.grid for index in range(scale.grid + 1)]
            for window, q_QD in enumerate(queries):
                row, column = divmod(window, scale.grid)
                q_BQD = q_QD.expand(levels_BLMC[0].shape[0], -1, -1)
                for block, x_BLMC in zip(blocks, levels_BLMC, strict=True):
                    own = x_BLMC[:, cuts[row] : cuts[row + 1], cuts[column] : cuts[column + 1]].flatten(1, 2)
                    q_BQD = block(q_BQD, own)
                tokens.append(q_BQD)
        return self.proj(self.norm(torch.cat(tokens, 1)))


def measure(side: int, layout: str, device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step (forward, backward to weights and features) for each version, and its FLOPs."""
    ours = ChainOfSightConfig(layout)
    settings = {"ours": ours, "global": ResamplerConfig(tokens=ours.scales.tokens)}
    bridges = {name: build_bridge(value, [CONTEXT] * LEVELS, LANGUAGE) for name, value in settings.items()}
    bridges["loop"] = Loop(ours)
    bridges = {name: bridge.to(device) for name, bridge in bridges.items()}
    levels = [torch.randn(batch, side, side, CONTEXT, device=device, requires_grad=True) for _ in range(LEVELS)]

    def step(bridge: nn.Module) -> None:
        with autocast("auto", device):
            loss = bridge(levels).square().mean()
        loss.backward()
        bridge.zero_grad(set_to_none=True)
        for level in levels:
            level.grad = None

    flops = {}
    for name, bridge in bridges.items():
        with FlopCounterMode(display=False) as counter:
            step(bridge)
        flops[name] = counter.get_total_flops()
    times: dict[str, list[float]] = {name: [] for name in bridges}
    for _ in range(rounds):
        for name, bridge in bridges.items():
            start = now(device)
            step(bridge)
            times[name].append(now(device) - start)
    row: dict[str, Any] = {"map": side, "layout": str(ours.scales), "tokens": ours.scales.tokens, "batch": batch}
    row["seconds"] = {name: statistics.median(values) for name, values in times.items()}
    row["spread"] = {name: (min(values), max(values)) for name, values in times.items()}
    row["flops"] = flops
    for other in ("loop", "global"):
        row[f"time_vs_{other}"] = row["seconds"]["ours"] / row["seconds"][other]
        row[f"flops_vs_{other}"] = flops["ours"] / flops[other]
    return row


def main() -> None:
    options, device = timing_options(__doc__)
    console = Console()
    torch.manual_seed(0)
    batch = 32 if device.type == "cuda" else 2
    rows = [measure(*shape, device, batch, options.rounds) for shape in track(SHAPES, "measuring", console=console)]
    table = Table(title="ours, forward + backward: time (executed FLOPs), as a ratio", title_justify="left")
    for column in ("map", "layout", "tokens", "ms", "of the loop's", "of one global resampler's"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for row in rows:
        ratios = (f"{row[f'time_vs_{o}']:.2f} ({row[f'flops_vs_{o}']:.2f})" for o in ("loop", "global"))
        name = f"{row['map']}x{row['map']}"
        table.add_row(name, row["layout"], str(row["tokens"]), f"{1000 * row['seconds']['ours']:.0f}", *ratios)
    console.print(table)
    result = {
        "device": device_name(device),
        "config": {"context": CONTEXT, "width": WIDTH, "heads": HEADS, "language": LANGUAGE, "levels": LEVELS},
        "rounds": options.rounds,
        "precision": precision_on(device, "auto"),
        "rows": rows,
    }
    write_result(f"bridge-{device.type}", result, options.out, console)


if __name__ == "__main__":
    main()
