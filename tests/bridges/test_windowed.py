import math
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsight.bridges import WindowedResampler, build_bridge
from sparsight.bridges.windowed import checked_sizes, cut_windows
from sparsight.layouts import Layout, Scale
from sparsight.settings.bridges import ChainOfSightConfig, ResamplerConfig, bridge_settings


def made(layout, widths=(24, 40), out_width=20, heads=2, width=16):
    """A bridge with random weights of unit size, so that no term is too small to see."""
    torch.manual_seed(0)
    bridge = build_bridge(ChainOfSightConfig(layout, width=width, heads=heads), widths, out_width)
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
    low_n, high_n = (F.layer_norm(level, (24,)) for level in (low, high))
    q = scale.blocks[1](scale.blocks[0](scale.queries[None], low_n, 1), high_n, 1)
    assert torch.equal(bridge([low, high]), bridge.proj(bridge.norm(q.flatten(1, 2))))


def test_a_resampler_is_one_scale():
    torch.manual_seed(3)
    one = build_bridge(ResamplerConfig(tokens=7, width=16, heads=2), (24,), 20)
    torch.manual_seed(3)
    other = build_bridge(ChainOfSightConfig("1:7", width=16, heads=2), (24,), 20)
    levels = maps(5, 6, (24,))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one(levels), other(levels))


def test_start_values():
    """The paper's 0.02 at its width of 1024; elsewhere with 1 / sqrt(width), which keeps the size of the signals."""
    bridge = build_bridge(ChainOfSightConfig("1:16,4:4", width=256, heads=4), (256,), 512)
    for name, parameter in bridge.named_parameters():
        if parameter.ndim == 1:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name
        else:
            wanted = 0.02 if name.endswith("queries") else 0.02 * (1024 / 256) ** 0.5
            assert abs(parameter.std().item() / wanted - 1) < 0.05, (name, parameter.std(), wanted)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3), st.integers(1, 20))
def test_windows_hold_each_patch_once(sizes, grid):
    """Of maps of several sizes, padded to one: no patch is dropped, none counted twice, and no padding is seen."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    x = torch.arange(1, len(sizes) * height * width + 1).reshape(-1, height, width, 1)
    if grid > min(min(size) for size in sizes):
        with pytest.raises(ValueError, match="windows per side needs at least"):
            checked_sizes(torch.tensor(sizes), grid, x.device)
        return
    windows, mask = cut_windows(x, grid, checked_sizes(torch.tensor(sizes), grid, x.device))
    for image, (rows, columns) in enumerate(sizes):
        own = x[image, :rows, :columns].flatten()
        assert sorted(windows[image, ..., 0][mask[image]].tolist()) == own.tolist()
        assert windows[image, 0, 0, 0] == own[0]
        seen = mask[image].sum(-1)
        assert seen.min() >= 1 and seen.max() <= -(-rows // grid) * -(-columns // grid)
    alone, mask = cut_windows(x[:1, : sizes[0][0], : sizes[0][1]], grid)
    mask = torch.ones(alone.shape[:3], dtype=torch.bool) if mask is None else mask
    assert sorted(alone[..., 0][mask].tolist()) == x[0, : sizes[0][0], : sizes[0][1]].flatten().tolist()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(4, 9), st.integers(4, 9)), min_size=2, max_size=3))
def test_maps_of_several_sizes_in_one_batch(sizes):
    """Each image's tokens are those that it has alone, whatever stands on the padding."""
    bridge = made("1:2,3:1,4:1")
    alone = [maps(*size, batch=1, seed=number) for number, size in enumerate(sizes)]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    padded = [torch.full((len(sizes), height, width, channels), 1e4) for channels in (24, 40)]
    for image, (rows, columns) in enumerate(sizes):
        for level in range(2):
            padded[level][image, :rows, :columns] = alone[image][level][0]
    together = bridge(padded, torch.tensor(sizes))
    for image, levels in enumerate(alone):
        assert (together[image] - bridge(levels)[0]).abs().max() <= 1e-5  # measured 3e-6


def test_depth_goes_over_the_levels_again():
    torch.manual_seed(0)
    bridge = build_bridge(ChainOfSightConfig("2:2", width=16, heads=2, depth=2), (24, 40), 20)
    low, high = maps(4, 4)
    scale = bridge.scales["2"]
    q = scale.queries[None]
    for block, level in zip(scale.blocks, (low, high, low, high), strict=True):
        q = block(q, F.layer_norm(level, level.shape[-1:]), 2)
    assert torch.equal(bridge([low, high]), bridge.proj(bridge.norm(q.flatten(1, 2))))


