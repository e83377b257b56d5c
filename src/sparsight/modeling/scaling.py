"""Take a model, or a checkpoint on disk, to another layout and image size, weights carried over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from sparsight.bridges import WindowedResampler, build_bridge
from sparsight.bridges.scaling import ScaledPart, scale_bridge
from sparsight.devices.precision import forked_rng
from sparsight.errors import UserError
from sparsight.layouts import window_bounds
from sparsight.modeling.build import set_image_size
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.encoders import probe
from sparsight.modeling.folders import check_files, loading, model_type, read_json
from sparsight.modeling.processing import SparsightProcessor, resize_mode
from sparsight.modeling.vlm import SparsightForConditionalGeneration
from sparsight.safety import whole_folder
from sparsight.settings.bridges import ChainOfSightConfig, bridge_settings, check_scaling

BRIDGE, INDEX = "model.multi_modal_projector.", "model.safetensors.index.json"
# Files that a Trainer puts beside a model: they belong to the old parameters.
_TRAINING = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")


@dataclass(frozen=True)
class ScalingReport:
    """The new bridge's parts and their sources, none where the bridge stays as it is; sizes are (old, new)."""

    parts: tuple[ScaledPart, ...]
    tokens: tuple[int, int]
    image_size: tuple[int, int]

    def __str__(self) -> str:
        lines = ["visual tokens {} -> {}, images {} -> {} px".format(*self.tokens, *self.image_size)]
        if self.parts:
            lines.append(f"{'scale':14}{'from':10}{'tokens':>6}{'copied':>14}{'repeated':>12}{'new':>14}")
        for p in self.parts:
            lines.append(f"{p.part:14}{p.source:10}{p.tokens or '':>6}{p.copied:>14,}{p.repeated:>12,}{p.new:>14,}")
        return "\n".join(lines)


def scale_tokens(
    model: Any,
    processor: SparsightProcessor,
    layout: Any = None,
    image_size: int | None = None,
    sources: Mapping[int, int] | None = None,
    vision_levels: Sequence[int] | None = None,
) -> ScalingReport:
    """Give a trained model a new layout, image size or set of feature levels, in place (Chain-of-Sight, section 3.3).

    Language model, LoRA adapters and encoder keep their weights; an optimizer made before does not know the new
    bridge's parameters, so make a new one.

    Args:
        model: ours, or a peft model around it.
        layout: such as ``"1:16,2:16,16:1"``, or bridge settings of the same width and heads. A single-scale resampler
            can become Chain-of-Sight: it is the scale ``1:n``. Unchanged if not given.
        image_size: side of the image in pixels; the encoder interpolates its learned positions itself, at run time.
        sources: overrides of the source scales, grid of the new scale -> grid of the old one.
        vision_levels: the encoder's feature levels to see from now on, some of the old ones among them.

    Returns:
        The source of each part; ``print`` shows it as a table.

    Raises:
        UserError: the old bridge cannot become the new one, the layout does not fit the feature map, or the encoder
            has no such level or cannot take the size. Nothing has changed then.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, encoder, bridge = model.config, model.model.vision_tower, model.model.multi_modal_projector
    old, side = config.bridge, image_size or config.image_size
    new, levels = _laid_out(old, layout), config.vision_levels if vision_levels is None else list(vision_levels)
    map_size, widths, numbers = _maps(encoder, side, levels, new)
    before = numbers if vision_levels is None else probe(encoder, side, config.vision_levels)[1]
    parts: list[ScaledPart] = []
    if new != old or numbers != before:
        check_scaling(old, new, sources)
        grown = WindowedResampler(new, widths, bridge.proj.out_features).to(bridge.proj.weight)
        parts = scale_bridge(bridge, grown, sources, (before, numbers))
        bridge = grown.train(model.training)
    tokens = config.num_image_tokens, new.visual_tokens(map_size)
    report = ScalingReport(tuple(parts), tokens, (config.image_size, side))
    model.model.multi_modal_projector = bridge
    config.bridge_config, config.vision_levels, config.level_widths = new.model_dump(mode="json"), levels, widths
    config.image_size, config.map_size = side, list(map_size)
    processor.num_image_tokens = config.num_image_tokens
    set_image_size(processor.image_processor, side, resize_mode(processor.image_processor))
    return report


@contextmanager
def laid_out(model: Any, processor: SparsightProcessor, layout: Any) -> Iterator[None]:
    """`scale_tokens` to another layout for a while: the old bridge stands aside and comes back, nothing else is copied.
    Nothing is drawn from the random generators."""
    config, bridge, tokens = model.config, model.model.multi_modal_projector, processor.num_image_tokens
    keys = ("bridge_config", "vision_levels", "level_widths", "map_size")
    before = {key: getattr(config, key) for key in keys}
    with forked_rng():
        scale_tokens(model, processor, layout)
    try:
        yield
    finally:
        model.model.multi_modal_projector, processor.num_image_tokens = bridge, tokens
        for key, value in before.items():
            setattr(config, key, value)


def scaled_processor(
    model: Any, processor: SparsightProcessor, layout: Any = None, image_size: int | None = None
) -> SparsightProcessor:
    """A copy of the processor, as `scale_tokens` would leave it; the model stays as it is. Arguments as there."""
    config, scaled = model.config, copy(processor)
    side, bridge = image_size or config.image_size, _laid_out(config.bridge, layout)
    scaled.image_processor = deepcopy(processor.image_processor)
    map_size, *_ = _maps(model.model.vision_tower, side, config.vision_levels, bridge)
    scaled.num_image_tokens = bridge.visual_tokens(map_size)
    set_image_size(scaled.image_processor, side, resize_mode(scaled.image_processor))
    return scaled


def _laid_out(old: Any, layout: Any) -> Any:
    """Settings of the new bridge; a layout alone takes its width and heads from the old one."""
    new = old if layout is None else bridge_settings(layout)
    if isinstance(layout, str) and isinstance(new, ChainOfSightConfig) and hasattr(old, "scales"):
        return ChainOfSightConfig.model_validate(old.model_dump(exclude={"kind", "tokens"}) | {"layout": new.layout})
    return new


def _maps(encoder: Any, side: int, levels: Any, bridge: Any) -> tuple[tuple[int, int], list[int], list[int]]:
    """Size of the feature maps of images of ``side`` pixels, and the levels' widths and indices. Raises UserError."""
    patch: Any = getattr(encoder.config, "patch_size", None) or 1
    if side < (patch if isinstance(patch, int) else max(patch)):
        raise UserError(
            f"image_size {side}: {type(encoder).__name__} cuts images into patches of {patch} pixels, so it takes no "
            "smaller ones"
        )
    maps, numbers = probe(encoder, side, levels)
    map_size = maps[0].shape[1], maps[0].shape[2]
    for scale in bridge.scales.scales if hasattr(bridge, "scales") else ():
        window_bounds(min(map_size), scale.grid)  # a layout that does not fit the map fails here
    return map_size, [level.shape[3] for level in maps], numbers


