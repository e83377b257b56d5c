"""Take a model to another stage's layout and image size, weights carried over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsight.bridges import WindowedResampler, build_bridge
from sparsight.bridges.scaling import scale_bridge
from sparsight.config import ChainOfSight, bridge_settings
from sparsight.layouts import Scale
from sparsight.modeling.build import probe, set_image_size
from sparsight.modeling.modeling import SparsightForConditionalGeneration
from sparsight.modeling.processing import SparsightProcessor


def scale_tokens(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    bridge: Any,
    image_size: int | None = None,
    sources: Mapping[int, int] | None = None,
) -> dict[Scale, Scale]:
    """Give a trained model a new layout and image size, in place (Chain-of-Sight, section 3.3).

    Args:
        bridge: a layout such as ``"1:16,2:16,16:1"``, or settings of the same width and heads.
        image_size: side of the picture in pixels; unchanged if not given.
        sources: overrides of the lineage, grid of the new scale -> grid of the old one.

    Returns:
        Which old scale each new one was born from; empty where the bridge stays as it is.

    Raises:
        ValueError: the old bridge cannot become the new one, or the layout does not fit the feature map.
    """
    config = model.config
    old = bridge_settings(config.bridge_config)
    new = bridge_settings(bridge)
    if isinstance(bridge, str) and isinstance(old, ChainOfSight) and isinstance(new, ChainOfSight):
        new = old.model_copy(update={"layout": new.layout})
    side = image_size or config.image_size
    levels = probe(model.model.vision_tower, side, config.vision_levels)
    born: dict[Scale, Scale] = {}
    if new != old:
        source = model.model.multi_modal_projector
        if not isinstance(source, WindowedResampler) or new.kind != old.kind:
            raise ValueError(f"a bridge {old.kind} cannot become {new.kind} ({new.model_dump()}); only layouts change")
        weight = source.proj.weight
        target = build_bridge(new, config.level_widths, config.text_config.hidden_size).to(weight)
        assert isinstance(target, WindowedResampler)
        target(tuple(level.to(weight) for level in levels))  # a layout that does not fit the map fails here
        born = scale_bridge(source, target, sources)
        model.model.multi_modal_projector = target.train(model.training)
    config.bridge_config = new.model_dump()
    config.image_size = side
    config.map_size = list(levels[0].shape[1:3])
    processor.num_image_tokens = config.num_image_tokens
    set_image_size(processor.image_processor, side)
    return born
