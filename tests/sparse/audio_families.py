"""Tiny models of families of transformers that hear, with random weights, and batches that fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from families import MROPE, NATIVE, TEXT, WORDS
from torch import nn

AUDIO, START, END, IMAGE, VIDEO = 3, WORDS + 1, WORDS + 2, WORDS, WORDS + 3
MEL, FRAMES = 8, (64, 40)  # of a clip, and of another one
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": MEL,
    "max_source_positions": FRAMES[0] // 2,
}
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_mel_bins": MEL,
    "max_source_positions": FRAMES[0] // 2,
}


def _two(kind: str, encoder: dict[str, Any], text: str = "qwen2", **more: Any) -> Any:
    settings = {"audio_config": encoder, "text_config": TEXT | {"model_type": text}, "audio_token_id": AUDIO}
    return getattr(tf, f"{kind}Config")(**settings | more)


def _granite() -> Any:
    query = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.GraniteSpeechConfig(
        encoder_config={"input_dim": MEL, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 6}
        | {"context_size": 16, "max_pos_emb": 16, "dropout": 0.0},
        projector_config=query
        | {"model_type": "blip_2_qformer", "encoder_hidden_size": 16, "hidden_dropout_prob": 0.0}
        | {"attention_probs_dropout_prob": 0.0},
        text_config=TEXT | {"model_type": "granite"},
        audio_token_index=AUDIO,
        has_lora_adapter=False,
        downsample_rate=2,
        window_size=8,
    )


def _omni(kind: str, encoder: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> Any:
    ids = {"vision_start_token_id": 2, "vision_end_token_id": 1, "audio_start_token_id": START}
    index = "index" if kind == "Qwen2_5OmniThinker" else "id"
    kinds = (("audio", AUDIO), ("image", IMAGE), ("video", VIDEO))
    ids |= {f"{each}_token_{index}": token for each, token in kinds} | {"audio_end_token_id": END}
    text = TEXT | {"rope_parameters": MROPE, "head_dim": 8} | text
    return getattr(tf, f"{kind}Config")(
        audio_config=WHISPER | {"output_dim": 32} | encoder, vision_config=NATIVE | vision, text_config=text, **ids
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "Qwen2Audio": lambda: _two("Qwen2Audio", WHISPER),
    "Voxtral": lambda: _two("Voxtral", ENCODER | {"intermediate_size": 64}, "llama", hidden_size=32),
    "AudioFlamingo3": lambda: _two("AudioFlamingo3", ENCODER | {"model_type": "audioflamingo3_encoder"}),
    "MusicFlamingo": lambda: _two("MusicFlamingo", ENCODER | {"model_type": "audioflamingo3_encoder"}),
    "GlmAsr": lambda: _two("GlmAsr", ENCODER | {"intermediate_size": 64, "model_type": "glmasr_encoder"}, "llama"),
    "Qwen3ASR": lambda: _two(
        "Qwen3ASR",
        WHISPER | {"n_window_infer": 100, "downsample_hidden_size": 8, "output_dim": 32},
        "qwen3",
    ),
    "GraniteSpeech": _granite,
    "Qwen2_5OmniThinker": lambda: _omni(
        "Qwen2_5OmniThinker",
        {"n_window": 16},
        {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 32}
        | {"fullatt_block_indexes": [1]},
        {},
    ),
    "Qwen3OmniMoeThinker": lambda: _omni(
        "Qwen3OmniMoeThinker",
        {"n_window_infer": 100, "downsample_hidden_size": 8},
        {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0, 1]},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
FAMILIES = [*CONFIGS]
OMNI = [name for name in FAMILIES if "Omni" in name]
MASK = {"Qwen2Audio": "feature_attention_mask", "Voxtral": "", "GraniteSpeech": ""}  # else input_features_mask
MASK |= dict.fromkeys(OMNI, "feature_attention_mask")


def made(name: str) -> Any:
    """A model in training mode; attention "eager", so that FLOPs can be counted and masks are exact."""
    torch.manual_seed(0)
    cls = getattr(tf, f"{name}ForConditionalGeneration")
    model = cls._from_config(CONFIGS[name](), attn_implementation="eager")
    with torch.no_grad():  # start values of 0.02 would make all layers nearly nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def sound(name: str, clips: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """So many clips, every other one shorter, where the family knows lengths."""
    frames = 100 if name == "Qwen3ASR" else FRAMES[0]
    found = {"input_features": torch.randn(clips, MEL, frames, generator=generator)}
    if name == "GraniteSpeech":
        found["input_features"] = found["input_features"].mT
    if mask := MASK.get(name, "input_features_mask"):
        lengths = torch.tensor([FRAMES[number % 2] for number in range(clips)])
        found[mask] = (torch.arange(frames) < lengths[:, None]).long()
    return found


def tokens_of(model: Any, name: str, clip: dict[str, torch.Tensor]) -> int:
    """Positions of one clip."""
    if name in ("Qwen2Audio", "MusicFlamingo"):
        return int((clip[MASK.get(name, "input_features_mask")].sum() - 1) // 2 + 1 - 2) // 2 + 1
    with torch.no_grad():
        found = model.get_audio_features(**clip)
    features = found.last_hidden_state if name in OMNI else found.pooler_output
    return features.numel() // TEXT["hidden_size"]


def batch_of(name: str, model: Any, clips: tuple[int, ...] = (1, 2), seed: int = 0) -> dict[str, Any]:
    """Samples with so many clips each, and words around them; those at the end are labelled."""
    generator = torch.Generator().manual_seed(seed)
    heard = sound(name, sum(clips), generator) if sum(clips) else {}
    rows, labels, clip = [], [], 0
    for number in clips:
        row: list[int] = []
        for _ in range(number):
            count = tokens_of(model, name, {key: value[clip : clip + 1] for key, value in heard.items()})
            row += [*torch.randint(4, WORDS, (2,), generator=generator).tolist(), START, *[AUDIO] * count, END]
            clip += 1
        words = torch.randint(4, WORDS, (6,), generator=generator).tolist()
        labels.append([-100] * (len(row) + 2) + words[2:])
        rows.append(row + words)
    longest = max(map(len, rows))
    return heard | {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([label + [-100] * (longest - len(label)) for label in labels]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