def test_fine_to_coarse_is_the_other_order():
    one, other = (
        ChainOfSightConfig("1:3,2:2", width=16, heads=2, order=o) for o in ("coarse_to_fine", "fine_to_coarse")
    )
    coarse, fine = build_bridge(one, (24,), 20), build_bridge(other, (24,), 20)
    fine.load_state_dict(coarse.state_dict())
    levels = maps(4, 4, (24,))
    assert torch.equal(fine(levels), torch.cat([coarse(levels)[:, 3:], coarse(levels)[:, :3]], 1))


def test_shared_queries_tell_no_place():
    """With a row for each token, equal windows give other tokens; with shared queries, they give the same."""
    flat = [torch.randn(1, 1, 1, channels).expand(1, 6, 6, -1) for channels in (24, 40)]
    for shared, rows in ((True, 1), (False, 9)):
        bridge = build_bridge(ChainOfSightConfig("3:2", width=16, heads=2, shared_queries=shared), (24, 40), 20)
        assert bridge.scales["3"].queries.shape == (rows, 2, 16)
        tokens = bridge(flat).unflatten(1, (9, 2))
        assert ((tokens - tokens[:, :1]).abs().max() <= 1e-6) == shared


def test_the_preset_paper():
    assert bridge_settings("paper") == ChainOfSightConfig("1:16,4:4", width=1024, heads=16, mlp_ratio=4, depth=1)


@pytest.mark.parametrize("sizes", [None, [[8, 8], [5, 7]]], ids=str)
def test_attention_maps(sizes):
    bridge, levels = made("1:3,2:2,4:1"), maps(8, 8)
    sizes = None if sizes is None else torch.tensor(sizes)
    found = bridge.attention_maps(levels, sizes)
    assert [str(scale) for scale in found] == ["1:3", "2:2", "4:1"]
    for scale, looks in found.items():
        assert looks.shape == (2, scale.tokens, 8, 8)
        for image, (rows, columns) in enumerate([(8, 8), (8, 8)] if sizes is None else sizes.tolist()):
            for token, look in enumerate(looks[image]):
                row, column = divmod(token // scale.queries, scale.grid)
                inside = torch.zeros(8, 8, dtype=torch.bool)
                inside[
                    row * rows // scale.grid : (row + 1) * rows // scale.grid,
                    column * columns // scale.grid : (column + 1) * columns // scale.grid,
                ] = True
                assert look[inside].min() > 0 and look[~inside].abs().sum() == 0
                assert abs(look.sum() - 1) <= 1e-5


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
def test_a_query_takes_the_values_where_it_looks(size):
    bridge = made("2:2", (24,), heads=1)
    block, x = bridge.scales["2"].blocks[0], F.layer_norm(maps(*size, (24,))[0], (24,))
    torch.nn.init.normal_(block.norm_context.weight), torch.nn.init.normal_(block.norm_context.bias)
    q = bridge.scales["2"].queries[None]
    affine = x * block.norm_context.weight + block.norm_context.bias
    values = F.linear(affine, block.key_value.weight).chunk(2, -1)[1].flatten(1, 2)
    taken = q + block.out(torch.einsum("bwqp,bpd->bwqd", block.look(q, x, 2, None), values))
    error = (block(q, x, 2) - (taken + block.mlp(block.norm_mlp(taken)))).abs().max()
    assert error <= 1e-5, error  # measured 1e-6


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
def test_compiles_as_one_graph(size):
    bridge, levels = made("1:2,4:1"), maps(*size)
    compiled = torch.compile(bridge, fullgraph=True, backend="aot_eager")
    error = (compiled(levels) - bridge(levels)).abs().max()
    assert error <= 1e-5, error  # measured 0
    sizes = torch.tensor([[size[0], size[1]], [5, 6]])
    error = (compiled(levels, sizes) - bridge(levels, sizes)).abs().max()
    assert error <= 1e-5, error


def test_bf16_is_near():
    bridge, levels = made("1:2,4:1"), maps(9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bridge(levels)
    assert found.dtype == torch.bfloat16
    wanted = bridge(levels)
    error = (found - wanted).abs().mean() / wanted.abs().mean()
    assert error <= 0.02, error  # measured 0.006


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        bridge, levels = made("1:2,4:1").train(), maps(9, 8)
        calls = []
        for scale in bridge.scales.values():
            scale.gradient_checkpointing = recompute
            scale._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            scale.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        bridge(levels).square().sum().backward()
        assert len(calls) == 2 * (1 + recompute)
        gradients.append({name: p.grad for name, p in bridge.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


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
    with pytest.raises(ValueError, match="unknown layout 'mpl'"):
        build_bridge("mpl", [32], 32)


def test_gradients_reach_every_parameter():
    bridge = made("1:2,2:1")
    bridge(maps(5, 4)).square().sum().backward()
    assert [name for name, p in bridge.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert bridge.layout == Layout((Scale(1, 2), Scale(2, 1)))