def scale_checkpoint(
    folder: str | Path,
    out: str | Path,
    layout: Any = None,
    image_size: int | None = None,
    sources: Mapping[int, int] | None = None,
    vision_levels: Sequence[int] | None = None,
) -> ScalingReport:
    """`scale_tokens` for a saved model, file by file: the language model is built without weights, and read by shards.

    Args:
        out: the new folder; written whole or not at all. A Trainer's optimizer state is left behind.

    Raises:
        UserError: as `scale_tokens`; or ``folder`` holds no model of ours, or one that is cut short.
        FileExistsError: ``out`` exists.
    """
    folder = Path(folder)
    with whole_folder(Path(out)) as partial:
        where = _tensor_files(folder)
        with loading("model", str(folder)):
            config = SparsightConfig.from_pretrained(folder)
            processor = SparsightProcessor.from_pretrained(folder, trust_remote_code=False)
        bridge = build_bridge(config.bridge, config.level_widths, config.text_config.hidden_size)
        old = _read(folder, where, [name for name in where if name.startswith(BRIDGE)])
        bridge.load_state_dict({name.removeprefix(BRIDGE): tensor for name, tensor in old.items()}, assign=True)
        with torch.device("meta"):
            model = SparsightForConditionalGeneration(config)
        # For its shapes.
        model.model.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        model.model.multi_modal_projector = bridge
        report = scale_tokens(model, processor, layout, image_size, sources, vision_levels)
        new = {BRIDGE + name: tensor for name, tensor in model.model.multi_modal_projector.state_dict().items()}
        if model.model.multi_modal_projector is bridge:
            old = new = {}
        _write_files(folder, partial, where, old, new)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
    return report


def _tensor_files(folder: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    check_files(folder)
    kind = model_type(folder)
    if kind != SparsightConfig.model_type:
        found = "no config.json" if kind is None else f"a model of type '{kind}'"
        raise UserError(f"{folder}: expected a model of Sparsight, found {found}")
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path.name)
    wanted = read_json(folder / INDEX)["weight_map"] if (folder / INDEX).is_file() else {}
    missing = sorted(wanted.keys() - where.keys())
    if missing or not where:
        lacks = f"{len(missing)} tensors, such as '{missing[0]}'" if missing else "any *.safetensors"
        raise UserError(f"{folder} is not complete: it lacks {lacks}")
    return where


def _read(folder: Path, where: Mapping[str, str], names: Iterable[str]) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        with safe_open(folder / where[name], framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def _write_files(
    folder: Path, out: Path, where: Mapping[str, str], old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> None:
    """Copy a checkpoint with ``new`` tensors in place of ``old`` ones; files in which nothing changes stay as they are.

    A tensor that only changes stays in its file; one that is added goes where the first that goes was.
    """
    place = {name: file for name, file in where.items() if name not in old}
    place |= {name: where.get(name, where[min(old)]) for name in new}
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        if path.name in {where[name] for name in old}:
            names = [name for name, file in place.items() if file == path.name]
            tensors = _read(folder, where, [name for name in names if name not in new])
            tensors |= {name: new[name].contiguous() for name in names if name in new}
            save_file(tensors, out / path.name, metadata={"format": "pt"})
        elif not any(fnmatch(path.name, pattern) for pattern in _TRAINING):
            shutil.copy2(path, out / path.name)
    if (folder / INDEX).is_file():
        content = read_json(folder / INDEX)
        sizes = {"total_size": lambda t: t.numel() * t.element_size(), "total_parameters": Tensor.numel}
        for key in sizes.keys() & content["metadata"]:
            content["metadata"][key] += sum(map(sizes[key], new.values())) - sum(map(sizes[key], old.values()))
        content["weight_map"] = dict(sorted(place.items()))
        (out / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
