"""How a VLM's layers and visual tokens behave, and what that suggests for the Sparse Training Scheme.

Shapes: B samples, T positions, D width, A heads, L layers, N visual tokens of an image.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import correlation, median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sparsight.errors import UserError
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.compress import redundancy
from sparsight.sparse.parts import find_parts
from sparsight.sparse.visual import unbroken

LEAST_KEEP, STEP = 0.1, 0.05  # keep is no smaller; keep and alpha are multiples of STEP
MOST_ALPHA = float(SkipperConfig.model_fields["alpha"].default)
TILT = 0.3  # |epsilon|
TREND = 0.5  # the correlation from which depth is said to order the layers
FLAT = 0.01  # layers that differ by less are alike


@dataclass(frozen=True)
class LayerFigures:
    """One layer: mean cosine similarity of its input and output, at visual and at text positions; the share of their
    attention that text queries give to visual tokens, and the share if they attended evenly to all that they may see
    (None without attention weights)."""

    visual_similarity: float
    text_similarity: float
    attention: float | None
    even_attention: float | None

    @property
    def similarity(self) -> float:
        """Mean of the two kinds of positions, which count alike: most are visual, but the loss is taken on text."""
        return (self.visual_similarity + self.text_similarity) / 2


@dataclass(frozen=True)
class Analysis:
    """Figures of `measure`. Redundancy: mean cosine similarity of a visual token and its neighbours on the image's
    grid (along the sequence where the tokens form no square), as the first layer gets them."""

    samples: int
    images: int  # unbroken runs of visual tokens; each tile of an image that is cut into tiles is one
    visual_tokens: int
    text_tokens: int
    layers: tuple[LayerFigures, ...]
    without_attention: str  # why layers lack figures of attention; empty if all have them
    redundancy: float
    any_two: float  # mean cosine similarity of any two visual tokens of an image, neighbours or not
    redundancy_map: tuple[tuple[float, ...], ...] | None  # by position, of images with the most frequent square
    map_images: int


@torch.no_grad()
def measure(model: Any, batches: Iterable[Mapping[str, Any]]) -> Analysis:
    """Run a VLM in eval mode over inputs, and add up what its layers and visual tokens do.

    Args:
        model: loaded with ``attn_implementation="eager"``, else no attention weights are seen.
        batches: arguments of its forward pass; positions that ``attention_mask`` (B, T) leaves out are not counted.

    Raises:
        UserError: `find_parts` refuses the model, there are no visual tokens or no text, or an output is not finite.
    """
    parts = find_parts(model, needs_vision=True)
    if not parts.vision:
        raise UserError(f"{type(model).__name__} has no vision tower: redundancy is measured of visual tokens alone")
    decoder = model.get_submodule(parts.decoder)
    sums, hooks = _Sums(parts.layers), []
    for number, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_hook(partial(sums.add_layer, number), with_kwargs=True))
        hooks += [child.register_forward_hook(partial(sums.add_attention, number)) for child in layer.children()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            visual_BT = torch.isin(batch["input_ids"], batch["input_ids"].new_tensor(parts.visual_token_ids))
            sums.begin(visual_BT, batch.get("attention_mask"))
            model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return sums.result(getattr(decoder.config, "_attn_implementation", None))


class _Sums:
    """Running sums over batches; of hidden states and attention weights nothing is kept."""

    def __init__(self, layers: int) -> None:
        self.samples = self.images = 0
        self.positions_2 = torch.zeros(2, dtype=torch.int64)  # visual, text
        self.similar_L2 = torch.zeros(layers, 2, dtype=torch.float64)
        self.attention_L3 = torch.zeros(layers, 3, dtype=torch.float64)  # to visual tokens, if even, queries
        self.redundant_3 = torch.zeros(3, dtype=torch.float64)  # redundancy by token, similarity by pair, pairs
        self.maps: dict[int, list[torch.Tensor]] = defaultdict(list)  # side -> (side, side) of each image

    def begin(self, visual_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        self.visual_BT, self.text_BT = visual_BT, ~visual_BT if mask_BT is None else mask_BT.bool() & ~visual_BT
        self.samples += len(visual_BT)
        self.positions_2 += torch.stack([self.visual_BT.sum(), self.text_BT.sum()]).cpu()

    def add_layer(self, number: int, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hook of a layer: its similarities; of the first one, also what it is given."""
        x_BTD = args[0] if args else kwargs["hidden_states"]
        y_BTD = output[0] if isinstance(output, tuple) else output
        if x_BTD.shape[:2] != self.visual_BT.shape:
            raise UserError(
                f"layer {number} has positions {tuple(x_BTD.shape[:2])}, input_ids {tuple(self.visual_BT.shape)}: "
                "expected a placeholder for each visual token"
            )
        if not bool(y_BTD.isfinite().all()):
            raise UserError(f"layer {number}: its output in {y_BTD.dtype} is not finite; try another dtype")
        similar_BT = F.cosine_similarity(x_BTD.float(), y_BTD.float(), dim=-1).double()
        self.similar_L2[number] += torch.stack([similar_BT[at].sum() for at in (self.visual_BT, self.text_BT)]).cpu()
        lengths = unbroken(np.argwhere(self.visual_BT.cpu().numpy()))
        for x_ND in x_BTD[self.visual_BT].split(lengths) if number == 0 else ():
            tokens, side = len(x_ND), math.isqrt(len(x_ND))
            square = side * side == tokens
            redundant_N = redundancy(x_ND[None], (side, side) if square else (1, tokens))[0].double().cpu()
            # The sum over all pairs of unit vectors, themselves included, is the squared length of their sum.
            pairs = F.normalize(x_ND.double(), dim=-1).sum(0).square().sum().cpu() - tokens
            self.redundant_3 += torch.stack([redundant_N.sum(), pairs, torch.tensor(tokens * (tokens - 1.0))])
            self.images += 1
            if square:
                self.maps[side].append(redundant_N.view(side, side))

    def add_attention(self, number: int, _: nn.Module, __: Any, output: Any) -> None:
        """Hook of each child of a layer: the one that gives (output, weights (B, A, T, T)) is the attention."""
        weights_BATT = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights_BATT, torch.Tensor) or weights_BATT.ndim != 4:
            return
        seen_BTT = weights_BATT.amax(1) > 0  # masked ones are exactly zero, whatever the mask
        seen_visual_BTT = seen_BTT & self.visual_BT[:, None]
        asks_BT = self.text_BT & seen_visual_BTT.any(-1)
        given_BT = (weights_BATT.float().mean(1) * self.visual_BT[:, None]).sum(-1).double()
        even_BT = seen_visual_BTT.sum(-1).double() / seen_BTT.sum(-1).clamp(min=1)
        self.attention_L3[number] += torch.stack([given_BT[asks_BT].sum(), even_BT[asks_BT].sum(), asks_BT.sum()]).cpu()

    def result(self, backend: str | None) -> Analysis:
        visual, text = self.positions_2.tolist()
        if not visual or not text:
            raise UserError(
                f"{self.samples} samples with {visual} visual tokens and {text} of text: expected some of both"
            )
        attention = [(a / n, e / n) if n else (None, None) for a, e, n in self.attention_L3.tolist()]
        lacking = [number for number, (share, _) in enumerate(attention) if share is None]
        why = (
            f"layers {lacking} gave no attention weights for text behind an image: expected the backend 'eager' and "
            f"layers with softmax attention, found the backend '{backend}'"
        )
        maps = max(self.maps.values(), key=len, default=[])
        similar = (self.similar_L2 / self.positions_2).tolist()
        layers = tuple(LayerFigures(*s, *a) for s, a in zip(similar, attention, strict=True))
        redundant, any_two, pairs = self.redundant_3.tolist()
        means = redundant / visual, any_two / max(pairs, 1)
        shown = tuple(map(tuple, torch.stack(maps).mean(0).tolist())) if maps else None
        counts = self.samples, self.images, visual, text
        return Analysis(*counts, layers, why if lacking else "", *means, shown, len(maps))


