"""The port's names and its published formula, said again here with plain products and a softmax."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparsight.bridges import build_bridge
from sparsight.settings.bridges import ChainOfSightConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from convert_port import from_port, to_port

WIDTH, CONTEXT, OUT, HEADS = 128, 48, 40, 2


def port_state(side=16, windows=((16, 16), (4, 64)), levels=(15, 22), depth=1):
    """Random weights under the port's names, in its shapes."""
    torch.manual_seed(0)

    def linear(name, outside, inside, bias=True):
        state[f"{name}.weight"] = torch.randn(outside, inside) * inside**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(outside) * 0.2

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(width) * 0.2, torch.randn(width) * 0.2

    state = {}
    for window, queries in windows:
        state[f"cls_token_w{window}_q{queries}"] = torch.randn(1, queries, WIDTH)
        for turn in range(depth):
            for level in levels:
                where = f"{turn}_w{window}_l{level}_q{queries}"
                linear(f"attn_{where}.to_q", WIDTH, WIDTH, bias=False)
                linear(f"attn_{where}.to_kv", 2 * WIDTH, CONTEXT, bias=False)
                linear(f"attn_{where}.proj", WIDTH, WIDTH)
                norm(f"attn_{where}.query_norm", WIDTH)
                norm(f"attn_{where}.cont_norm", CONTEXT)
                linear(f"mlp_{where}.fc1", 4 * WIDTH, WIDTH)
                linear(f"mlp_{where}.fc2", WIDTH, 4 * WIDTH)
                norm(f"ln_{where}", WIDTH)
    norm("ln_out", WIDTH)
    linear("out_proj", OUT, WIDTH)
    return state


def published(state, levels, side, windows, depth=1):
    """Tokens by the formula of the paper and the port, one window at a time, in double precision."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    tokens = []
    for window, queries in windows:
        each = queries // (side // window) ** 2
        for number in range((side // window) ** 2):
            row, column = divmod(number, side // window)
            q = w[f"cls_token_w{window}_q{queries}"][0, number * each : (number + 1) * each].expand(2, -1, -1)
            for turn in range(depth):
                for level, x in levels.items():
                    where = f"{turn}_w{window}_l{level}_q{queries}"
                    rows, columns = (
                        slice(row * window, (row + 1) * window),
                        slice(column * window, (column + 1) * window),
                    )
                    context = norm(x[:, rows, columns].double().flatten(1, 2), f"attn_{where}.cont_norm")
                    keys, values = linear(context, f"attn_{where}.to_kv").split(WIDTH, -1)
                    wanted = linear(norm(q, f"attn_{where}.query_norm"), f"attn_{where}.to_q")
                    heads = []
                    for k, v, want in zip(*(t.chunk(HEADS, -1) for t in (keys, values, wanted)), strict=True):
                        heads.append((want @ k.transpose(1, 2) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v)
                    q = q + linear(torch.cat(heads, -1), f"attn_{where}.proj")
                    inner = F.gelu(linear(norm(q, f"ln_{where}"), f"mlp_{where}.fc1"))
                    q = q + linear(inner, f"mlp_{where}.fc2")
            tokens.append(q)
    return linear(norm(torch.cat(tokens, 1), "ln_out"), "out_proj")


SHAPES = [
    {},
    {"windows": ((16, 16), (8, 64), (2, 256))},  # 336 tokens
    {"windows": ((16, 5),), "levels": (22,)},
    {"depth": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape):
    state = port_state(**shape)
    bridge, levels = from_port(state)
    again = to_port(bridge, 16, levels)
    assert state.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_published_formula(shape):
    state = port_state(**shape)
    bridge, numbers = from_port(state)
    levels = {number: torch.randn(2, 16, 16, CONTEXT) for number in numbers}
    windows, depth = shape.get("windows", ((16, 16), (4, 64))), shape.get("depth", 1)
    error = (bridge(list(levels.values())) - published(state, levels, 16, windows, depth)).abs().max()
    assert error <= 2e-5, error  # measured 3e-6 at most


def test_the_layout_is_read_from_the_names():
    bridge, levels = from_port(port_state())
    assert str(bridge.layout) == "1:16,4:4" and levels == [15, 22]
    assert (bridge.settings.width, bridge.settings.heads, bridge.settings.mlp_ratio) == (WIDTH, HEADS, 4)
    # Scaled to 448 px, the same names mean a finer grid.
    assert str(from_port(port_state(windows=((8, 64), (4, 64))), side=32)[0].layout) == "4:4,8:1"


def test_what_is_not_the_ports():
    with pytest.raises(ValueError, match="not the port's resampler: expected cls_token_w"):
        from_port({"weight": torch.zeros(1)})
    state = port_state()
    with pytest.raises(ValueError, match=r"do not fit a map of 20x20 patches"):
        from_port(state, side=20)
    with pytest.raises(ValueError, match=r"missing \[\], not known \['ada.0.weight'\]"):
        from_port(state | {"ada.0.weight": torch.zeros(1)})
    del state["attn_0_w4_l22_q64.proj.bias"]
    with pytest.raises(ValueError, match=r"missing \['attn_0_w4_l22_q64.proj.bias'\]"):
        from_port(state)


@pytest.mark.parametrize(
    "settings, message",
    [
        (ChainOfSightConfig("1:2,3:1", width=128, heads=2), "no windows of unequal size"),
        (ChainOfSightConfig("1:2", width=128, heads=4), "expected 2 heads, found 4"),
        (ChainOfSightConfig("1:2", width=128, heads=2, shared_queries=True), "a query for each token"),
        (ChainOfSightConfig("1:2", width=128, heads=2, order="fine_to_coarse"), "from coarse to fine"),
    ],
)
def test_what_the_port_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        to_port(build_bridge(settings, [CONTEXT], OUT), 16, [22])


def test_F15_levels_of_different_width_go_there_and_back():
    """README's encoder has such levels; the snippet of docs/chain-of-sight.md failed on its model."""
    bridge = build_bridge(ChainOfSightConfig("1:4,2:1", width=64, heads=1), [24, 40], 48)
    back, levels = from_port(to_port(bridge, side=8, levels=[3, 7]))
    assert levels == [3, 7]
    assert all(torch.equal(tensor, bridge.state_dict()[name]) for name, tensor in back.state_dict().items())
    whole = to_port(bridge, side=8, levels=[3, 7])
    state = {name: tensor for name, tensor in whole.items() if "l7_" not in name or "cont" not in name}
    with pytest.raises(ValueError, match=r"no cont_norm.weight of the blocks \[7\]"):
        from_port(state)
