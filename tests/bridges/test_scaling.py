import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsight.bridges import build_bridge
from sparsight.bridges.scaling import layout_of, resize_queries, scale_bridge
from sparsight.config import ChainOfSight
from sparsight.layouts import Layout, Scale


def made(layout, seed=0, width=16, widths=(24, 24)):
    torch.manual_seed(seed)
    bridge = build_bridge(ChainOfSight(layout, width=width, heads=2), widths, 20)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return bridge


def scaled(bridge, layout, sources=None, width=16, widths=(24, 24)):
    target = made(layout, seed=99, width=width, widths=widths)
    return target, scale_bridge(bridge, target, sources)


def text(born):
    return {str(child): str(parent) for child, parent in born.items()}


@pytest.mark.parametrize(
    "layout, born",
    [
        ("cos-336", {"1:16": "1:16", "2:16": "1:16", "8:4": "4:4"}),
        ("cos-1296", {"1:16": "1:16", "4:16": "1:16", "16:4": "4:4"}),
    ],
)
def test_scaling_from_80_tokens(layout, born):
    old = made("cos-80")
    new, lineage = scaled(old, layout)
    assert text(lineage) == born
    check_inheritance(old, new, lineage)


def test_scaling_from_80_to_336_to_1296():
    old = made("cos-80")
    middle, _ = scaled(old, "cos-336")
    new, lineage = scaled(middle, "cos-1296")
    assert text(lineage) == {"1:16": "1:16", "4:16": "2:16", "16:4": "8:4"}
    check_inheritance(middle, new, lineage)
    direct, _ = scaled(old, "cos-1296")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name  # by steps or at once


def check_inheritance(old, new, lineage):
    """Queries of a child window are its parent's; all other tensors are copied bit by bit."""
    before, after = old.state_dict(), new.state_dict()
    for scale, parent in lineage.items():
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
    new, lineage = scaled(old, layout)
    for child, parent in lineage.items():
        tiles = [torch.randn(1, parent.grid, parent.grid, 24) for _ in range(2)]
        small = [tile.repeat_interleave(4, 1).repeat_interleave(4, 2) for tile in tiles]
        side = 4 * child.grid // parent.grid * parent.grid  # the same picture, at a higher resolution
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
    resized = resize_queries(queries, new).flatten().tolist()
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
    chosen, born = scaled(old, "4:4", {4: 1})
    assert text(born) == {"4:4": "1:4"}
    assert torch.equal(nearest.scales["4"].queries[0], old.scales["2"].queries[0])
    assert torch.equal(chosen.scales["4"].queries[15], old.scales["1"].queries[0])


@pytest.mark.parametrize("change", [{"width": 32}, {"widths": (24,)}, {"widths": (24, 24, 24)}, {"widths": (24, 30)}])
def test_bridges_of_other_sizes_are_refused(change):
    old = made("1:4", widths=(24, 24))
    target = made("2:4", **({"widths": (24, 24)} | change))
    if change == {"widths": (24,)}:
        target, old = old, target
    with pytest.raises(ValueError, match="of the new bridge is .*of the old one is"):
        scale_bridge(old, target)


def test_layout_of():
    assert layout_of(made("1:4,2:1")) == Layout.parse("1:4,2:1")
    assert layout_of(build_bridge("linear", [4], 4)) is None
