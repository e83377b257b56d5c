"""Sizes of encoders, bridges and language models, from a configuration alone, and how many parameters they have."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparsight.errors import UserError
from sparsight.settings.bridges import bridge_settings
from sparsight.settings.recipe import ScratchLanguage, Stage

Maps = list[tuple[int, int]]  # (in, out) of linear maps


@dataclass(frozen=True)
class Trains:
    """What a step updates, and whether it recomputes activations (gradient checkpointing) in place of keeping them."""

    vision: bool = False
    bridge: bool = True
    language: bool = True
    lora_rank: int = 0
    recompute: bool = False

    @classmethod
    def of(cls, stage: Stage) -> Trains:
        """What a stage of a recipe updates."""
        rates, rank = stage.learning_rate.parts(), stage.lora.rank if stage.lora else 0
        return cls("vision" in rates, "bridge" in rates, "language" in rates, rank, stage.gradient_checkpointing)

    @property
    def flows_back(self) -> bool:
        """Whether a gradient goes through the language model."""
        return self.vision or self.bridge or self.language


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a decoder-only language model.

    ``intermediate``: that of all experts that a token goes through; ``stored``: of all that there are, if that is more;
    ``layer_vectors``: norms, biases and experts' router of a layer; ``other``: parameters that are neither in layers
    nor in a table of the vocabulary; ``weight_bytes``: of one weight while it is frozen.
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
    layer_vectors: int = 0
    other: int = 0
    weight_bytes: int = 4
    stored: int = 0

    @classmethod
    def from_config(cls, config: Any) -> LanguageShape:
        """Read a transformers text config; names differ between families. Of experts, all layers are taken to have
        the same, and those that every token shares."""
        heads = config.num_attention_heads
        hidden = config.hidden_size
        named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        intermediate = next((size for size in named if size), 4 * hidden)
        rms = hasattr(config, "rms_norm_eps")
        experts, stored = _first(config, "num_local_experts", "num_experts", "n_routed_experts"), 0
        if experts > 1:
            width = _first(config, "moe_intermediate_size", "expert_ffn_hidden_size") or intermediate
            shared = _first(config, "shared_expert_intermediate_size") or width * _first(config, "n_shared_experts")
            stored = shared + width * experts
            intermediate = shared + width * max(1, _first(config, "num_experts_per_tok", "num_experts_per_token"))
        shape = cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            intermediate=intermediate,
            vocabulary=config.vocab_size,
            gated=rms or getattr(config, "hidden_act", "") in ("silu", "swish"),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            weight_bytes=_weight_bytes(getattr(config, "dtype", None) or vars(config).get("torch_dtype")),
        )
        vectors, family = 2 * hidden, getattr(config, "model_type", "")
        if family.startswith("gemma") and family != "gemma":
            vectors += 2 * hidden
        if family.startswith(("qwen3", "gemma3")):
            vectors += 2 * shape.head_dim
        if family.startswith("qwen2"):
            vectors += (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        if not rms:  # LayerNorm, and mostly a bias with every map
            vectors += 2 * hidden + sum(outside for _, outside in shape.linear_maps())
        vectors += hidden * experts if stored else 0
        rest = {"layer_vectors": vectors, "other": hidden * (1 if rms else 2), "stored": stored}
        return cls(**{**shape.__dict__, **rest})

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
        """All of them; exact for models with RMSNorm, nearly so for others."""
        layer = sum(a * b for a, b in self.linear_maps()) + self.layer_vectors
        layer += max(0, self.stored - self.intermediate) * self.hidden * (2 + self.gated)
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden + self.other

    def lora_parameters(self, rank: int) -> int:
        return self.layers * rank * sum(a + b for a, b in self.linear_maps())


def _first(config: Any, *names: str) -> int:
    """The first of these numbers that a config has; 0 without any."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), 0)


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


