"""Sizes of encoders, bridges and language models, from a configuration alone, and how many parameters they have.

Of encoders and language models, linear maps and tables count; norms and biases, 0.1% at real sizes, are left out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparsight.errors import UserError
from sparsight.settings.bridges import BridgeSettings, LinearConfig, WindowedSettings
from sparsight.settings.recipe import PretrainedLanguage, ScratchLanguage, Stage

Maps = list[tuple[int, int]]  # (in, out) of linear maps


@dataclass(frozen=True)
class Trains:
    """The parts that a step updates, and whether it recomputes activations (gradient checkpointing)."""

    vision: bool = False
    bridge: bool = True
    language: bool = True
    lora_rank: int = 0
    recompute: bool = False

    @classmethod
    def of(cls, stage: Stage) -> Trains:
        """The parts that a stage of a recipe updates."""
        rates, rank = stage.learning_rate.parts(), stage.lora.rank if stage.lora else 0
        return cls("vision" in rates, "bridge" in rates, "language" in rates, rank, stage.gradient_checkpointing)

    @property
    def flows_back(self) -> bool:
        """Whether a gradient goes through the language model."""
        return self.vision or self.bridge or self.language


# Our sizes, and their names in configurations of transformers: the first that is there counts.
_NAMES = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "vocabulary": ("vocab_size",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active_experts": ("num_experts_per_tok", "num_experts_per_token"),
    "expert": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_expert": ("shared_expert_intermediate_size",),
    "shared_experts": ("n_shared_experts",),
}
_NEEDED = ("layers", "hidden", "heads", "vocabulary")


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a decoder-only language model.

    ``intermediate``: that of all experts that a token goes through; ``stored``: of all that there are, if that is more;
    ``weight_bytes``: of one weight while it is frozen; ``packed_bytes``: of one in the layers, if they are quantised.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    weight_bytes: int = 4
    stored: int = 0
    packed_bytes: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> LanguageShape:
        """Read a transformers text config. All layers are taken to have the same experts, and those that every token
        shares.

        Raises:
            UserError: it lacks a size.
        """
        size = {
            ours: next((size for name in names if isinstance(size := getattr(config, name, None), int) and size), 0)
            for ours, names in _NAMES.items()
        }
        if lacks := [_NAMES[ours][0] for ours in _NEEDED if not size[ours]]:
            raise UserError(f"a language model's config.json lacks {lacks}; found {sorted(vars(config))}")
        hidden, heads = size["hidden"], size["heads"]
        intermediate, stored = size["intermediate"] or 4 * hidden, 0
        if size["experts"] > 1:
            width = size["expert"] or intermediate
            shared = size["shared_expert"] or width * size["shared_experts"]
            intermediate, stored = (shared + width * (size[of] or 1) for of in ("active_experts", "experts"))
        act = getattr(config, "hidden_act", "")
        return cls(
            size["layers"],
            hidden,
            heads,
            size["kv_heads"] or heads,
            size["head_dim"] or hidden // heads,
            intermediate,
            size["vocabulary"],
            gated=hasattr(config, "rms_norm_eps") or act in ("silu", "swish"),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            weight_bytes=_weight_bytes(getattr(config, "dtype", None) or vars(config).get("torch_dtype")),
            stored=stored,
        )

    def attention_maps(self) -> Maps:
        """Queries, keys, values, output of a layer."""
        attention, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(self.hidden, attention), *[(self.hidden, key_value)] * 2, (attention, self.hidden)]

    def mlp_maps(self) -> Maps:
        return [(self.hidden, self.intermediate)] * (1 + self.gated) + [(self.intermediate, self.hidden)]

    def linear_maps(self) -> Maps:
        """All linear maps of a layer."""
        return self.attention_maps() + self.mlp_maps()

    @property
    def parameters(self) -> int:
        layer = sum(a * b for a, b in self.linear_maps())
        layer += max(0, self.stored - self.intermediate) * self.hidden * (2 + self.gated)
        return self.layers * layer + self._tables

    @property
    def _tables(self) -> int:
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def unpacked(self) -> int:
        """Parameters that are not quantised."""
        return self._tables if self.packed_bytes else self.parameters

    @property
    def frozen_bytes(self) -> float:
        """Of all weights while they are frozen."""
        return self.unpacked * self.weight_bytes + (self.parameters - self.unpacked) * self.packed_bytes

    def lora_parameters(self, rank: int) -> int:
        return self.layers * rank * sum(a + b for a, b in self.linear_maps())


def tell_if_cut(encoder: str, side: int, patch: int, own: Any) -> None:
    """Warn where patches do not divide an image, unless the encoder was made for that size: the rest is not seen."""
    if (rest := side % patch) and side != own:
        warnings.warn(
            f"image_size {side}: {encoder} cuts images into patches of {patch} px, so {rest} px at the right and at "
            f"the bottom are not seen; the nearest sizes are {side - rest} and {side - rest + patch}",
            stacklevel=2,
        )


def pick_levels(count: int, maps: bool, levels: Sequence[int] | None, name: str) -> list[int]:
    """Feature levels as indices from 0, of ``count`` states: see ``encoders.feature_levels``.

    Raises:
        UserError: there is no such level.
    """
    depth = count - 1
    if levels is None:
        return sorted({max(depth - 1, 0), depth} if maps else {max(1, 2 * depth // 3), max(1, depth - 1)})
    wrong = [level for level in levels if not -count <= level < count]
    if wrong:
        raise UserError(f"{name} has no feature level {wrong}: it has 0 to {depth}")
    return [level % count for level in levels]


# Families of ViT: the patch size where a config.json has none, and the tokens before the patches.
_VITS = {"clip_vision_model": (32, 1), "siglip_vision_model": (16, 0), "dinov2": (14, 1), "vit": (16, 1)}


@dataclass(frozen=True)
class VitShape:
    """Sizes of a ViT (CLIP, SigLIP, DINOv2, ViT)."""

    kind: str
    layers: int
    hidden: int
    intermediate: int
    patch: int
    image_size: int
    gated: bool = False
    weight_bytes: int = 4

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return _VITS[self.kind][1]

    def map_size(self, side: int) -> tuple[int, int]:
        return side // self.patch, side // self.patch

    def level_widths(self, levels: Sequence[int] | None) -> list[int]:
        return [self.hidden] * len(pick_levels(self.layers + 1, False, levels, self.kind))

    def _maps(self) -> tuple[Maps, Maps]:
        """Linear maps of a block's attention and MLP."""
        mlp = [(self.hidden, self.intermediate)] * (1 + self.gated) + [(self.intermediate, self.hidden)]
        return [(self.hidden, self.hidden)] * 4, mlp

    @property
    def parameters(self) -> int:
        h, patches = self.hidden, (self.image_size // self.patch) ** 2
        block = sum(a * b for maps in self._maps() for a, b in maps)
        return self.layers * block + (3 * self.patch**2 + patches) * h + h * h * (self.kind == "vit")

    def flops(self, side: int, levels: Sequence[int] | None, trains: Trains) -> float:
        """Executed FLOPs of one image, up to the last feature level: forward and, if it trains, backward."""
        h, patches = self.hidden, (side // self.patch) ** 2
        tokens = patches + self.prefix
        attention, mlp = (2 * sum(a * b for a, b in maps) for maps in self._maps())
        block = tokens * (attention + mlp) + 4 * tokens**2 * h
        pixels = 2 * patches * 3 * self.patch**2 * h
        again = (block - 2 * tokens * self.intermediate * h) * trains.recompute
        last = max(pick_levels(self.layers + 1, False, levels, self.kind))
        return float(last * (block + trains.vision * (2 * block + again)) + pixels * (1 + trains.vision))


# Expansion, kernel, stride, repeats, channels out (EfficientNet-lite0).
LITE0 = (
    (1, 3, 1, 1, 16),
    (6, 3, 2, 2, 24),
    (6, 5, 2, 2, 40),
    (6, 3, 2, 3, 80),
    (6, 5, 1, 3, 112),
    (6, 5, 2, 4, 192),
    (6, 3, 1, 1, 320),
)


@dataclass(frozen=True)
class LiteShape:
    """Sizes of EfficientNet-lite0, whose blocks ``out_blocks`` are the feature levels."""

    out_blocks: tuple[int, ...] = (10, 15)
    image_size: int = 256
    weight_bytes: int = 4

    def _blocks(self, side: int) -> list[tuple[int, int, int, int]]:
        """(parameters, FLOPs of one image, channels out, side of its map) of each block that runs."""
        blocks, inside, side = [], 32, -(-side // 2)
        for expansion, kernel, stride, repeats, outside in LITE0:
            for repeat in range(repeats):
                middle, grows = inside * expansion, expansion > 1
                flops = 2 * inside * middle * side**2 * grows
                side = side if repeat else -(-side // stride)
                flops += 2 * (kernel**2 + outside) * middle * side**2
                parameters = (inside + 2) * middle * grows + (kernel**2 + 2) * middle + (middle + 2) * outside
                blocks.append((parameters, flops, outside, side))
                inside = outside
        return blocks[: max(self.out_blocks) + 1]

    def _levels(self, levels: Sequence[int] | None) -> list[int]:
        picked = pick_levels(len(self.out_blocks), True, levels, "efficientnet-lite0")
        return [self.out_blocks[level] for level in picked]

    def map_size(self, side: int) -> tuple[int, int]:
        side = self._blocks(side)[min(self.out_blocks)][3]
        return side, side

    def level_widths(self, levels: Sequence[int] | None) -> list[int]:
        blocks = self._blocks(self.image_size)
        return [blocks[block][2] for block in self._levels(levels)]

    @property
    def parameters(self) -> int:
        return 29 * 32 + sum(parameters for parameters, *_ in self._blocks(self.image_size))

    def flops(self, side: int, levels: Sequence[int] | None, trains: Trains) -> float:
        """Executed FLOPs of one image, forward and, up to the last feature level, backward."""
        stem, used = 2 * 27 * 32 * (-(-side // 2)) ** 2, max(self._levels(levels))
        blocks = enumerate(self._blocks(side))
        total = sum(flops * (3 if trains.vision and number <= used else 1) for number, (_, flops, *_) in blocks)
        return float(total + stem * (1 + trains.vision))


EncoderShape = VitShape | LiteShape


# Configurations of known models, by part and name.
KNOWN: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("known.json").read_text())


def _read(name: str, part: str) -> dict[str, Any]:
    """The configuration that a known name or a local folder stands for."""
    if found := KNOWN[part].get(name.lower()):
        return found
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise UserError(
            f"{part} '{name}': its sizes are not known here. Expected a local folder with a config.json, or one of "
            + ", ".join(KNOWN[part])
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    return values.get("vision_config" if part == "vision" else "text_config", values)


# Bytes of a quantised weight: 4 bits and an fp32 scale for every 64, or 8 bits (a scale for each row is nothing).
_PACKED = {"none": 0.0, "nf4": 0.5 + 4 / 64, "int8": 1.0}


def language_shape(language: str | PretrainedLanguage | ScratchLanguage, layers: int | None = None) -> LanguageShape:
    """Sizes of a language model by its name, its local folder, or its settings; ``layers``: the first ones alone.

    Raises:
        UserError: the name is unknown, or the configuration lacks sizes; the message says which.
    """
    if isinstance(language, ScratchLanguage):
        s, head_dim = language, language.hidden // language.heads
        sizes = (s.layers, s.hidden, s.heads, s.heads, head_dim, s.intermediate, s.vocabulary)
        shape = LanguageShape(*sizes)  # a Qwen3
    else:
        named = PretrainedLanguage(path=language) if isinstance(language, str) else language
        shape = LanguageShape.from_config(SimpleNamespace(**_read(named.path, "language")))
        if packed := _PACKED[named.quantization]:  # all else is then loaded in bf16
            shape = replace(shape, packed_bytes=packed, weight_bytes=2)
    return shape if layers is None else replace(shape, layers=min(layers, shape.layers))


def encoder_shape(name: str) -> EncoderShape:
    """Sizes of a vision encoder by its name or its local folder.

    Raises:
        UserError: the name is unknown, or there is no closed form for its family.
    """
    values = _read(name, "vision")
    kind = values.get("model_type", "")
    if kind == "sparsight_efficientnet_lite":
        return LiteShape(tuple(values.get("out_blocks", (10, 15))), values.get("image_size", 256))
    if kind not in _VITS:
        raise UserError(
            f"vision '{name}': an encoder of type '{kind}' has no closed form here, only {', '.join(_VITS)} and "
            "efficientnet-lite0 have. Runs count it on the real modules: train a few steps and read run.jsonl"
        )
    # Keys that a config.json leaves out have transformers' defaults.
    hidden = values.get("hidden_size", 768)
    intermediate = values.get("intermediate_size") or int(hidden * values.get("mlp_ratio", 4))
    if gated := bool(values.get("use_swiglu_ffn")):
        intermediate = (int(intermediate * 2 / 3) + 7) // 8 * 8
    return VitShape(
        kind,
        values.get("num_hidden_layers", 12),
        hidden,
        intermediate,
        values.get("patch_size", _VITS[kind][0]),
        values.get("image_size", 224),
        gated,
        _weight_bytes(values.get("dtype") or values.get("torch_dtype")),
    )


def _weight_bytes(dtype: Any) -> int:
    """Of a frozen weight that is stored so: bf16 stays, all else is held in fp32."""
    return 2 if "bfloat16" in str(dtype) else 4


def bridge_parameters(bridge: BridgeSettings, level_widths: Sequence[int], out_width: int) -> int:
    """Parameters of a bridge."""
    if not isinstance(bridge, WindowedSettings):
        width = sum(level_widths) * getattr(bridge, "factor", 1) ** 2
        second = 0 if isinstance(bridge, LinearConfig) else out_width * out_width + out_width
        return 2 * width + width * out_width + out_width + second
    d, hidden, scales = bridge.width, int(bridge.width * bridge.mlp_ratio), bridge.scales.scales
    blocks = sum(
        2 * d * d + 2 * d * hidden + 2 * level * (d + 1) + 6 * d + hidden for level in list(level_widths) * bridge.depth
    )
    shared = getattr(bridge, "shared_queries", False)
    queries = sum((scale.queries if shared else scale.tokens) * d for scale in scales)
    return len(scales) * blocks + queries + 2 * d + d * out_width + out_width
