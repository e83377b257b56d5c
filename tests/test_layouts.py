import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsight.layouts import PRESETS, Layout, Scale, absorbs, window_bounds

# Every row of the paper's table (Chain-of-Sight, Tables 1 to 5; methods.md 1.2).
PAPER = {
    "1:16,4:1": 32,
    "1:16,4:2": 48,
    "1:16,4:4": 80,
    "1:16,2:16,4:4": 144,
    "1:16,8:4": 272,
    "1:16,2:16,8:4": 336,
    "1:16,2:16,16:1": 336,
    "1:16,4:16,8:4": 528,
    "1:16,4:16,16:1": 528,
    "1:16,4:16,16:2": 784,
    "1:16,2:16,16:4": 1104,
    "1:16,4:16,16:4": 1296,
}
GRIDS = st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True).map(sorted)
LAYOUTS = GRIDS.flatmap(
    lambda grids: st.tuples(*(st.builds(Scale, st.just(grid), st.integers(1, 32)) for grid in grids)).map(Layout)
)


@pytest.mark.parametrize("text", PAPER)
def test_token_counts_of_the_paper(text):
    layout = Layout.parse(text)
    assert layout.tokens == sum(scale.tokens for scale in layout.scales) == PAPER[text]


def test_presets_are_the_papers_layouts():
    assert sorted(PRESETS.values()) == sorted(PAPER)
    for name, text in PRESETS.items():
        assert Layout.parse(name) == Layout.parse(f"  {name.upper()} ") == Layout.parse(text)
        assert name.split("-")[1] == str(PAPER[text])


def test_an_ambiguous_preset_names_both():
    with pytest.raises(ValueError, match="ambiguous; the paper has 2: cos-528-from-80, cos-528-from-32"):
        Layout.parse("cos-528")


def test_a_misspelt_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown layout 'cos-1295'; did you mean 'cos-1296'\?"):
        Layout.parse("cos-1295")
    with pytest.raises(ValueError, match=r"unknown layout 'everything'. Expected scales such as '1:16,4:4', or one of"):
        Layout.parse("everything")


@pytest.mark.parametrize("text, fault", [("1:16,4x4", "4x4"), ("1:16,,4:4", ""), ("1:-2", "1:-2"), ("16", "16")])
def test_a_parse_error_shows_the_faulty_scale(text, fault):
    with pytest.raises(ValueError, match=re.escape(f"layout '{text}': '{fault}' is not a scale; expected grid:queri")):
        Layout.parse(text)


@pytest.mark.parametrize("text", ["", " ", "1:4,"])
def test_an_empty_layout_is_an_error(text):
    with pytest.raises(ValueError, match="'' is not a scale"):
        Layout.parse(text)
    with pytest.raises(ValueError, match="at least one scale"):
        Layout(())


@pytest.mark.parametrize("text", ["0:4", "4:0"])
def test_a_scale_needs_windows_and_queries(text):
    with pytest.raises(ValueError, match=f"scale {text}: windows per side and queries must be 1 or more"):
        Layout.parse(text)


@pytest.mark.parametrize("text", ["4:4,1:16", "1:16,4:4,4:1", "1:2,1:2"])
def test_scales_go_from_coarse_to_fine(text):
    with pytest.raises(ValueError, match=f"layout '{text}': expected windows per side that grow from scale to scale"):
        Layout.parse(text)


@given(LAYOUTS)
def test_text_round_trip(layout):
    assert Layout.parse(str(layout)) == layout
    assert hash(Layout.parse(str(layout))) == hash(layout)
    assert Layout.parse(str(layout).replace(",", " , ").replace(":", " : ")) == layout
    assert Layout.parse(layout) is layout


@given(LAYOUTS, LAYOUTS)
def test_equal_layouts_have_equal_text(one, other):
    assert (one == other) == (str(one) == str(other))


def source_scales(old, new, sources=None):
    born = Layout.parse(old).source_scales(Layout.parse(new), sources)
    return {str(child): str(parent) for child, parent in born.items()}


