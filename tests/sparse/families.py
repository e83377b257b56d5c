"""Tiny models of image-text families of transformers, with random weights, and batches that fit them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.compress import compress_batch
from sparsight.sparse.gather import gather_inputs
from tiny import make_vlm

IMAGE, WORDS, SIDE, PATCH = 3, 60, 32, 8
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS + 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
NATIVE = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "in_channels": 3}


def _llava(vision: str, text: str) -> Any:
    parts = {"vision_config": VISION | {"model_type": vision}, "text_config": TEXT | {"model_type": text}}
    strategy = "default" if vision == "clip_vision_model" else "full"
    return LlavaConfig(**parts, image_token_id=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy=strategy)


def _next_video() -> Any:
    return LlavaNextVideoConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "llama"},
        image_token_id=IMAGE,
        video_token_id=WORDS + 3,
        image_grid_pinpoints=[[SIDE, SIDE]],
        image_seq_length=16,
    )


def _onevision() -> Any:
    return LlavaOnevisionConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=WORDS + 3,
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
    )


def _qwen(cls: Any, vision: dict[str, Any]) -> Any:
    tokens = {"image_token_id": IMAGE, "video_token_id": WORDS + 3, "vision_start_token_id": WORDS + 2}
    text = TEXT | {"rope_parameters": MROPE, "head_dim": 8}
    return cls(text_config=text, vision_config=NATIVE | vision, **tokens, vision_end_token_id=WORDS + 1)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llava, clip + llama": lambda: _llava("clip_vision_model", "llama"),
    "llava, siglip + qwen2": lambda: _llava("siglip_vision_model", "qwen2"),
    "llava_onevision": _onevision,
    "llava_next_video": _next_video,
    "smolvlm": lambda: SmolVLMConfig(
        vision_config=VISION, text_config=TEXT | {"model_type": "llama"}, image_token_id=IMAGE, scale_factor=2
    ),
    "idefics3": lambda: Idefics3Config(
        vision_config=VISION, text_config=TEXT | {"model_type": "llama"}, image_token_id=IMAGE, scale_factor=2
    ),
    "qwen2_vl": lambda: _qwen(Qwen2VLConfig, {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": lambda: _qwen(
        Qwen2_5_VLConfig,
        {
            "hidden_size": 24,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": lambda: _qwen(
        Qwen3VLConfig,
        {
            "hidden_size": 24,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
    "internvl": lambda: InternVLConfig(
        vision_config=VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=IMAGE,
    ),
    "paligemma": lambda: PaliGemmaConfig(
        vision_config=VISION | {"projection_dim": 32, "vision_use_head": False},
        text_config=TEXT | {"model_type": "gemma", "head_dim": 8},
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
}
FAMILIES = [*CONFIGS, "sparsight"]
TILED = ("llava_onevision", "llava_next_video")


def made(name: str) -> Any:
    """A model in training mode; attention "eager", so that FLOPs can be counted and masks are exact."""
    if name == "sparsight":
        ours = make_vlm("1:16", vision_levels=[2])[0].train()
        ours.model.language_model.set_attn_implementation("eager")
        return ours
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[name](), attn_implementation="eager")
    with torch.no_grad():  # start values of 0.02 would make all layers nearly nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.train()


def tokens_of_an_image(name: str) -> int:
    return {"smolvlm": 4, "idefics3": 4, "qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "internvl": 4}.get(name, 16)


def batch_of(name: str, model: Any, images: tuple[int, ...] = (1, 1), seed: int = 0) -> dict[str, Any]:
    """Samples with so many images each, and words around them; those at the end are learnt."""
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_token_id if name == "sparsight" else IMAGE
    # One tile, the whole image, and an end of line for each row.
    count = 36 if name in TILED else tokens_of_an_image(name)
    rows, labels = [], []
    for number in images:
        row: list[int] = []
        for _ in range(number):
            row += [*torch.randint(4, WORDS, (2,), generator=generator).tolist(), *[image] * count]
        words = torch.randint(4, WORDS, (6,), generator=generator).tolist()
        labels.append([-100] * (len(row) + 2) + words[2:])
        rows.append(row + words)
    longest = max(map(len, rows))
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([label + [-100] * (longest - len(label)) for label in labels]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
    total = sum(images)
    if total:
        batch |= _pixels(name, total, generator)
    if name == "paligemma":
        batch["token_type_ids"] = (batch["labels"] != -100).long()
    if name.startswith("qwen") and "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # from 5.3 on
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return batch


def _pixels(name: str, images: int, generator: torch.Generator) -> dict[str, Any]:
    if name.startswith("qwen"):
        rows = images * (SIDE // PATCH) ** 2
        grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * images)
        return {"pixel_values": torch.randn(rows, 3 * 2 * PATCH * PATCH, generator=generator), "image_grid_thw": grid}
    side = 64 if name == "sparsight" else SIDE
    pixels = torch.randn(images, 3, side, side, generator=generator)
    if name in TILED:
        return {
            "pixel_values": pixels[:, None].repeat(1, 2, 1, 1, 1),
            "image_sizes": torch.tensor([[SIDE, SIDE]] * images),
        }
    return {"pixel_values": pixels[:, None] if name in ("smolvlm", "idefics3") else pixels}


def masked_reference(
    model: Any, batch: dict[str, Any], method: str, monkeypatch: Any, share: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the short pass, those of the full model where dropped positions are hidden from every other one and
    kept ones hold what they stand for, and which positions were kept."""
    batch = {key: value for key, value in batch.items() if key != "labels"}
    handle = attach(model, CompressorConfig(keep=share, method=method), train_only=False)
    seen = {}

    def spy(kwargs, kept, keep_BT, *options):
        seen.update(keep=keep_BT)
        return gather_inputs(kwargs, kept, keep_BT, *options)

    def compressed(*args, **options):
        found = compress_batch(*args, **options)
        seen.update(embeds=found[0])
        return found

    monkeypatch.setattr("sparsight.sparse.forward.compress_batch", compressed)
    monkeypatch.setattr("sparsight.sparse.forward.gather_inputs", spy)
    with torch.no_grad():
        short = model(**batch).logits
    handle.detach()
    keep = seen["keep"]
    assert keep.sum() < batch["attention_mask"].sum()

    def hide(plain, *args, **kwargs):
        mask = kwargs["attention_mask"]
        if method in ("pool", "merge"):
            kwargs["inputs_embeds"] = seen["embeds"]
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            kwargs["attention_mask"] = mask * keep
        else:
            hidden = ~keep[:, None, None] & ~torch.eye(keep.shape[1], dtype=torch.bool)
            masks = mask if isinstance(mask, dict) else {"": mask}
            masks = {
                key: m.masked_fill(hidden, False if m.dtype == torch.bool else torch.finfo(m.dtype).min)
                for key, m in masks.items()
            }
            kwargs["attention_mask"] = masks if isinstance(mask, dict) else masks[""]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(keep.shape[1])[None]
        return plain(*args, **kwargs)

    decoder = model.get_decoder()
    plain = decoder.forward
    decoder.forward = lambda *args, **kwargs: hide(plain, *args, **kwargs)
    with torch.no_grad():
        full = model(**batch).logits
    decoder.forward = plain
    return short, full, keep
