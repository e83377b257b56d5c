"""Settings of bridges, and the one count of visual tokens. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from sparsight.errors import UserError
from sparsight.layouts import Layout, Scale
from sparsight.settings.base import Settings, readable

# A layout in settings: given as text, written as text, and a `Layout` in between.
LayoutField = Annotated[
    Layout, PlainValidator(Layout.parse), PlainSerializer(str, str), WithJsonSchema({"type": "string"})
]


class BridgeSettings(Settings):
    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        """Visual tokens for one image whose feature map has (H, W) patches. The one count that all parts use."""
        return map_size[0] * map_size[1]


class LinearConfig(BridgeSettings):
    """One linear map per patch: H*W tokens (LLaVA)."""

    kind: Literal["linear"] = "linear"


class MlpConfig(BridgeSettings):
    """Two linear maps with GELU between, per patch: H*W tokens (LLaVA-1.5)."""

    kind: Literal["mlp"] = "mlp"


class PixelShuffleConfig(BridgeSettings):
    """``factor`` x ``factor`` patches folded into one token, then an MLP (InternVL, Idefics3)."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(2, ge=1)

    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        # Ceiling: a map that does not divide is padded, never cropped.
        return -(-map_size[0] // self.factor) * -(-map_size[1] // self.factor)


class WindowedSettings(BridgeSettings):
    width: int = Field(1024, ge=1, description="width of queries and attention; the paper's is 1024")
    heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    depth: int = Field(1, ge=1, description="rounds over the feature levels")
    query_std: float = Field(
        0.02, gt=0, description="start values of the queries; the paper's 0.02 needs long training, short runs take 1"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> WindowedSettings:
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide by heads {self.heads}")
        return self

    @property
    def scales(self) -> Layout:
        raise NotImplementedError

    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        return self.scales.tokens


class ResamplerConfig(WindowedSettings):
    """The single-scale resampler: ``tokens`` queries that see the whole image, i.e. the layout ``1:tokens``."""

    kind: Literal["resampler"] = "resampler"
    tokens: int = Field(336, ge=1)

    @property
    def scales(self) -> Layout:
        return Layout((Scale(1, self.tokens),))


class ChainOfSightConfig(WindowedSettings):
    """Multi-scale windowed resamplers (Chain-of-Sight, section 3). The values not given are the paper's.

    Args:
        layout: scales such as ``"1:16,4:4"`` or a preset such as ``"cos-80"``.
        order: of the tokens; the paper's is coarse to fine, the other is its ablation.
        shared_queries: one set of queries for all windows of a scale (ablation), not a row for each token.
    """

    kind: Literal["chain_of_sight"] = "chain_of_sight"
    layout: LayoutField = Layout((Scale(1, 16), Scale(4, 4)))
    order: Literal["coarse_to_fine", "fine_to_coarse"] = "coarse_to_fine"
    shared_queries: bool = False

    def __init__(self, layout: str | Layout | None = None, /, **values: Any) -> None:
        super().__init__(**(values if layout is None else values | {"layout": layout}))

    @property
    def scales(self) -> Layout:
        return self.layout


BRIDGE_KINDS = ("linear", "mlp", "pixel_shuffle", "resampler", "chain_of_sight")


def spelled_out(value: Any) -> Any:
    """A bridge's kind, or a layout, as the settings that it stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value in (*BRIDGE_KINDS, "paper"):
        return {"kind": "chain_of_sight" if value == "paper" else value}
    return {"kind": "chain_of_sight", "layout": value}


AnyBridge = LinearConfig | MlpConfig | PixelShuffleConfig | ResamplerConfig | ChainOfSightConfig
_Kinds = Annotated[AnyBridge, Field(discriminator="kind")]
Bridge = Annotated[_Kinds, BeforeValidator(spelled_out, json_schema_input_type=_Kinds | str)]
_BRIDGE: TypeAdapter[Any] = TypeAdapter(Bridge)


def bridge_settings(value: Any) -> AnyBridge:
    """Settings of a bridge from settings, a dict, a kind such as ``"mlp"``, or a layout such as ``"cos-80"``.

    ``"paper"`` is Chain-of-Sight with the paper's values: 80 tokens, width 1024, 16 heads, one round.

    Raises:
        UserError: the kind or a key is unknown, or a value is out of range.
    """
    if isinstance(value, BridgeSettings):
        return value  # type: ignore[return-value]
    try:
        return _BRIDGE.validate_python(value)
    except ValidationError as error:
        raise UserError(readable(error)) from None


def check_scaling(old: Bridge, new: Bridge, sources: Mapping[int, int] | None = None) -> dict[Scale, Scale]:
    """Each scale of ``new`` -> its source scale in ``old``; ``sources`` as in `Layout.source_scales`.

    Raises:
        UserError: the bridge ``old`` cannot become ``new``: a scale has no source, or more than the layout differs.
    """
    if not isinstance(old, WindowedSettings) or not isinstance(new, ChainOfSightConfig | type(old)):
        raise UserError(
            f"a bridge of kind {old.kind} cannot become one of kind {new.kind}: only resampler and chain_of_sight can "
            "be scaled, to chain_of_sight"
        )
    changed = {}
    for key in ("width", "heads", "mlp_ratio", "depth", "order", "shared_queries"):
        pair = [getattr(each, key, ChainOfSightConfig.model_fields[key].default) for each in (old, new)]
        if pair[0] != pair[1]:
            changed[key] = pair
    if changed:
        raise UserError(f"scaling changes the layout alone, but these differ (old, new): {changed}")
    return old.scales.source_scales(new.scales, sources)
