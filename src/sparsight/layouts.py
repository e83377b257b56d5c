"""Layouts of visual tokens: the one dial of Sparsight. No torch.

A layout is a list of scales, coarse to fine, written ``grid:queries,...`` (windows per side, queries per window).
``1:16,4:4`` is Chain-of-Sight's 80 tokens. It does not depend on the image size.
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
        grids = [scale.grid for scale in self.scales]
        if not grids:
            raise UserError("a layout needs at least one scale, such as '1:16'")
        if any(finer <= coarser for coarser, finer in pairwise(grids)):
            raise UserError(
                f"layout '{self}': expected windows per side that grow from scale to scale; found {grids}. Put coarse "
                "scales first, each once"
            )

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Read ``"1:16,4:4"`` or a preset's name such as ``"cos-80"``; a layout comes back as it is.

        Raises:
            UserError: the text is neither; the message shows the faulty part and the nearest preset.
        """
        if isinstance(text, Layout):
            return text
        if not isinstance(text, str):  # YAML reads an unquoted 1:16 as a number
            raise UserError(f"layout {text!r}: expected a text in quotes, such as '1:16', or a preset such as cos-80")
        name, scales = text.strip().lower(), []
        if name not in PRESETS and name and not name[0].isdigit():
            raise UserError(_unknown_preset(text, name))
        for part in PRESETS.get(name, text).split(","):
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
            if match is None:
                raise UserError(
                    f"layout '{text}': '{part.strip()}' is not a scale; expected grid:queries, such as 4:16"
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
        """For each scale of ``target``, the scale of this layout that it takes its weights from (section 3.3).

        The source has the same queries per window. Among several, the same grid comes first, then the nearest coarser
        one, then (scaling down) the nearest finer one.

        Args:
            sources: overrides, grid of the new scale -> grid of the old one.

        Raises:
            UserError: a scale has no source, or an override names a scale that does not exist or does not fit.
        """
        sources = dict(sources or {})
        if unknown := sorted(sources.keys() - {scale.grid for scale in target.scales}):
            raise UserError(f"sources name grids {unknown}, but layout '{target}' has no such scale")
        found: dict[Scale, Scale] = {}
        for scale in target.scales:
            candidates = self.scales
            if (wanted := sources.get(scale.grid)) is not None:
                candidates = tuple(old for old in self.scales if old.grid == wanted)
                if not candidates:
                    raise UserError(f"source grid {wanted} of scale {scale} is not in layout '{self}'")
            fits = [old for old in candidates if old.queries == scale.queries]
            if not fits:
                raise UserError(
                    f"scale {scale} of '{target}' has no source in '{','.join(map(str, candidates))}': expected one "
                    f"with {scale.queries} queries per window{self._within_reach(target)}"
                )
            coarser = [old for old in fits if old.grid <= scale.grid]
            found[scale] = max(coarser) if coarser else min(fits)
        return found

    def _within_reach(self, target: Layout) -> str:
        """For an error: presets that this layout can be scaled up to, those of as many tokens as ``target`` first."""
        queries, found = {scale.queries for scale in self.scales}, []
        for name, layout in ((name, Layout.parse(text)) for name, text in PRESETS.items()):
            if layout.tokens > self.tokens and queries >= {scale.queries for scale in layout.scales}:
                found.append((layout.tokens != target.tokens, name))
        return f". From '{self}' there are {', '.join(name for _, name in sorted(found))}" if found else ""

    def positions(self, target: Layout) -> list[int]:
        """The position of each of this layout's tokens among those of ``target``, which it will be scaled to (ours).

        A scale that ``target`` has too keeps its positions. Another one takes those of the coarsest scale that it is
        the source of, in the window that holds the middle of its own.

        Raises:
            UserError: a scale has no source, or is the source of none.
        """
        sources, start, child_of = self.source_scales(target), 0, {}
        for scale in target.scales:
            if scale in self.scales or sources[scale] not in child_of:
                child_of[sources[scale]] = scale, start
            start += scale.tokens
        positions: list[int] = []
        for scale in self.scales:
            if scale not in child_of:
                raise UserError(f"scale {scale} of '{self}' is the source of no scale in layout '{target}'")
            child, start = child_of[scale]
            middles = [(2 * window + 1) * child.grid // (2 * scale.grid) for window in range(scale.grid)]
            for window in (row * child.grid + column for row in middles for column in middles):
                positions += range(start + window * scale.queries, start + (window + 1) * scale.queries)
        return positions

    def children(self, target: Layout) -> list[float]:
        """How many tokens of ``target`` each of this layout's tokens is the source of (see `source_scales`; ours)."""
        counts = dict.fromkeys(self.scales, 0.0)
        for child, scale in self.source_scales(target).items():
            counts[scale] += child.grid**2 / scale.grid**2
        return [counts[scale] for scale in self.scales for _ in range(scale.tokens)]


def _unknown_preset(text: str, name: str) -> str:
    if family := [preset for preset in PRESETS if preset.startswith(name + "-from-")]:
        return f"layout '{text}' is ambiguous; the paper has {len(family)}: {', '.join(family)}"
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown layout '{text}'{hint} Expected scales such as '1:16,4:4', or one of {', '.join(PRESETS)}"


def window_bounds(side: int, grid: int) -> list[tuple[int, int]]:
    """Cut ``side`` patches into ``grid`` windows of sizes that differ by one at most; each patch is in one window.

    Raises:
        UserError: there are more windows than patches, so some window would see nothing.
    """
    if grid > side:
        raise UserError(
            f"a grid of {grid} windows per side needs at least {grid} patches per side, but the feature map has "
            f"{side}: use a larger image or a coarser layout"
        )
    return list(pairwise(index * side // grid for index in range(grid + 1)))


def absorbs(queries: int, patches: int, head_width: int) -> bool:
    """Whether a window's attention is cheaper with its queries mapped onto the patches' features than with keys and
    values of every patch (ours). Multiplications: queries * (patches + head_width) against patches * head_width."""
    return queries * (patches + head_width) < patches * head_width
