import re

import numpy as np
import pytest
from PIL import Image

from sparsight.layouts import Scale
from sparsight.reporting import write_inspection
from sparsight.reporting.inspection import _GAP, _LINE, _SIDE, draw_scale


def spikes(scale, side, places):
    """Queries that each look at one patch of their window: `places`, query -> (row, column) inside the window."""
    maps = np.full((scale.tokens, side, side), 0.0, dtype=np.float32)
    size = side // scale.grid
    for token in range(scale.tokens):
        window, query = divmod(token, scale.queries)
        row, column = divmod(window, scale.grid)
        maps[token, row * size : (row + 1) * size, column * size : (column + 1) * size] = 1e-6
        maps[token, row * size + places[query][0], column * size + places[query][1]] = 1.0
    return maps


def tile(sheet, number, shape=(2 * _SIDE, 2 * _SIDE)):
    columns = sheet.width // (shape[0] + 2 * _GAP)
    row, column = divmod(number, columns)
    x, y = column * (shape[0] + 2 * _GAP) + _GAP, row * (shape[1] + 2 * _GAP + 2 * _LINE) + _GAP + 2 * _LINE
    return np.asarray(sheet.crop((x, y, x + shape[0], y + shape[1])), dtype=int)


def test_a_query_is_bright_where_it_looks_in_every_window():
    scale = Scale(2, 2)
    sheet, peak = draw_scale(Image.new("RGB", (50, 50), "black"), scale, spikes(scale, 8, [(0, 0), (3, 2)]))
    assert abs(peak - 16) < 1e-3  # all on one of 16 patches
    for query, (row, column) in enumerate([(0, 0), (3, 2)]):
        drawn = tile(sheet, query + 1).sum(-1)
        patch = drawn.reshape(8, 52, 8, 52)[:, 20:32, :, 20:32].mean((1, 3))  # middles: no lines
        bright = patch > 300
        wanted = np.zeros((4, 4), dtype=bool)
        wanted[row, column] = True
        assert (bright == np.tile(wanted, (2, 2))).all()


def test_windows_are_drawn_where_they_are_cut():
    """7 patches in 2 windows: 3 and 4."""
    maps = np.full((4, 7, 7), 1 / 12, dtype=np.float32)
    for window, (rows, columns) in enumerate([((0, 3), (0, 3)), ((0, 3), (3, 7)), ((3, 7), (0, 3)), ((3, 7), (3, 7))]):
        inside = np.zeros((7, 7), dtype=bool)
        inside[slice(*rows), slice(*columns)] = True
        maps[window] = inside / inside.sum()
    sheet, peak = draw_scale(Image.new("RGB", (9, 9), "black"), Scale(2, 1), maps)
    assert abs(peak - 1) < 1e-5  # evenly, in windows of any size
    white = tile(sheet, 0).sum(-1) == 3 * 255
    assert abs(np.flatnonzero(white.all(0)).mean() - 416 * 3 / 7) <= 1.5
    assert abs(np.flatnonzero(white.all(1)).mean() - 416 * 3 / 7) <= 1.5


def test_a_page_with_a_image_for_each_scale(tmp_path):
    looks = {scale: spikes(scale, 8, [(0, 0)] * scale.queries) for scale in (Scale(1, 40), Scale(2, 1))}
    page = write_inspection(Image.new("RGB", (9, 9)), looks, "<b>model</b>: a & b", tmp_path / "new" / "folder")
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "scale-1x40.png", "scale-2x1.png"}
    text = page.read_text()
    assert "&lt;b&gt;model&lt;/b&gt;: a &amp; b" in text and "<b>model" not in text
    assert "44 visual tokens from 2 scales" in text and "The first 36 of 40 queries are drawn" in text
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # it loads nothing


@pytest.mark.parametrize("size", [(4, 8), (8, 4)], ids=str)
def test_a_map_that_is_not_square_keeps_its_shape(size):
    maps = np.full((1, *size), 1 / 32, dtype=np.float32)
    sheet, _ = draw_scale(Image.new("RGB", (9, 9)), Scale(1, 1), maps)
    high, wide = (2 * round(_SIDE * side / 8) for side in size)
    assert sheet.size == (2 * (wide + 2 * _GAP), high + 2 * _GAP + 2 * _LINE)
