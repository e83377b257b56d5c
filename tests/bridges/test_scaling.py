import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsight.bridges import build_bridge
from sparsight.bridges.scaling import resize_queries, scale_bridge
from sparsight.layouts import Layout, Scale
from sparsight.settings.bridges import ChainOfSightConfig


def made(layout, seed=0, width=16, widths=(24, 24)):
    torch.manual_seed(seed)
    bridge = build_bridge(ChainOfSightConfig(layout, width=width, heads=2), widths, 20)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return bridge


def scaled(bridge, layout, sources=None, width=16, widths=(24, 24)):
    target = made(layout, seed=99, width=width, widths=widths)
    return target, scale_bridge(bridge, target, sources)


def text(parts):
    assert parts[-1].part == "norm, linear"
    return {row.part: row.source for row in parts[:-1]}


@pytest.mark.parametrize(
    "layout, parents",
    [
        ("cos-336", {"1:16": "1:16", "2:16": "1:16", "8:4": "4:4"}),
        ("cos-1296", {"1:16": "1:16", "4:16": "1:16", "16:4": "4:4"}),
    ],
)
def test_scaling_from_80_tokens(layout, parents):
    old = made("cos-80")
    new, parts = scaled(old, layout)
    assert text(parts) == parents
    check_inheritance(old, new, parts)


def test_scaling_from_80_to_336_to_1296():
    old = made("cos-80")
    middle, _ = scaled(old, "cos-336")
    new, parts = scaled(middle, "cos-1296")
    assert text(parts) == {"1:16": "1:16", "4:16": "2:16", "16:4": "8:4"}
    check_inheritance(middle, new, parts)
    direct, _ = scaled(old, "cos-1296")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name  # by steps or at once


