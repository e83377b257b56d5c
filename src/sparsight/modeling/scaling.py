"""Take a model, or a checkpoint on disk, to another layout and image size, weights carried over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from sparsight.bridges import WindowedResampler, build_bridge
from sparsight.bridges.scaling import Born, scale_bridge
from sparsight.errors import UserError
from sparsight.layouts import window_bounds
from sparsight.modeling.build import probe, set_image_size
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.encoders import level_numbers
from sparsight.modeling.folders import check_files, model_type
from sparsight.modeling.processing import SparsightProcessor, resize_mode
from sparsight.modeling.vlm import SparsightForConditionalGeneration
from sparsight.settings.bridges import ChainOfSightConfig, bridge_settings, check_scaling

BRIDGE, TOWER = "model.multi_modal_projector.", "model.vision_tower."
# What a Trainer puts beside a model: it belongs to the old parameters.
_TRAINING = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")


@dataclass(frozen=True)
class ScalingReport:
    """What came from where. ``born`` is empty where the bridge stays as it is; sizes are (old, new)."""

    born: tuple[Born, ...]
    tokens: tuple[int, int]
    image_size: tuple[int, int]
    positions: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("scale", "from", "tokens", "copied", "repeated", "new")]
        rows += [
            (b.part, b.source, str(b.tokens or ""), *(f"{n:,}" for n in (b.copied, b.repeated, b.new)))
            for b in self.born
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(t.ljust(w) if n < 2 else t.rjust(w) for n, (t, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        tokens, size = ("{} -> {}".format(*pair) for pair in (self.tokens, self.image_size))
        head = f"visual tokens {tokens}, images {size} px, encoder positions {self.positions}"
        return "\n".join([head, *(lines if self.born else [])])


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
        image_size: side of the image in pixels; the encoder's table of positions is interpolated by its own code.
        sources: overrides of the lineage, grid of the new scale -> grid of the old one.
        vision_levels: the encoder's feature levels to see from now on, some of the old ones among them.

    Returns:
        What came from where; ``print`` shows it as a table.

    Raises:
        UserError: the old bridge cannot become the new one, the layout does not fit the feature map, or the encoder
            has no such level or cannot take the size. Nothing has changed then.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, encoder, bridge = model.config, model.model.vision_tower, model.model.multi_modal_projector
    old, side = bridge_settings(config.bridge_config), image_size or config.image_size
    new = _laid_out(old, layout)
    wanted = config.vision_levels if vision_levels is None else list(vision_levels)
    map_size, widths = _maps(encoder, side, wanted, new)
    numbers = None if vision_levels is None else level_numbers(encoder, side, config.vision_levels, wanted)
    born: list[Born] = []
    if new != old or (numbers and numbers[0] != numbers[1]):
        check_scaling(old, new, sources)
        grown = WindowedResampler(new, widths, bridge.proj.out_features).to(bridge.proj.weight)
        born = scale_bridge(bridge, grown, sources, numbers)
        bridge = grown.train(model.training)
    table, patches = _position_table(encoder), _patches(encoder, side)
    positions = (
        f"{table.side}x{table.side} -> {patches}x{patches}" if table and table.side != patches else "as they are"
    )
    tokens = config.num_image_tokens, new.visual_tokens(map_size)
    report = ScalingReport(tuple(born), tokens, (config.image_size, side), positions)
    model.model.multi_modal_projector = bridge
    resize_positions(encoder, side)
    config.bridge_config, config.vision_levels, config.level_widths = new.model_dump(), wanted, widths
    config.image_size, config.map_size = side, list(map_size)
    processor.num_image_tokens = config.num_image_tokens
    set_image_size(processor.image_processor, side, resize_mode(processor.image_processor))
    return report


def _maps(encoder: Any, side: int, levels: Sequence[int], bridge: Any) -> tuple[tuple[int, int], list[int]]:
    """Size of the first feature map, and the widths of all, of a image of so many pixels a side; errors as above."""
    _check_side(encoder, side)
    maps = probe(encoder, side, levels)
    map_size = maps[0].shape[1], maps[0].shape[2]
    for scale in bridge.scales.scales if hasattr(bridge, "scales") else ():
        window_bounds(min(map_size), scale.grid)  # a layout that does not fit the map fails here
    return map_size, [level.shape[3] for level in maps]


def scaled_processor(
    model: Any, processor: SparsightProcessor, layout: Any = None, image_size: int | None = None
) -> SparsightProcessor:
    """A copy of the processor, as `scale_tokens` would leave it; the model stays as it is. Arguments as there."""
    config, scaled = model.config, copy(processor)
    side, bridge = image_size or config.image_size, _laid_out(bridge_settings(config.bridge_config), layout)
    map_size, _ = _maps(model.model.vision_tower, side, config.vision_levels, bridge)
    scaled.image_processor = deepcopy(processor.image_processor)
    scaled.num_image_tokens = bridge.visual_tokens(map_size)
    set_image_size(scaled.image_processor, side, resize_mode(scaled.image_processor))
    return scaled


def _laid_out(old: Any, layout: Any) -> Any:
    """Settings of the new bridge; a layout alone takes its width and heads from the old one."""
    new = old if layout is None else bridge_settings(layout)
    if isinstance(layout, str) and isinstance(new, ChainOfSightConfig) and hasattr(old, "scales"):
        return ChainOfSightConfig.model_validate(old.model_dump(exclude={"kind", "tokens"}) | {"layout": new.layout})
    return new


# ------------------------------------------------------------------------------------- positions of the encoder


@dataclass(frozen=True)
class _Positions:
    """A table of learnt positions: its module, the name of the table in it, and its patches per side."""

    path: str
    module: Any
    name: str
    table: nn.Parameter
    side: int


def _position_table(encoder: nn.Module) -> _Positions | None:
    for path, module in encoder.named_modules():
        if not hasattr(module, "interpolate_pos_encoding"):
            continue
        for name in ("position_embedding", "position_embeddings"):
            held = getattr(module, name, None)
            table = held.weight if isinstance(held, nn.Embedding) else held
            if isinstance(table, nn.Parameter):
                name = f"{name}.weight" if isinstance(held, nn.Embedding) else name
                return _Positions(path, module, name, table, int(table.shape[-2] ** 0.5))
    return None


def _patches(encoder: nn.Module, side: int) -> int:
    patch: Any = getattr(encoder.config, "patch_size", None) or 1
    return side // (patch if isinstance(patch, int) else patch[0])


def _check_side(encoder: nn.Module, side: int) -> None:
    if side < 1 or _patches(encoder, side) < 1:
        raise UserError(
            f"image_size {side}: {type(encoder).__name__} cuts images into patches of "
            f"{getattr(encoder.config, 'patch_size', 1)} pixels, so it takes no smaller ones"
        )


@torch.no_grad()
def resize_positions(encoder: nn.Module, side: int) -> str | None:
    """Interpolate an encoder's learnt positions to images of ``side`` pixels, in place, by the encoder's own code.

    That code says whether it is antialiased; prefix tokens keep theirs. The encoder's outputs at that size do not
    change, since it would have interpolated at run time; but each place can now learn its own position.

    Returns:
        Name of the table that has changed, None where there is none or the size is the same.
    """
    found = _position_table(encoder)
    new = _patches(encoder, side)
    if found is None or found.side == new:
        return None
    prefix = found.table.shape[-2] - found.side**2
    # Only its shape is read.
    like = found.table.new_zeros(1, prefix + new**2, found.table.shape[-1])
    table = found.module.interpolate_pos_encoding(like, side, side)
    owner, _, leaf = found.name.rpartition(".")
    module = found.module.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(table.reshape(*found.table.shape[:-2], *table.shape[-2:]).clone()))
    getattr(module, leaf).requires_grad_(found.table.requires_grad)
    count = prefix + new**2
    if isinstance(module, nn.Embedding):
        module.num_embeddings = count
        found.module.register_buffer("position_ids", torch.arange(count, device=table.device)[None], persistent=False)
    for part in (found.module, getattr(found.module, "patch_embeddings", None)):  # what they were built with
        for key, value in {"num_patches": new**2, "num_positions": count, "image_size": side}.items():
            if hasattr(part, key):
                was = getattr(part, key)
                setattr(part, key, (side, side) if isinstance(was, tuple) else value)
    vision: Any = encoder.config
    vision.image_size = side
    return f"{found.path}.{found.name}".lstrip(".")


# ------------------------------------------------------------------------------------------- checkpoints on disk


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
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder")
    where = _tensor_files(folder)
    config = SparsightConfig.from_pretrained(folder)
    processor = SparsightProcessor.from_pretrained(folder, trust_remote_code=False)
    encoder = AutoModel.from_config(config.vision_config, trust_remote_code=False)
    bridge = build_bridge(config.bridge_config, config.level_widths, config.text_config.hidden_size)
    own = _read(folder, {name: where[name] for name in where if name.startswith(BRIDGE)})
    wanted = {BRIDGE + name for name in bridge.state_dict()}
    if wanted != own.keys():
        raise UserError(f"{folder} lacks {sorted(wanted - own.keys())[:3]} and has {sorted(own.keys() - wanted)[:3]}")
    bridge.load_state_dict({name.removeprefix(BRIDGE): tensor for name, tensor in own.items()}, assign=True)
    if (found := _position_table(encoder)) is not None:
        table = f"{found.path}.{found.name}".lstrip(".")
        before = found.table.data = _read(folder, {TOWER + table: where[TOWER + table]})[TOWER + table]
    with torch.device("meta"):
        model = SparsightForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = encoder, bridge
    report = scale_tokens(model, processor, layout, image_size, sources, vision_levels)
    config.vision_config = encoder.config
    removed: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    if (grown := model.model.multi_modal_projector) is not bridge:
        removed = own
        added = {BRIDGE + name: tensor for name, tensor in grown.state_dict().items()}
    if found is not None and (after := encoder.get_parameter(table)).shape != before.shape:
        removed = removed | {TOWER + table: before}
        added[TOWER + table] = after.detach()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)  # an error if it is there: then it is somebody's
    try:
        _write_files(folder, partial, where, removed, added)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _tensor_files(folder: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    check_files(folder)
    kind = model_type(folder)
    if kind != SparsightConfig.model_type:
        what = "no config.json" if kind is None else f"a model of type '{kind}'"
        raise UserError(f"{folder}: expected a model of Sparsight, found {what}")
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path.name)
    index = folder / "model.safetensors.index.json"
    wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    missing = sorted(wanted.keys() - where.keys())
    if missing or not where:
        lacks = f"{len(missing)} tensors, such as '{missing[0]}'" if missing else "any *.safetensors"
        raise UserError(f"{folder} is not complete: it lacks {lacks}")
    return where


def _read(folder: Path, where: Mapping[str, str]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(set(where.values())):
        with safe_open(folder / path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in where if where[name] == path}
    return tensors


def _write_files(
    folder: Path,
    out: Path,
    where: Mapping[str, str],
    removed: Mapping[str, torch.Tensor],
    added: Mapping[str, torch.Tensor],
) -> None:
    """Copy a checkpoint; shards that hold tensors which change are written anew, the others copied as they are."""
    # A tensor that only changes stays in its shard; one that is new goes where the first that goes was.
    home = where[min(removed)] if removed else ""
    place = {name: where.get(name, home) for name in added}
    index: dict[str, str] = {}
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        names = [name for name, file in where.items() if file == path.name]
        kept = {name: path.name for name in names if name not in removed}
        here = {name: tensor.contiguous() for name, tensor in added.items() if place[name] == path.name}
        index |= kept | dict.fromkeys(here, path.name)
        if len(kept) < len(names) or here:
            save_file(_read(folder, kept) | here, out / path.name, metadata={"format": "pt"})
        elif not any(fnmatch(path.name, pattern) for pattern in _TRAINING):
            shutil.copy2(path, out / path.name)
    assert index.keys() == (where.keys() - removed.keys()) | added.keys()
    file = folder / "model.safetensors.index.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        sizes = {"total_size": lambda t: t.numel() * t.element_size(), "total_parameters": torch.Tensor.numel}
        for key, size in sizes.items():
            if key in content["metadata"]:
                content["metadata"][key] += sum(map(size, added.values())) - sum(map(size, removed.values()))
        content["weight_map"] = dict(sorted(index.items()))
        (out / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
