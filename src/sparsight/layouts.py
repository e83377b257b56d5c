"""Layouts of visual tokens: the one dial of Sparsight. No torch.

A layout is a list of scales, coarse to fine, written ``grid:queries,...`` (windows per side, queries per
window). ``1:16,4:4`` is Chain-of-Sight's 80 tokens. It does not depend on the image size.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from sparsight.errors import UserError

# Chain-of-Sight (arXiv 2407.15819), every layout of the paper, in our notation.
PRESETS: dict[str, str] = {
    "cos-32": "1:16,4:1",
    "cos-48": "1:16,4:2",
    "cos-80": "1:16,4:4",
    "cos-144": "1:16,2:16,4:4",
    "cos-272": "1:16,8:4",
    "cos-336": "1:16,2:16,8:4",
    "cos-336-from-32": "1:16,2:16,16:1",
    "cos-528-from-80": "1:16,4:16,8:4",
    "cos-528-from-32": "1:16,4:16,16:1",
    "cos-784": "1:16,4:16,16:2",
    "cos-1104": "1:16,2:16,16:4",
    "cos-1296": "1:16,4:16,16:4",
}

_SCALE = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


@dataclass(frozen=True, order=True)
class Scale:
    """One scale: ``grid`` windows per side, ``queries`` learnable queries in each window."""

    grid: int
    queries: int

    def __post_init__(self) -> None:
        if self.grid < 1 or self.queries < 1:
            raise UserError(f"scale {self.grid}:{self.queries}: windows per side and queries must be 1 or more")

    @property
    def tokens(self) -> int:
        return self.grid**2 * self.queries

    def __str__(self) -> str:
        return f"{self.grid}:{self.queries}"


@dataclass(frozen=True)
class Layout:
    """Scales from coarse to fine (Chain-of-Sight, section 3.1)."""

    scales: tuple[Scale, ...]

    def __post_init__(self) -> None:
        if not self.scales:
            raise UserError("a layout needs at least one scale, such as '1:16'")
        grids = [scale.grid for scale in self.scales]
        if any(finer <= coarser for coarser, finer in pairwise(grids)):
            raise UserError(
                f"layout '{self}': scales go from coarse to fine, each grid once; found windows per side {grids}"
            )

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Read ``"1:16,4:4"`` or a preset's name such as ``"cos-80"``.

        Raises:
            UserError: the text is neither; the message shows the faulty part and what was meant, if it is near.
        """
        if isinstance(text, Layout):
            return text
        name = text.strip().lower()
        if name in PRESETS:
            return cls.parse(PRESETS[name])
        if name and not name[0].isdigit():
            raise UserError(_unknown_preset(text, name))
        scales = []
        for part in text.split(","):
            match = _SCALE.fullmatch(part)
            if match is None:
                raise UserError(
                    f"layout '{text}': '{part.strip()}' is not a scale; expected grid:queries, such as '4:16'"
                )
            scales.append(Scale(int(match[1]), int(match[2])))
        return cls(tuple(scales))

    @property
    def tokens(self) -> int:
        """Visual tokens for an image: the sum of grid^2 x queries."""
        return sum(scale.tokens for scale in self.scales)

    def __str__(self) -> str:
        return ",".join(map(str, self.scales))

    def source_scales(self, target: Layout, sources: Mapping[int, int] | None = None) -> dict[Scale, Scale]:
        """Which of this layout's scales each scale of ``target`` is born from (Chain-of-Sight, section 3.3).

        The source has the same queries per window. Where several have, the same grid comes first, then the
        nearest coarser one, then (scaling down) the nearest finer one.

        Args:
            target: the layout to reach.
            sources: overrides, grid of the new scale -> grid of the old one.

        Raises:
            UserError: a scale has no source, or an override names a scale that does not exist or does not fit.
        """
        overrides = dict(sources or {})
        by_grid = {scale.grid: scale for scale in self.scales}
        unknown = [grid for grid in overrides if grid not in {scale.grid for scale in target.scales}]
        if unknown:
            raise UserError(f"sources name grids {unknown}, but layout '{target}' has no such scale")
        born: dict[Scale, Scale] = {}
        for scale in target.scales:
            wanted = overrides.get(scale.grid)
            if wanted is not None and wanted not in by_grid:
                raise UserError(f"source grid {wanted} of scale {scale} is not in layout '{self}'")
            fits = [old for old in self.scales if old.queries == scale.queries and wanted in (None, old.grid)]
            if not fits:
                have = str(by_grid[wanted]) if wanted is not None else f"'{self}'"
                raise UserError(
                    f"scale {scale} of '{target}' has no source in {have}: "
                    f"it needs one with {scale.queries} queries per window{self._within_reach(target)}"
                )
            coarser = [old for old in fits if old.grid <= scale.grid]
            born[scale] = max(coarser) if coarser else min(fits)
        return born

    def _within_reach(self, target: Layout) -> str:
        """For an error: presets that this layout can be scaled up to, those of as many tokens as ``target`` first."""
        queries, found = {scale.queries for scale in self.scales}, []
        for name, layout in ((name, Layout.parse(text)) for name, text in PRESETS.items()):
            if layout.tokens > self.tokens and queries >= {scale.queries for scale in layout.scales}:
                found.append((layout.tokens != target.tokens, name))
        return f". From '{self}' there are {', '.join(name for _, name in sorted(found))}" if found else ""

    def positions(self, target: Layout) -> list[int]:
        """Where each of this layout's tokens stands among those of ``target``, which it will be scaled to (ours).

        A scale that stays keeps its own places; one that goes has those of the nearest scale that is born from it, in
        the window that holds the middle of its own.

        Raises:
            UserError: ``target`` cannot be reached, or nothing in it is born from one of the scales.
        """
        born, first, found = self.source_scales(target), 0, {}
        for scale in target.scales:
            if scale in self.scales or born[scale] not in found:
                found[born[scale]] = scale, first
            first += scale.tokens
        places = []
        for scale in self.scales:
            if scale not in found:
                raise UserError(f"nothing in layout '{target}' is born from scale {scale} of '{self}'")
            child, first = found[scale]
            middle = [(2 * window + 1) * child.grid // (2 * scale.grid) for window in range(scale.grid)]
            windows = [row * child.grid + column for row in middle for column in middle]
            places += [first + window * scale.queries + query for window in windows for query in range(scale.queries)]
        return places

    def children(self, target: Layout) -> list[float]:
        """How many of the tokens of ``target`` are born from each of this layout's (see `source_scales`; ours)."""
        counts = dict.fromkeys(self.scales, 0.0)
        for child, scale in self.source_scales(target).items():
            counts[scale] += child.grid**2 / scale.grid**2
        return [counts[scale] for scale in self.scales for _ in range(scale.tokens)]


def _unknown_preset(text: str, name: str) -> str:
    family = [preset for preset in PRESETS if preset.startswith(name + "-from-")]
    if family:
        return f"layout '{text}' is ambiguous; the paper has {len(family)}: {', '.join(family)}"
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown layout '{text}'{hint} Expected scales such as '1:16,4:4', or one of {', '.join(PRESETS)}"


def window_bounds(side: int, grid: int) -> list[tuple[int, int]]:
    """Cut ``side`` patches into ``grid`` windows, as equal as can be, none dropped and none counted twice.

    Raises:
        UserError: there are more windows than patches, so some window would see nothing.
    """
    if grid > side:
        raise UserError(
            f"a grid of {grid} windows per side needs at least {grid} patches per side, but the feature map has "
            f"{side}: use a larger image or a coarser layout"
        )
    cuts = [index * side // grid for index in range(grid + 1)]
    return list(pairwise(cuts))


def absorbs(queries: int, patches: int, head_width: int) -> bool:
    """Whether a window's attention is cheaper with its queries brought to the patches, in place of keys and values made
    of every patch. The result is the same; what counts is the work: queries * (patches + head_width) multiplications
    against patches * head_width (ours)."""
    return queries * (patches + head_width) < patches * head_width