def check_inheritance(old, new, parts):
    """Queries of a child window are its parent's; all other tensors are copied bit by bit."""
    before, after = old.state_dict(), new.state_dict()
    for scale, parent in ((Layout.parse(row.part).scales[0], Layout.parse(row.source).scales[0]) for row in parts[:-1]):
        ours, theirs = after[f"scales.{scale.grid}.queries"], before[f"scales.{parent.grid}.queries"]
        for window in range(scale.grid**2):
            row, column = (place * parent.grid // scale.grid for place in divmod(window, scale.grid))
            assert torch.equal(ours[window], theirs[row * parent.grid + column])
        inner = f"scales.{scale.grid}."
        rest = [name.removeprefix(inner) for name in after if name.startswith(inner) and "queries" not in name]
        assert len(rest) == 2 * 14
        for name in rest:
            assert torch.equal(after[inner + name], before[f"scales.{parent.grid}.{name}"]), name
    for name in ("norm.weight", "norm.bias", "proj.weight", "proj.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("layout", ["cos-336", "cos-1296"])
def test_a_child_token_starts_as_its_parents(layout):
    """On a map that is constant inside each old window, in the old windows' number, nothing has been lost."""
    old = made("cos-80")
    new, parts = scaled(old, layout)
    for child, parent in old.layout.source_scales(new.layout).items():
        tiles = [torch.randn(1, parent.grid, parent.grid, 24) for _ in range(2)]
        small = [tile.repeat_interleave(4, 1).repeat_interleave(4, 2) for tile in tiles]
        side = 4 * child.grid // parent.grid * parent.grid  # the same image, at a higher resolution
        large = [
            tile.repeat_interleave(side // parent.grid, 1).repeat_interleave(side // parent.grid, 2) for tile in tiles
        ]
        theirs = old.scales[str(parent.grid)](small).unflatten(1, (parent.grid, parent.grid, parent.queries))
        ours = new.scales[str(child.grid)](large).unflatten(1, (child.grid, child.grid, child.queries))
        times = child.grid // parent.grid
        wanted = theirs.repeat_interleave(times, 1).repeat_interleave(times, 2)
        error = (ours - wanted).abs().max()
        assert error <= 1e-6 * wanted.abs().max()  # measured 0


def test_the_same_layout_is_the_identity():
    old = made("1:3,2:2,4:1")
    new, _ = scaled(old, "1:3,2:2,4:1")
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    levels = [torch.randn(2, 9, 8, 24) for _ in range(2)]
    assert torch.equal(old(levels), new(levels))


LAYOUTS = st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(sorted)


@settings(max_examples=25)
@given(LAYOUTS, st.integers(2, 4))
def test_up_and_down_again_is_the_identity(grids, times):
    small = Layout(tuple(Scale(grid, number + 1) for number, grid in enumerate(grids)))
    large = [Scale(scale.grid * times, scale.queries) for scale in small.scales]
    old = made(small)
    up, _ = scaled(old, Layout(tuple(large)))
    down, _ = scaled(up, small)
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, down.state_dict()[name]), name


@given(st.integers(1, 9), st.integers(1, 9))
def test_queries_come_from_the_window_that_holds_the_centre(old, new):
    queries = torch.arange(old**2).reshape(-1, 1, 1)
    resized = resize_queries(queries, new**2).flatten().tolist()
    for window, parent in enumerate(resized):
        for place, source in zip(divmod(window, new), divmod(parent, old), strict=True):
            centre = (place + 0.5) / new
            assert source / old <= centre < (source + 1) / old
    assert new < old or set(resized) == set(range(old**2))  # growing, no query is lost


@given(LAYOUTS, LAYOUTS)
def test_what_cannot_be_reached_is_an_error(one, other):
    old, new = (Layout(tuple(Scale(grid, grid) for grid in grids)) for grids in (one, other))
    missing = [scale for scale in new.scales if scale not in old.scales]
    assume(missing)
    with pytest.raises(ValueError, match=f"scale {missing[0]} of '{new}' has no source in '{old}'"):
        scaled(made(old), new)


def test_a_source_can_be_chosen():
    old = made("1:4,2:4")
    nearest, _ = scaled(old, "4:4")
    chosen, parts = scaled(old, "4:4", {4: 1})
    assert text(parts) == {"4:4": "1:4"}
    assert torch.equal(nearest.scales["4"].queries[0], old.scales["2"].queries[0])
    assert torch.equal(chosen.scales["4"].queries[15], old.scales["1"].queries[0])


def test_a_bridge_for_another_encoder_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        scaled(made("1:4"), "2:4", widths=(24, 30))


@pytest.mark.parametrize(
    "key, value", [("width", 32), ("heads", 4), ("depth", 2), ("shared_queries", True), ("order", "fine_to_coarse")]
)
def test_what_would_mean_something_else_is_refused(key, value):
    target = build_bridge(ChainOfSightConfig("2:4", **({"width": 16, "heads": 2} | {key: value})), (24, 24), 20)
    with pytest.raises(ValueError, match=rf"differ \(old, new\): {{'{key}': \[.*, '?{value}'?\]}}"):
        scale_bridge(made("1:4"), target)


def test_what_was_copied_repeated_and_new():
    old = made("1:16,4:4")
    new, rows = scaled(old, "1:16,2:16,8:4")
    block = sum(p.numel() for p in old.scales["1"].blocks.parameters())
    found = [(row.part, row.source, row.tokens, row.copied, row.repeated, row.new) for row in rows]
    assert found == [
        ("1:16", "1:16", 16, block + 16 * 16, 0, 0),
        ("2:16", "1:16", 64, block + 16 * 16, 48 * 16, 0),
        ("8:4", "4:4", 256, block + 64 * 16, 192 * 16, 0),
        ("norm, linear", "the same", 0, 2 * 16 + 16 * 20 + 20, 0, 0),
    ]
    assert sum(row.copied + row.repeated + row.new for row in rows) == sum(p.numel() for p in new.parameters())


def test_with_shared_queries_all_is_copied():
    def shared(layout):
        return build_bridge(ChainOfSightConfig(layout, width=16, heads=2, shared_queries=True), (24,), 20)

    old, new = shared("1:4,2:2"), shared("1:4,4:2")
    rows = scale_bridge(old, new)
    assert torch.equal(old.scales["2"].queries, new.scales["4"].queries) and sum(row.repeated for row in rows) == 0


def levels_changed(before, after, depth=1):
    """A bridge that saw the levels `before`, and what it became for the levels `after`."""
    torch.manual_seed(0)
    settings = ChainOfSightConfig("1:4,2:2", width=16, heads=2, depth=depth)
    old = build_bridge(settings, [20 + level for level in before], 20)
    new = build_bridge(settings, [20 + level for level in after], 20)
    return old, new, scale_bridge(old, new, levels=(before, after))


@pytest.mark.parametrize("before, after", [([3, 5], [5]), ([1, 3, 5], [1, 5]), ([1, 3, 5], [3])], ids=str)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_block_of_a_level_that_goes_is_left_out(before, after, depth):
    old, new, rows = levels_changed(before, after, depth)
    for scale in ("1", "2"):
        for turn in range(depth):
            for place, level in enumerate(after):
                kept = old.scales[scale].blocks[turn * len(before) + before.index(level)].state_dict()
                found = new.scales[scale].blocks[turn * len(after) + place].state_dict()
                assert all(torch.equal(tensor, found[name]) for name, tensor in kept.items())
    assert all(row.new == 0 for row in rows)


@pytest.mark.parametrize("before, after", [([5], [3, 5]), ([3], [3, 5]), ([3, 7], [1, 3, 5, 7])], ids=str)
def test_the_block_of_a_level_that_comes_adds_nothing_at_first(before, after):
    old, new, rows = levels_changed(before, after)
    maps = {level: torch.randn(2, 4, 4, 20 + level) for level in after}
    assert torch.equal(old([maps[level] for level in before]), new([maps[level] for level in after]))
    added = sum(
        p.numel() for level in set(after) - set(before) for p in new.scales["1"].blocks[after.index(level)].parameters()
    )
    assert [row.new for row in rows] == [added, added, 0]
    new([maps[level] for level in after]).square().sum().backward()
    for block in (new.scales["1"].blocks[after.index(level)] for level in set(after) - set(before)):
        assert block.out.weight.grad.abs().sum() > 0 and block.mlp[2].weight.grad.abs().sum() > 0  # it can learn


def test_levels_that_share_nothing_are_refused():
    with pytest.raises(ValueError, match=r"new feature levels \[5\] share none with the old ones \[3\]"):
        levels_changed([3], [5])