def test_lineage_of_the_paper():
    assert source_scales("cos-80", "cos-336") == {"1:16": "1:16", "2:16": "1:16", "8:4": "4:4"}
    assert source_scales("cos-80", "cos-1296") == {"1:16": "1:16", "4:16": "1:16", "16:4": "4:4"}
    assert source_scales("cos-336", "cos-1296") == {"1:16": "1:16", "4:16": "2:16", "16:4": "8:4"}
    assert source_scales("cos-32", "cos-528-from-32") == {"1:16": "1:16", "4:16": "1:16", "16:1": "4:1"}


@given(LAYOUTS)
def test_a_layout_descends_from_itself(layout):
    assert layout.source_scales(layout) == {scale: scale for scale in layout.scales}


def test_scaling_down_takes_the_nearest_finer():
    assert source_scales("2:4,8:4,16:4", "1:4") == {"1:4": "2:4"}


def test_an_override_replaces_the_nearest_source():
    assert source_scales("1:4,2:4", "1:4,8:4")["8:4"] == "2:4"
    assert source_scales("1:4,2:4", "1:4,8:4", {8: 1})["8:4"] == "1:4"


def test_a_scale_without_source_is_named():
    with pytest.raises(ValueError, match="scale 8:2 of '1:16,8:2' has no source in '1:16,4:4': expected one with 2 q"):
        source_scales("cos-80", "1:16,8:2")


def test_overrides_that_cannot_be():
    with pytest.raises(ValueError, match=r"sources name grids \[16\], but layout '1:16,8:4' has no such scale"):
        source_scales("cos-80", "cos-272", {16: 4})
    with pytest.raises(ValueError, match="source grid 2 of scale 8:4 is not in layout '1:16,4:4'"):
        source_scales("cos-80", "cos-272", {8: 2})
    with pytest.raises(ValueError, match="scale 8:4 of '1:16,8:4' has no source in '1:16'"):
        source_scales("cos-80", "cos-272", {8: 1})


@given(st.integers(1, 200).flatmap(lambda side: st.tuples(st.just(side), st.integers(1, side))))
def test_windows_cover_each_patch_once_and_evenly(case):
    side, grid = case
    bounds = window_bounds(side, grid)
    assert [patch for low, high in bounds for patch in range(low, high)] == list(range(side))
    sizes = [high - low for low, high in bounds]
    assert len(sizes) == grid and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_more_windows_than_patches_is_an_error():
    with pytest.raises(ValueError, match="a grid of 16 windows per side needs at least 16 patches .* map has 8"):
        window_bounds(8, 16)


@given(st.integers(1, 64), st.integers(1, 1024), st.sampled_from([16, 64, 128]))
def test_queries_go_to_the_patches_where_that_is_less_work(queries, patches, head):
    """Multiplications of a window at width = context = 1024, by hand: both ways, keys and values alike."""
    width, heads = 1024, 1024 // head
    made = 2 * patches * width * width  # keys and values of every patch
    brought = 2 * queries * width * width + 2 * heads * queries * patches * width
    assert absorbs(queries, patches, head) == (brought < made)


def test_positions_are_those_of_the_tokens_to_come():
    """32 to 336: the global ones stay, each 4 x 4 window has the place of the one of 16 x 16 in its middle."""
    few, many = Layout.parse("1:16,4:1"), Layout.parse("1:16,2:16,16:1")
    positions = few.positions(many)
    assert positions[:16] == list(range(16))
    assert positions[16:20] == [16 + 64 + 2 * 16 + column for column in (2, 6, 10, 14)]
    assert many.positions(many) == list(range(336))


@given(st.sampled_from(["1:16,4:1", "1:16,4:4", "1:16,2:4", "1:16"]), st.data())
def test_positions_differ_and_keep_their_order(text: str, data) -> None:
    layout = Layout.parse(text)
    finer = [Scale(data.draw(st.integers(1, 5)) * scale.grid, scale.queries) for scale in layout.scales]
    if any(b.grid <= a.grid for a, b in pairwise(finer)):
        return
    target = Layout(tuple(finer))
    if set(layout.source_scales(target).values()) < set(layout.scales):
        with pytest.raises(ValueError, match="nothing in layout"):
            layout.positions(target)
        return
    positions = layout.positions(target)
    assert positions == sorted(set(positions)) and positions[0] >= 0 and positions[-1] < target.tokens
    offspring = layout.children(target)
    assert len(offspring) == layout.tokens and sum(offspring) == pytest.approx(target.tokens)