@dataclass(frozen=True)
class Suggestion:
    """Settings to start from, ``importance`` of each layer (1 - similarity), and why, by setting."""

    compressor: CompressorConfig
    skipper: SkipperConfig
    importance: tuple[float, ...]
    reasons: dict[str, str]

    @property
    def code(self) -> str:
        """The line of Python that attaches them."""
        made = []
        for settings in (self.compressor, self.skipper):
            given = settings.model_dump(exclude_unset=True).items()
            made.append(f"sparsight.{type(settings).__name__}({', '.join(f'{key}={value!r}' for key, value in given)})")
        return f"sparsight.attach(model, {', '.join(made)})"


def suggest(analysis: Analysis) -> Suggestion:
    """Starting points by simple rules; none was tuned, and none is a measured optimum.

    - keep: 1 - (redundancy - any_two) / (1 - any_two), in steps of 0.05, from 0.1 to 1: what a token's neighbours do
      not say, of what the tokens of an image do not share anyway.
    - protected: the first and last layers in a row whose similarity lies below the median by more than 0.02 and by more
      than three times the median distance from it. The others are free.
    - alpha: the median similarity of the free layers, rounded down to 0.05, and at most the default of 0.6.
    - epsilon: 0 where free layers differ by less than 0.01. Where their similarity correlates with depth by 0.5 or
      more, 0.3 with the sign of it: deep layers that change little are skipped more.
    - importance: 1 - similarity. Where depth does not order the layers, the tilt of 0.3 follows it in place of depth.
    """
    similar = [layer.similarity for layer in analysis.layers]
    middle = median(similar)
    clear = max(0.02, 3 * median(abs(value - middle) for value in similar))
    first = next(number for number, value in enumerate(similar) if value >= middle - clear)
    last = next(number for number, value in enumerate(reversed(similar)) if value >= middle - clear)
    free = similar[first : len(similar) - last]
    said = (analysis.redundancy - analysis.any_two) / max(1 - analysis.any_two, FLAT)
    importance = tuple(round(max(0.0, 1 - value), 4) for value in similar)
    trend = correlation(free, range(len(free))) if len(free) > 3 and max(free) > min(free) else 0.0
    tilt: dict[str, Any] = {"epsilon": TILT, "importance": importance}
    why = f"their similarity has no clear trend over depth ({trend:+.2f}): the least important ones are skipped more"
    if max(free) - min(free) < FLAT:
        tilt, why = {"epsilon": 0.0}, f"their similarities differ by less than {FLAT}"
    elif abs(trend) >= TREND:
        where, tilt = "deep" if trend > 0 else "early", {"epsilon": math.copysign(TILT, trend)}
        why = (
            f"their similarity correlates with depth by {trend:+.2f}: {where} layers change least, and are skipped more"
        )
    reasons = {
        "keep": f"Any two visual tokens of an image are alike by {analysis.any_two:.3f}, neighbours by "
        f"{analysis.redundancy:.3f}: neighbours say {100 * max(0.0, said):.0f}% of what not all share.",
        "protected": f"The first {first} and last {last} layers lie more than {clear:.3f} below the median similarity, "
        f"{middle:.3f}.",
        "alpha": f"The other layers' median similarity is {median(free):.3f}; {MOST_ALPHA}, the default, is the most.",
        "epsilon": f"Of the {len(free)} layers that may be skipped, {why}.",
    }
    keep, alpha = max(LEAST_KEEP, min(1.0, 1 - said)) + STEP / 2, max(0.0, min(MOST_ALPHA, median(free)))
    skipper = SkipperConfig.model_validate({"alpha": _down(alpha), "protected": (first, last), **tilt})
    return Suggestion(CompressorConfig(keep=_down(keep)), skipper, importance, reasons)


def _down(value: float) -> float:
    return round(math.floor(value / STEP + 1e-9) * STEP, 2)
