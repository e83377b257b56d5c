"""How a VLM's layers and visual tokens behave, and what that suggests for the Sparse Training Scheme.

Shapes: B samples, T positions, D width, A heads, L layers, N visual tokens of a image.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import correlation, fmean, median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsight.errors import UserError
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.compress import redundancy
from sparsight.sparse.parts import find_parts

LEAST_KEEP, STEP = 0.1, 0.05  # keep is no smaller; keep and alpha are multiples of STEP
MOST_ALPHA = float(SkipperConfig.model_fields["alpha"].default)
TILT = 0.3  # |epsilon|
TREND = 0.5  # the correlation from which depth is said to order the layers
FLAT = 0.01  # layers that differ by less are alike


@dataclass(frozen=True)
class LayerFigures:
    """One layer of the decoder: mean cosine similarity of its input and output, at visual and at text positions; the
    share of their attention that text queries give to visual tokens, and the share if they attended evenly to all that
    they may see (None where the layer gives no attention weights)."""

    visual_similarity: float
    text_similarity: float
    attention: float | None
    even_attention: float | None

    @property
    def similarity(self) -> float:
        """Mean of the two kinds of positions, which count alike: most are visual, but text is what is learnt."""
        return (self.visual_similarity + self.text_similarity) / 2


@dataclass(frozen=True)
class Analysis:
    """What `measure` saw.

    Args:
        images: unbroken runs of visual tokens; each tile of a image that is cut into tiles is one.
        without_attention: why layers lack figures of attention; empty if all have them.
        redundancy: mean cosine similarity of a visual token and its neighbours on the image's grid (along the
            sequence where the tokens form no square), as the first layer gets them.
        any_two: mean cosine similarity of any two visual tokens of a image, neighbours or not.
        redundancy_map: mean by place, of the `map_images` images with the most frequent square; None without one.
    """

    samples: int
    images: int
    visual_tokens: int
    text_tokens: int
    layers: tuple[LayerFigures, ...]
    without_attention: str
    redundancy: float
    any_two: float
    redundancy_map: tuple[tuple[float, ...], ...] | None
    map_images: int


@torch.no_grad()
def measure(model: Any, batches: Iterable[Mapping[str, Any]]) -> Analysis:
    """Run a VLM in eval mode over inputs, and add up what its layers and visual tokens do.

    Args:
        model: loaded with ``attn_implementation="eager"``, else no attention weights are seen.
        batches: keyword arguments of its forward pass, with ``input_ids`` (B, T); positions that ``attention_mask``
            (B, T) leaves out are not counted.

    Raises:
        UserError: `find_parts` does not take the model, the inputs have no visual tokens or no text, or a layer's
            output is not finite.
    """
    parts, decoder, layers, _ = find_parts(model)
    sums = _Sums(parts.layers, parts.visual_token_ids)
    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(sums.layer_hook(number), with_kwargs=True))
        hooks += [child.register_forward_hook(sums.attention_hook(number)) for child in layer.children()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            sums.begin(batch["input_ids"], batch.get("attention_mask"))
            model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return sums.result(getattr(decoder.config, "_attn_implementation", None))


class _Sums:
    """Running sums over batches; of hidden states and attention weights nothing is kept."""

    def __init__(self, layers: int, visual_token_ids: Sequence[int]) -> None:
        self.visual_token_ids = torch.tensor(visual_token_ids)
        self.samples = 0
        self.positions_2 = torch.zeros(2, dtype=torch.int64)  # visual, text
        self.similar_L2 = torch.zeros(layers, 2, dtype=torch.float64)
        self.attention_L3 = torch.zeros(layers, 3, dtype=torch.float64)  # to visual tokens, if even, queries
        self.redundant_3 = torch.zeros(3, dtype=torch.float64)  # redundancy by token, similarity by pair, pairs
        self.maps: dict[int, list[torch.Tensor]] = defaultdict(list)  # side -> (side, side) of each image
        self.images = 0

    def begin(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> None:
        self.visual_BT = torch.isin(ids_BT, self.visual_token_ids.to(ids_BT.device))
        valid_BT = torch.ones_like(self.visual_BT) if mask_BT is None else mask_BT.bool()
        self.text_BT = valid_BT & ~self.visual_BT
        self.samples += len(ids_BT)
        self.positions_2 += torch.stack([self.visual_BT.sum(), self.text_BT.sum()]).cpu()

    def layer_hook(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x_BTD = args[0] if args else kwargs["hidden_states"]
            y_BTD = output[0] if isinstance(output, tuple) else output
            if x_BTD.shape[:2] != self.visual_BT.shape:
                raise UserError(
                    f"layer {number} has positions {tuple(x_BTD.shape[:2])}, input_ids {tuple(self.visual_BT.shape)}:"
                    " expected a placeholder for each visual token"
                )
            if not bool(y_BTD.isfinite().all()):
                raise UserError(f"layer {number}: its output in {y_BTD.dtype} is not finite; try another dtype")
            similar_BT = F.cosine_similarity(x_BTD.float(), y_BTD.float(), dim=-1).double()
            both = [similar_BT[self.visual_BT].sum(), similar_BT[self.text_BT].sum()]
            self.similar_L2[number] += torch.stack(both).cpu()
            if number == 0:
                self._add_tokens(x_BTD)

        return hook

    def attention_hook(self, number: int) -> Any:
        """On each child of a layer: the one that gives (output, weights (B, A, T, T)) is the attention."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            weights_BATT = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights_BATT, torch.Tensor) or weights_BATT.ndim != 4:
                return
            seen_BTT = weights_BATT.amax(1) > 0  # masked ones are exactly zero, whatever the mask
            seen_visual_BTT = seen_BTT & self.visual_BT[:, None]
            asks_BT = self.text_BT & seen_visual_BTT.any(-1)
            given_BT = (weights_BATT.float().mean(1) * self.visual_BT[:, None]).sum(-1).double()
            even_BT = seen_visual_BTT.sum(-1).double() / seen_BTT.sum(-1).clamp(min=1)
            found = [given_BT[asks_BT].sum(), even_BT[asks_BT].sum(), asks_BT.sum().double()]
            self.attention_L3[number] += torch.stack(found).cpu()

        return hook

    def _add_tokens(self, x_BTD: torch.Tensor) -> None:
        """Redundancy of each image: an unbroken run of visual tokens in a sample."""
        for x_TD, visual_T in zip(x_BTD, self.visual_BT, strict=True):
            edges = F.pad(visual_T.int(), (1, 1)).diff().nonzero().flatten().tolist()
            for start, end in list(pairwise(edges))[::2]:
                tokens, side = end - start, math.isqrt(end - start)
                square = side * side == tokens
                x_1ND = x_TD[None, start:end]
                place_N = redundancy(x_1ND, (side, side) if square else (1, tokens))[0].double().cpu()
                # The sum over all pairs of unit vectors, themselves included, is the squared length of their sum.
                pairs = float(F.normalize(x_1ND[0].double(), dim=-1).sum(0).square().sum()) - tokens
                sums = [float(place_N.sum()), pairs, tokens * (tokens - 1)]
                self.redundant_3 += torch.tensor(sums, dtype=torch.float64)
                self.images += 1
                if square:
                    self.maps[side].append(place_N.view(side, side))

    def result(self, backend: str | None) -> Analysis:
        visual, text = self.positions_2.tolist()
        if not visual or not text:
            raise UserError(
                f"{self.samples} samples with {visual} visual tokens and {text} of text: expected some of both"
            )
        similar = (self.similar_L2 / self.positions_2).tolist()
        attention = [(a / n, e / n) if n else (None, None) for a, e, n in self.attention_L3.tolist()]
        lacking = [number for number, (share, _) in enumerate(attention) if share is None]
        why = (
            f"layers {lacking} gave no attention weights for text behind a image: expected the backend 'eager' and"
            f" layers with softmax attention, found the backend '{backend}'"
        )
        maps = max(self.maps.values(), key=len, default=[])
        mean_map = torch.stack(maps).mean(0).tolist() if maps else None
        return Analysis(
            samples=self.samples,
            images=self.images,
            visual_tokens=visual,
            text_tokens=text,
            layers=tuple(LayerFigures(*s, *a) for s, a in zip(similar, attention, strict=True)),
            without_attention=why if lacking else "",
            redundancy=float(self.redundant_3[0]) / visual,
            any_two=float(self.redundant_3[1] / self.redundant_3[2].clamp(min=1)),
            redundancy_map=None if mean_map is None else tuple(map(tuple, mean_map)),
            map_images=len(maps),
        )


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
      not say, of what the tokens of a image do not share anyway.
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
    keep = _down(max(LEAST_KEEP, min(1.0, 1 - said)) + STEP / 2)
    alpha = _down(max(0.0, min(MOST_ALPHA, median(free))))
    importance = tuple(round(max(0.0, 1 - value), 4) for value in similar)
    tilt, why_tilt = _tilt(free, importance)
    reasons = {
        "keep": f"Any two visual tokens of a image are alike by {analysis.any_two:.3f}, neighbours by"
        f" {analysis.redundancy:.3f}: of what they do not all share, neighbours say {100 * max(0.0, said):.0f}%.",
        "protected": f"The median similarity of the layers is {middle:.3f}; of the first layers in a row {first},"
        f" and of the last {last}, lie more than {clear:.3f} below it.",
        "alpha": f"The free layers' median similarity is {median(free):.3f}: a layer is skipped no more often than its"
        f" output is like its input, and at most with {MOST_ALPHA}, the default.",
        "epsilon": why_tilt,
    }
    skipper = SkipperConfig.model_validate({"alpha": alpha, "protected": (first, last), **tilt})
    return Suggestion(CompressorConfig.model_validate({"keep": keep}), skipper, importance, reasons)


def _down(value: float) -> float:
    return round(math.floor(value / STEP + 1e-9) * STEP, 2)


def _tilt(free: list[float], importance: tuple[float, ...]) -> tuple[dict[str, Any], str]:
    """Settings of `SkipperConfig` for the tilt, and why."""
    if max(free) - min(free) < FLAT:
        alike = f"The free layers' similarities ({fmean(free):.3f} on average) differ by less than {FLAT}."
        return {"epsilon": 0.0}, alike
    trend = correlation(free, range(len(free))) if len(free) > 3 else 0.0
    if abs(trend) >= TREND:
        where = "deep" if trend > 0 else "early"
        return {"epsilon": math.copysign(TILT, trend)}, (
            f"The free layers' similarity correlates with depth by {trend:+.2f}: {where} layers change least, and are"
            " skipped more."
        )
    return {"epsilon": TILT, "importance": importance}, (
        f"The similarity of the {len(free)} free layers has no clear trend over depth (correlation {trend:+.2f}; clear"
        f" is {TREND} or more, of at least four layers): the tilt goes by importance, and the least important layers"
        " are skipped more."
    )
