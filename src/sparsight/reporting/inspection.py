"""Where the queries of a bridge look: an image for each scale, and one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsight.layouts import Scale, window_bounds
from sparsight.reporting.page import section, sheet, write_page

_SIDE, _GAP, _LINE = 208, 10, 22
_COLUMNS = 6
_MOST = 36  # queries drawn of a scale: a single-scale resampler has hundreds
# Dark to light, so that it also reads in grey.
RAMP = ((12, 8, 38), (88, 22, 110), (186, 54, 85), (249, 142, 9), (252, 255, 164))


def write_inspection(image: Image.Image, looks: Mapping[Scale, np.ndarray], title: str, out: str | Path) -> Path:
    """Write ``scale-GRIDxQUERIES.png`` for each scale and ``index.html`` into ``out``.

    Args:
        looks: attention of each scale's queries, (grid^2 * queries, H, W), each summing to 1 over its window.

    Returns:
        The page.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sections, tokens = [], sum(scale.tokens for scale in looks)
    for scale, maps_NHW in looks.items():
        drawn, peak = draw_scale(image, scale, maps_NHW)
        file = out / f"scale-{scale.grid}x{scale.queries}.png"
        drawn.save(file, optimize=True)
        hint = (
            f"{scale.grid} x {scale.grid} windows on a map of {' x '.join(map(str, maps_NHW.shape[1:]))} patches, "
            f"{scale.queries} queries in each: {scale.tokens} tokens. The brightest patch gets {peak:.1f} times its "
            "even share."
        )
        if scale.queries > _MOST:
            hint += f" The first {_MOST} of {scale.queries} queries are drawn."
        image_of = sheet(file.read_bytes(), drawn.width // 2, f"windows and attention of scale {scale}")
        sections.append(section(str(scale), hint, image_of))
    lead = (
        f"{title}. {tokens} visual tokens from {len(looks)} scales. A query sees only its own window, so one tile "
        "shows that query of every window; the attention is that of the last feature level, the mean over its heads. "
        "Dark is not at all, light is the scale's strongest look."
    )
    write_page(out / "index.html", "inspection", ("Where the queries look", ""), lead, sections)
    return out / "index.html"


def draw_scale(image: Image.Image, scale: Scale, maps_NHW: np.ndarray) -> tuple[Image.Image, float]:
    """The windows over the image, then a tile for each query: as windows do not overlap, one tile shows all of them.

    Returns:
        The sheet, and how much more than evenly the brightest patch is looked at.
    """
    height, width = maps_NHW.shape[1:]
    assert len(maps_NHW) == scale.tokens
    # Times the patches of its window: 1 is looking evenly, whatever the window's size.
    patches_N11 = (maps_NHW > 0).sum((1, 2), keepdims=True)
    looks_QHW = (maps_NHW * patches_N11).reshape(scale.grid**2, scale.queries, height, width).sum(0)
    peak = float(looks_QHW.max())
    shape = round(_SIDE * width / max(height, width)), round(_SIDE * height / max(height, width))
    base = image.convert("RGB").resize((2 * shape[0], 2 * shape[1]), Image.Resampling.LANCZOS)
    grey = np.asarray(base.convert("L").convert("RGB"), dtype=np.float32)
    tiles = [("windows", _lines(base.copy(), scale.grid, (height, width)))]
    for query, look_HW in enumerate(looks_QHW[:_MOST]):
        heat = Image.fromarray((look_HW / peak).astype(np.float32)).resize(base.size, Image.Resampling.NEAREST)
        share = np.clip(np.asarray(heat), 0, 1)
        colour = np.stack(
            [np.interp(share, np.linspace(0, 1, len(RAMP)), channel) for channel in zip(*RAMP, strict=True)], -1
        )
        mixed = Image.fromarray((0.35 * grey + 0.65 * colour).astype(np.uint8))
        tiles.append((f"query {query + 1}", _lines(mixed, scale.grid, (height, width))))
    return _sheet(tiles, base.size), peak


def _lines(tile: Image.Image, grid: int, size: tuple[int, int]) -> Image.Image:
    draw = ImageDraw.Draw(tile)
    for axis, patches in enumerate(size):
        for start, _ in window_bounds(patches, grid)[1:]:
            at = round(start / patches * (tile.height, tile.width)[axis])
            line = (0, at, tile.width, at) if axis == 0 else (at, 0, at, tile.height)
            draw.line(line, fill="white", width=2 if grid <= 8 else 1)
    return tile


def _sheet(tiles: list[tuple[str, Image.Image]], size: tuple[int, int]) -> Image.Image:
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    step = size[0] + 2 * _GAP, size[1] + 2 * _GAP + 2 * _LINE
    sheet = Image.new("RGB", (columns * step[0], rows * step[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(28)
    for number, (label, tile) in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = column * step[0] + _GAP, row * step[1] + _GAP
        draw.text((x, y), label, fill="#4b5563", font=font)
        sheet.paste(tile, (x, y + 2 * _LINE))
    return sheet
