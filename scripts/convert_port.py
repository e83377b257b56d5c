"""Weights of the authors' port of Chain-of-Sight (its ``CosResampler``), by their names there, both ways: to import.

The port counts windows in patches: ``cls_token_w4_q64`` are the 64 queries of the scale whose windows are 4 x 4
patches; ``attn_0_w4_l15_q64`` is that scale's attention to the encoder's block 15 (from 0: the output of the 16th),
in round 0. Queries run window by window, as ours do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from sparsight.bridges.windowed import WindowedResampler
from sparsight.errors import UserError
from sparsight.layouts import Layout, Scale
from sparsight.settings.bridges import ChainOfSightConfig

_INNER = {
    "attn.query_norm": "norm_query",
    "attn.cont_norm": "norm_context",
    "attn.to_q": "query",
    "attn.to_kv": "key_value",
    "attn.proj": "out",
    "ln": "norm_mlp",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_OUTER = {"ln_out": "norm", "out_proj": "proj"}
_QUERIES = re.compile(r"cls_token_w(\d+)_q(\d+)")
_BLOCK = re.compile(r"(attn|mlp|ln)_(\d+)_w(\d+)_l(\d+)_q(\d+)\.(.+)")


def from_port(state: Mapping[str, torch.Tensor], side: int | None = None) -> tuple[WindowedResampler, list[int]]:
    """A bridge from the port's state dict.

    Args:
        side: patches per side of the feature map; that of the widest window if not given, which is right where the
            coarsest scale sees the whole image.

    Returns:
        The bridge, and the numbers of the encoder's blocks (from 0) that its levels are.

    Raises:
        UserError: a tensor is missing, or one is there that the port does not have.
    """
    scales = sorted(((int(m[1]), int(m[2])) for m in map(_QUERIES.fullmatch, state) if m), reverse=True)
    blocks = [m for m in map(_BLOCK.fullmatch, state) if m]
    if not scales or not blocks or "out_proj.weight" not in state:
        raise UserError(
            f"not the port's resampler: expected cls_token_w..., attn_..., out_proj, found {list(state)[:5]}"
        )
    side = side or scales[0][0]
    if any(side % window or queries % (side // window) ** 2 for window, queries in scales):
        raise UserError(f"windows and queries {scales} do not fit a map of {side}x{side} patches; give side=")
    layout = Layout(tuple(Scale(side // window, queries // (side // window) ** 2) for window, queries in scales))
    levels = sorted({int(m[4]) for m in blocks})
    width, depth = state["out_proj.weight"].shape[1], 1 + max(int(m[2]) for m in blocks)
    norms = {int(m[4]): state[m[0]].shape[0] for m in blocks if m[6] == "cont_norm.weight"}  # levels differ in width
    if bare := [level for level in levels if level not in norms]:
        raise UserError(f"not the port's resampler: no cont_norm.weight of the blocks {bare}")
    mlp = next(tensor.shape[0] for name, tensor in state.items() if name.endswith("fc1.weight"))
    settings = ChainOfSightConfig(layout, width=width, heads=max(1, width // 64), mlp_ratio=mlp / width, depth=depth)
    with torch.device("meta"):
        bridge = WindowedResampler(settings, [norms[level] for level in levels], state["out_proj.weight"].shape[0])
    names = _names(bridge, side, levels)
    missing, extra = sorted(names.values() - state.keys()), sorted(state.keys() - names.values())
    if missing or extra:
        raise UserError(f"not the port's resampler: missing {missing[:3]}, not known {extra[:3]}")
    shapes = {name: tensor.shape for name, tensor in bridge.state_dict().items()}
    ours = {name: state[theirs].reshape(shapes[name]).clone() for name, theirs in names.items()}
    bridge.load_state_dict(ours, assign=True)
    return bridge, levels


def to_port(bridge: WindowedResampler, side: int, levels: Sequence[int]) -> dict[str, torch.Tensor]:
    """The port's state dict of a bridge.

    Args:
        side: patches per side of the feature map.
        levels: numbers of the encoder's blocks, from 0, that the bridge's levels are.

    Raises:
        UserError: the port has no such bridge: windows of unequal size, shared queries, heads not 64 wide.
    """
    settings = bridge.settings
    if any(side % scale.grid for scale in bridge.layout.scales):
        raise UserError(f"the port has no windows of unequal size: layout '{bridge.layout}', a map of {side}x{side}")
    if getattr(settings, "shared_queries", False) or getattr(settings, "order", "coarse_to_fine") != "coarse_to_fine":
        raise UserError("the port has a query for each token, and tokens from coarse to fine")
    if settings.heads != max(1, settings.width // 64):
        raise UserError(f"the port's heads are 64 wide: expected {settings.width // 64} heads, found {settings.heads}")
    state = bridge.state_dict()
    names = _names(bridge, side, levels)
    return {
        theirs: state[ours].reshape(1, -1, settings.width) if theirs.startswith("cls_token") else state[ours]
        for ours, theirs in names.items()
    }


def _names(bridge: WindowedResampler, side: int, levels: Sequence[int]) -> dict[str, str]:
    """Our name of each tensor -> the port's."""
    back = {ours: theirs for theirs, ours in _INNER.items()}
    names: dict[str, str] = {}
    for name in bridge.state_dict():
        if not name.startswith("scales."):
            part, leaf = name.split(".")
            names[name] = f"{next(theirs for theirs, ours in _OUTER.items() if ours == part)}.{leaf}"
            continue
        _, grid, rest = name.split(".", 2)
        scale = next(s for s in bridge.layout.scales if s.grid == int(grid))
        window = side // scale.grid
        if rest == "queries":
            names[name] = f"cls_token_w{window}_q{scale.tokens}"
            continue
        _, number, inner = rest.split(".", 2)
        turn, index = divmod(int(number), len(levels))
        module, leaf = inner.rsplit(".", 1)
        kind, _, deeper = back[module].partition(".")
        where = f"{kind}_{turn}_w{window}_l{levels[index]}_q{scale.tokens}"
        names[name] = ".".join(filter(None, (where, deeper, leaf)))
    return names
