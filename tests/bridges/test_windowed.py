import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.bridges import WindowedResampler, build_bridge
from sparsight.bridges.windowed import cut_windows, window_index
from sparsight.config import ChainOfSight, Resampler
from sparsight.layouts import Layout, Scale


def made(layout, widths=(24, 40), out_width=20, heads=2, width=16):
    """A bridge with random weights of unit size, so that no term is too small to see."""
    torch.manual_seed(0)
    bridge = build_bridge(ChainOfSight(layout, width=width, heads=heads), widths, out_width)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            random = torch.randn_like(parameter)
            scale = 0.2 if parameter.ndim == 1 else 1.0 if name.endswith("queries") else parameter.shape[1] ** -0.5
            parameter.copy_(random * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return bridge


def maps(height, width, widths=(24, 40), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, height, width, channels, generator=generator) for channels in widths]


def norm(x, state, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * state[name + ".weight"] + state[name + ".bias"]


def plain(bridge, levels):
    """The resampler of Chain-of-Sight said again, one image, window, query and head at a time."""
    state = {name: tensor.double() for name, tensor in bridge.state_dict().items()}
    heads = 2
    images = []
    for image in range(levels[0].shape[0]):
        tokens = []
        for scale in bridge.layout.scales:
            for window in range(scale.grid**2):
                q = state[f"scales.{scale.grid}.queries"][window]  # (queries, width)
                for number, level in enumerate(levels):
                    block = f"scales.{scale.grid}.blocks.{number}"
                    height, width = level.shape[1:3]
                    row, column = divmod(window, scale.grid)
                    rows = range(row * height // scale.grid, (row + 1) * height // scale.grid)
                    columns = range(column * width // scale.grid, (column + 1) * width // scale.grid)
                    patches = torch.stack([level[image, r, c].double() for r, c in product(rows, columns)])
                    projected = norm(patches, state, f"{block}.norm_context") @ state[f"{block}.key_value.weight"].T
                    size = q.shape[-1]
                    keys, values = projected[:, :size], projected[:, size:]
                    wanted = norm(q, state, f"{block}.norm_query") @ state[f"{block}.query.weight"].T
                    mixed = torch.zeros_like(wanted)
                    for head in range(heads):
                        part = slice(head * size // heads, (head + 1) * size // heads)
                        for query in range(len(q)):
                            scores = (keys[:, part] @ wanted[query, part]) / math.sqrt(size // heads)
                            weights = torch.exp(scores - scores.max())
                            mixed[query, part] = (weights / weights.sum()) @ values[:, part]
                    q = q + mixed @ state[f"{block}.out.weight"].T + state[f"{block}.out.bias"]
                    hidden = norm(q, state, f"{block}.norm_mlp") @ state[f"{block}.mlp.0.weight"].T
                    hidden = hidden + state[f"{block}.mlp.0.bias"]
                    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                    q = q + hidden @ state[f"{block}.mlp.2.weight"].T + state[f"{block}.mlp.2.bias"]
                tokens += list(q)
        x = norm(torch.stack(tokens), state, "norm")
        images.append(x @ state["proj.weight"].T + state["proj.bias"])
    return torch.stack(images)


@pytest.mark.parametrize("tokens, millions", [("cos-80", 54.7), ("cos-1296", 81.1)])
def test_parameters_of_the_paper(tokens, millions):
    with torch.device("meta"):
        bridge = build_bridge(tokens, [1024, 1024], 4096)
    count = sum(p.numel() for p in bridge.parameters())
    assert round(count / 1e6, 1) == millions


def test_parameters_of_one_scale_and_level():
    with torch.device("meta"):
        bridge = build_bridge("cos-80", [1024, 1024], 4096)
    assert isinstance(bridge, WindowedResampler)
    blocks = [sum(p.numel() for p in block.parameters()) for scale in bridge.scales.values() for block in scale.blocks]
    assert [round(count / 1e6, 1) for count in blocks] == [12.6] * 4
    rows = [tuple(scale.queries.shape) for scale in bridge.scales.values()]
    assert rows == [(1, 16, 1024), (16, 4, 1024)]  # one row a token


@pytest.mark.parametrize("size", [(8, 8), (15, 17), (5, 4)], ids=str)
@pytest.mark.parametrize("widths", [(24,), (24, 40), (12, 24, 12)], ids=str)
@pytest.mark.parametrize("layout", ["1:3", "1:3,2:2,4:1", "3:2"])
def test_equal_to_a_plain_restatement(layout, widths, size):
    bridge, levels = made(layout, widths), maps(*size, widths)
    ours, theirs = bridge(levels), plain(bridge, levels)
    error = (ours - theirs).abs()
    assert error.max() <= 2e-5  # measured 2e-6 at most
    assert abs((ours - theirs).mean()) <= 1e-6  # no one-sided shift: no term is missing


@settings(max_examples=15)
@given(st.tuples(st.integers(3, 12), st.integers(3, 12)), st.sampled_from(["1:2,3:1", "2:2", "1:1,2:1,3:2"]))
def test_equal_to_a_plain_restatement_at_any_size(size, layout):
    bridge, levels = made(layout, (8,)), maps(*size, (8,), batch=1)
    assert (bridge(levels) - plain(bridge, levels)).abs().max() <= 2e-5


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
def test_a_window_sees_only_its_own_patches(size):
    bridge = made("1:2,2:2,4:1")
    levels = [level.requires_grad_() for level in maps(*size, batch=1)]
    tokens = bridge(levels)[0]
    starts = {1: 0, 2: 2, 4: 10}
    for scale in bridge.layout.scales:
        for window, query in product(range(scale.grid**2), range(scale.queries)):
            token = tokens[starts[scale.grid] + window * scale.queries + query]
            grads = torch.autograd.grad(token.square().sum(), levels, retain_graph=True)
            row, column = divmod(window, scale.grid)
            inside = torch.zeros(size, dtype=torch.bool)
            inside[
                row * size[0] // scale.grid : (row + 1) * size[0] // scale.grid,
                column * size[1] // scale.grid : (column + 1) * size[1] // scale.grid,
            ] = True
            for grad in grads:
                seen = grad[0].abs().amax(-1)
                assert seen[inside].min() > 0
                assert seen[~inside].numel() == 0 or seen[~inside].max() == 0


def test_images_do_not_see_each_other():
    bridge, levels = made("1:2,2:2"), maps(5, 6, batch=3)
    together = bridge(levels)
    alone = torch.cat([bridge([level[i : i + 1] for level in levels]) for i in range(3)])
    assert (together - alone).abs().max() <= 1e-5  # measured 1e-6


def test_tokens_run_from_coarse_to_fine():
    bridge, levels = made("1:3,2:2,4:1"), maps(8, 8)
    before = bridge(levels)
    starts = {"1": (0, 3), "2": (3, 11), "4": (11, 27)}
    for grid, (first, last) in starts.items():
        changed = made("1:3,2:2,4:1")
        with torch.no_grad():
            changed.scales[grid].queries.add_(1.0)
        moved = (changed(levels) - before).abs().amax((0, 2)) > 0
        assert moved.nonzero().flatten().tolist() == list(range(first, last))


def test_queries_take_in_the_lower_level_first():
    bridge, (low, high) = made("1:2", (24, 24)), maps(4, 4, (24, 24))
    assert (bridge([low, high]) - bridge([high, low])).abs().max() > 0.1
    scale = bridge.scales["1"]
    q = scale.blocks[1](scale.blocks[0](scale.queries[None], low, 1), high, 1)
    assert torch.equal(bridge([low, high]), bridge.proj(bridge.norm(q.flatten(1, 2))))


def test_a_resampler_is_one_scale():
    torch.manual_seed(3)
    one = build_bridge(Resampler(tokens=7, width=16, heads=2), (24,), 20)
    torch.manual_seed(3)
    other = build_bridge(ChainOfSight("1:7", width=16, heads=2), (24,), 20)
    levels = maps(5, 6, (24,))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one(levels), other(levels))


def test_start_values():
    """The paper's 0.02 at its width of 1024; elsewhere with 1 / sqrt(width), which keeps the size of the signals."""
    bridge = build_bridge(ChainOfSight("1:16,4:4", width=256, heads=4), (256,), 512)
    for name, parameter in bridge.named_parameters():
        if parameter.ndim == 1:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name
        else:
            wanted = 0.02 if name.endswith("queries") else 0.02 * (1024 / 256) ** 0.5
            assert abs(parameter.std().item() / wanted - 1) < 0.05, (name, parameter.std(), wanted)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_windows_hold_each_patch_once(height, width, grid):
    if grid > min(height, width):
        with pytest.raises(ValueError, match="windows per side needs at least"):
            window_index(height, width, grid)
        return
    index_WP, valid_WP = window_index(height, width, grid)
    assert sorted(index_WP[valid_WP].tolist()) == list(range(height * width))
    x = torch.arange(height * width).reshape(1, height, width, 1)
    windows, mask = cut_windows(x, grid)
    mask = torch.ones(windows.shape[1:3], dtype=torch.bool) if mask is None else mask
    assert sorted(windows[0, ..., 0][mask].tolist()) == list(range(height * width))
    assert windows[0, 0, 0, 0] == 0


def test_features_of_the_wrong_shape():
    bridge = made("1:2")
    good, small = maps(4, 4), maps(3, 4)
    with pytest.raises(
        ValueError, match=r"expects 2 levels \(B, H, W, C\) with C = \[24, 40\], found \[\(2, 4, 4, 24\)\]"
    ):
        bridge(good[:1])
    with pytest.raises(ValueError, match=r"expects 2 levels .* found \[\(2, 4, 4, 40\), \(2, 4, 4, 24\)\]"):
        bridge(good[::-1])
    with pytest.raises(ValueError, match="expects 2 levels"):
        bridge([level.flatten(1, 2) for level in good])
    with pytest.raises(ValueError, match="feature levels must have the same batch, height and width"):
        bridge([good[0], small[1]])
    with pytest.raises(ValueError, match="a grid of 4 windows per side needs at least 4 patches"):
        made("1:2,4:1")(small)


def test_settings_that_make_no_bridge():
    with pytest.raises(ValueError, match="at least one feature level, found none"):
        build_bridge("cos-80", [], 32)
    with pytest.raises(ValueError, match="unknown layout 'mpl'"):
        build_bridge("mpl", [32], 32)


def test_gradients_reach_every_parameter():
    bridge = made("1:2,2:1")
    bridge(maps(5, 4)).square().sum().backward()
    assert [name for name, p in bridge.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert bridge.layout == Layout((Scale(1, 2), Scale(2, 1)))