@dataclass(frozen=True)
class VitShape:
    """Sizes of a ViT (CLIP, SigLIP, DINOv2, ViT). ``prefix``: tokens before the patches."""

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch: int
    image_size: int
    prefix: int
    gated: bool = False
    pooling: bool = True
    weight_bytes: int = 4

    def map_size(self, side: int) -> tuple[int, int]:
        return side // self.patch, side // self.patch

    def level_widths(self, levels: Sequence[int] | None) -> list[int]:
        return [self.hidden] * len(pick_levels(self.layers + 1, False, levels, self.family))

    def block_maps(self) -> Maps:
        return [(self.hidden, self.hidden)] * 4 + self._mlp()

    def _mlp(self) -> Maps:
        return [(self.hidden, self.intermediate)] * (1 + self.gated) + [(self.intermediate, self.hidden)]

    @property
    def parameters(self) -> int:
        h = self.hidden
        block = sum(a * b + b for a, b in self.block_maps()) + 4 * h
        pixels = 3 * self.patch**2 * h + (0 if self.family == "clip" else h)
        places = (self.image_size // self.patch) ** 2 * h
        rest = {
            "clip": 5 * h + h,  # class token and its place, norms before and behind
            "siglip": 2 * h,
            "vit": 4 * h,  # class token and its place, norm
            "dinov2": 5 * h,  # and a mask token
        }[self.family]
        if self.family == "dinov2":
            block += 2 * h  # scales of the residuals
        if self.pooling and self.family == "siglip":
            rest += h + 4 * (h * h + h) + 2 * h + sum(a * b + b for a, b in self._mlp())
        if self.pooling and self.family == "vit":
            rest += h * h + h
        return self.layers * block + pixels + places + rest

    def flops(self, side: int, levels: Sequence[int] | None, trains: Trains) -> float:
        """Executed FLOPs of one image, forward and, below the last feature level, backward."""
        patches = (side // self.patch) ** 2
        tokens, h = patches + self.prefix, self.hidden
        linear = 2 * tokens * sum(a * b for a, b in self.block_maps())
        scores = 4 * tokens**2 * h
        pixels = 2 * patches * 3 * self.patch**2 * h
        total = self.layers * (linear + scores) + pixels
        if self.pooling and self.family == "siglip":
            total += 2 * (2 * h * h * (tokens + 1) + sum(a * b for a, b in self._mlp())) + 4 * tokens * h
        if self.pooling and self.family == "vit":
            total += 2 * h * h
        if trains.vision:
            used = max(pick_levels(self.layers + 1, False, levels, self.family))
            again = linear + scores - 2 * tokens * self.intermediate * h if trains.recompute else 0
            total += used * (2 * (linear + scores) + again) + pixels
        return float(total)


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

    def _blocks(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Channels in, in the middle, out; kernel, stride."""
        inside = 32
        for expand, kernel, stride, repeats, outside in LITE0:
            for repeat in range(repeats):
                yield inside, inside * expand, outside, kernel, 1 if repeat else stride
                inside = outside

    def _levels(self, levels: Sequence[int] | None) -> list[int]:
        picked = pick_levels(len(self.out_blocks), True, levels, "efficientnet-lite0")
        return [self.out_blocks[level] for level in picked]

    def map_size(self, side: int) -> tuple[int, int]:
        side = -(-side // 2)
        for number, (*_, stride) in enumerate(self._blocks()):
            side = -(-side // stride)
            if number == min(self.out_blocks):
                break
        return side, side

    def level_widths(self, levels: Sequence[int] | None) -> list[int]:
        outside = [out for _, _, out, _, _ in self._blocks()]
        return [outside[block] for block in self._levels(levels)]

    @property
    def parameters(self) -> int:
        total = 27 * 32 + 2 * 32
        for inside, middle, outside, kernel, _ in list(self._blocks())[: max(self.out_blocks) + 1]:
            expand = inside * middle + 2 * middle if middle > inside else 0
            total += expand + (kernel**2 + 2) * middle + middle * outside + 2 * outside
        return total

    def flops(self, side: int, levels: Sequence[int] | None, trains: Trains) -> float:
        """Executed FLOPs of one image, forward and backward."""
        side = -(-side // 2)
        stem = total = 2 * 27 * 32 * side**2
        used = max(self._levels(levels))
        for number, (inside, middle, outside, kernel, stride) in enumerate(self._blocks()):
            if number > max(self.out_blocks):
                break
            expand = inside * middle * side**2 if middle > inside else 0
            side = -(-side // stride)
            block = 2 * (expand + (kernel**2 + outside) * middle * side**2)
            total += block * (3 if trains.vision and number <= used else 1)
        return float(total + stem * trains.vision)


EncoderShape = VitShape | LiteShape

_VIT = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "image_size": 224}
# What a config.json leaves out: the defaults of transformers, prefix tokens, and how the family is called here.
_VITS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"family": "clip", "patch_size": 32, "prefix": 1},
    "siglip_vision_model": {"family": "siglip", "patch_size": 16, "prefix": 0},
    "dinov2": {"family": "dinov2", "patch_size": 14, "prefix": 1},
    "vit": {"family": "vit", "patch_size": 16, "prefix": 1},
}


def _vit(kind: str, layers: int, hidden: int, heads: int, intermediate: int, patch: int, side: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "image_size": side}
    return sizes | {"model_type": kind, "intermediate_size": intermediate, "patch_size": patch}


ENCODERS: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {"model_type": "sparsight_efficientnet_lite"},
    "clip-b-32": _vit("clip_vision_model", 12, 768, 12, 3072, 32, 224),
    "clip-b-16": _vit("clip_vision_model", 12, 768, 12, 3072, 16, 224),
    "clip-l-14": _vit("clip_vision_model", 24, 1024, 16, 4096, 14, 224),
    "clip-l-14-336": _vit("clip_vision_model", 24, 1024, 16, 4096, 14, 336),
    "siglip-b-16": _vit("siglip_vision_model", 12, 768, 12, 3072, 16, 224),
    "siglip-so400m": _vit("siglip_vision_model", 27, 1152, 16, 4304, 14, 384),
    "dinov2-b": _vit("dinov2", 12, 768, 12, 3072, 14, 518),
    "dinov2-l": _vit("dinov2", 24, 1024, 16, 4096, 14, 518),
    "vit-b-16": _vit("vit", 12, 768, 12, 3072, 16, 224),
}


def _lm(
    kind: str, layers: int, hidden: int, heads: int, kv: int, intermediate: int, vocabulary: int, **extra: Any
) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv, "intermediate_size": intermediate, "vocab_size": vocabulary}
    return {"model_type": kind, "rms_norm_eps": 1e-6, "dtype": "bfloat16"} | sizes | extra


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_QWEN3: dict[str, Any] = {"head_dim": 128}
_LLAMA_2_7B = _lm("llama", 32, 4096, 32, 32, 11008, 32000)
_LLAMA_2_13B = _lm("llama", 40, 5120, 40, 40, 13824, 32000)
LANGUAGES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _lm("llama", 30, 576, 9, 3, 1536, 49152, **_TIED, dtype="float32"),
    "smollm2-360m": _lm("llama", 32, 960, 15, 5, 2560, 49152, **_TIED),
    "smollm2-1.7b": _lm("llama", 24, 2048, 32, 32, 8192, 49152, **_TIED),
    "llama-2-7b": _LLAMA_2_7B,
    "llama-2-13b": _LLAMA_2_13B,
    "vicuna-7b": _LLAMA_2_7B,
    "vicuna-13b": _LLAMA_2_13B,
    "llama-3-8b": _lm("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3.2-1b": _lm("llama", 16, 2048, 32, 8, 8192, 128256, **_TIED),
    "llama-3.2-3b": _lm("llama", 28, 3072, 24, 8, 8192, 128256, **_TIED),
    "mistral-7b": _lm("mistral", 32, 4096, 32, 8, 14336, 32000),
    "qwen2.5-0.5b": _lm("qwen2", 24, 896, 14, 2, 4864, 151936, **_TIED),
    "qwen2.5-1.5b": _lm("qwen2", 28, 1536, 12, 2, 8960, 151936, **_TIED),
    "qwen2.5-3b": _lm("qwen2", 36, 2048, 16, 2, 11008, 151936, **_TIED),
    "qwen2.5-7b": _lm("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen3-0.6b": _lm("qwen3", 28, 1024, 16, 8, 3072, 151936, **_TIED, **_QWEN3),
    "qwen3-1.7b": _lm("qwen3", 28, 2048, 16, 8, 6144, 151936, **_TIED, **_QWEN3),
    "qwen3-4b": _lm("qwen3", 36, 2560, 32, 8, 9728, 151936, **_TIED, **_QWEN3),
    "qwen3-8b": _lm("qwen3", 36, 4096, 32, 8, 12288, 151936, **_QWEN3),
}


def _read(name: str, known: Mapping[str, dict[str, Any]], part: str) -> dict[str, Any]:
    """The configuration that a name of the table or a local folder stands for.

    Raises:
        UserError: it is neither.
    """
    if name.lower() in known:
        return known[name.lower()]
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise UserError(
            f"{part} '{name}': its sizes are not known here. Expected a local folder with a config.json, or one of "
            + ", ".join(known)
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    return values.get(f"{part}_config", values) if part == "vision" else values.get("text_config", values)


def language_shape(language: str | ScratchLanguage, layers: int | None = None) -> LanguageShape:
    """Sizes of a language model by its name, its local folder, or its settings. Weights are not looked at.

    Raises:
        UserError: the name is unknown, or the configuration lacks sizes; the message says which.
    """
    if isinstance(language, ScratchLanguage):
        s = language
        values = _lm("qwen3", s.layers, s.hidden, s.heads, s.heads, s.intermediate, s.vocabulary)
        values |= {"head_dim": s.hidden // s.heads, "dtype": "float32"}
    else:
        values = _read(language, LANGUAGES, "language")
    if layers is not None:
        values = values | {"num_hidden_layers": min(layers, values.get("num_hidden_layers", layers))}
    try:
        return LanguageShape.from_config(SimpleNamespace(**values))
    except AttributeError as error:
        raise UserError(
            f"language '{language}': its config.json lacks '{error.name}', found {sorted(values)}"
        ) from None


def encoder_shape(name: str) -> EncoderShape:
    """Sizes of a vision encoder by its name or its local folder.

    Raises:
        UserError: the name is unknown, or there is no closed form for its family.
    """
    values = _read(name, ENCODERS, "vision")
    kind = values.get("model_type", "")
    if kind == "sparsight_efficientnet_lite":
        return LiteShape(tuple(values.get("out_blocks", (10, 15))), values.get("image_size", 256))
    if kind not in _VITS:
        raise UserError(
            f"vision '{name}': an encoder of type '{kind}' has no closed form here, only {', '.join(_VITS)} and "
            "efficientnet-lite0 have. Runs count it on the real modules: train a few steps and read run.jsonl"
        )
    values = _VIT | _VITS[kind] | values
    hidden = values["hidden_size"]
    intermediate = values.get("intermediate_size") or int(hidden * values.get("mlp_ratio", 4))
    if gated := bool(values.get("use_swiglu_ffn")):
        intermediate = (int(intermediate * 2 / 3) + 7) // 8 * 8
    return VitShape(
        values["family"],
        values["num_hidden_layers"],
        hidden,
        values["num_attention_heads"],
        intermediate,
        values["patch_size"],
        values["image_size"],
        values["prefix"],
        gated,
        values.get("vision_use_head", True),
        _weight_bytes(values.get("dtype") or values.get("torch_dtype")),
    )


def _weight_bytes(dtype: Any) -> int:
    """Of a weight stored so: bf16 stays, all else trains and rests in fp32."""
    return 2 if "bfloat16" in str(dtype) else 4


def bridge_parameters(settings: Any, level_widths: Sequence[int], out_width: int) -> int:
    """Parameters of a bridge."""
    bridge = bridge_settings(settings)
    if bridge.kind not in ("resampler", "chain_of_sight"):
        width = sum(level_widths) * getattr(bridge, "factor", 1) ** 2
        second = 0 if bridge.kind == "linear" else out_width * out_width + out_width
        return 2 * width + width * out_width + out_width + second
    d, hidden = bridge.width, int(bridge.width * bridge.mlp_ratio)
    blocks = sum(
        2 * d + 2 * level + d * d + 2 * level * d + d * d + d + 2 * d + 2 * d * hidden + hidden + d
        for level in list(level_widths) * bridge.depth
    )
    shared = getattr(bridge, "shared_queries", False)
    queries = sum((scale.queries if shared else scale.tokens) * d for scale in bridge.scales.scales)
    return len(bridge.scales.scales) * blocks + queries + 2 * d + d * out_width + out_width
