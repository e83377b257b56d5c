"""Composed models for llama.cpp: the language model as GGUF, encoder and bridge as its ``mmproj``.

Its LLaVA graph has no norm before the projector, but one behind the encoder's last layer: with one feature level as the
last layer, ours goes there. Its GELU is the approximation by tanh, and its norms have the encoder's epsilon.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import UserError
from sparsight.modeling.native import patchwise_parts

# model_type -> llama.cpp's name, and whether it takes rotary halves as pairs.
_LANGUAGES = {"llama": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "gelu": "gelu", "silu": "silu", "quick_gelu": None}
# How a byte-level tokenizer cuts text -> llama.cpp's name of that: GPT-2's pattern, alone or behind single digits.
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_gguf(model: Any, processor: Any, out: Path) -> None:
    """Write ``language.gguf`` and ``mmproj.gguf``, in fp32.

    Raises:
        UserError: llama.cpp's format cannot express the model; the message says what it lacks.
    """
    tower, levels, prefix = patchwise_parts(model, "gguf")
    kind, vision, text = model.config.bridge.kind, tower.config, model.config.text_config
    lack = None
    if kind == "pixel_shuffle":
        lack = "a bridge of kind pixel_shuffle: its graphs that fold patches put <img> tokens around an image"
    elif len(levels) > 1 or levels[0] < 1:
        lack = f"feature levels {levels}: its LLaVA graph has no norm where several are joined; give vision_levels one"
    elif prefix or vision.model_type != "siglip_vision_model":
        lack = f"{type(tower).__name__}: its LLaVA graph leaves out a patch where a class token is; there is SigLIP"
    elif vision.hidden_act not in _ACTIVATIONS or vision.intermediate_size == vision.hidden_size:
        lack = f"an encoder with {vision.hidden_act} and an MLP of {vision.intermediate_size} of {vision.hidden_size}"
    elif text.model_type not in _LANGUAGES or (text.rope_parameters or {}).get("rope_type") != "default":
        lack = f"a language model of type {text.model_type} with {text.rope_parameters}; there are {[*_LANGUAGES]}"
    elif text.hidden_act != "silu" or "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        lack = f"{text.model_type} with {text.hidden_act} or a sliding window"
    if lack:
        raise UserError(f"--to gguf has no place for {lack}. --to remote-code takes any model")
    _write_mmproj(model, tower, levels[0], processor.image_processor, out / "mmproj.gguf")
    _write_language(model, processor.tokenizer, out / "language.gguf")


def _write_mmproj(model: Any, tower: Any, level: int, image_processor: Any, file: Path) -> None:
    import gguf

    vision, bridge = tower.config, model.model.multi_modal_projector
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    for name, value in {
        "projection_dim": model.config.text_config.hidden_size,
        "image_size": model.config.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": level,
        "head_count": vision.num_attention_heads,
        "attention_layernorm_eps": vision.layer_norm_eps,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
    }.items():
        getattr(writer, f"add_vision_{name}")(value)
    writer.add_array("clip.vision.feature_layer", [level])
    if act := _ACTIVATIONS[vision.hidden_act]:
        writer.add_bool(f"clip.use_{act}", True)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, level)  # names no block above the feature level
    state = tower.state_dict(prefix="vision_tower.vision_model.")
    named = {table.get_name(name, (".weight", ".bias")): tensor for name, tensor in state.items()}
    named.pop(None, None)
    named |= {f"v.post_ln.{kind}": getattr(bridge.norm, kind) for kind in ("weight", "bias")}
    first, last = (bridge.proj, None) if model.config.bridge.kind == "linear" else (bridge.proj[0], bridge.proj[2])
    for number, layer in {0: first, 2: last}.items():
        named |= {f"mm.{number}.{kind}": getattr(layer, kind) for kind in ("weight", "bias") if layer is not None}
    if last is None:  # its GELU is always there: x = gelu(x) - gelu(-x)
        unit = torch.eye(first.out_features)
        named |= {
            f"mm.0.{kind}": torch.cat([named[f"mm.0.{kind}"], -named[f"mm.0.{kind}"]]) for kind in ("weight", "bias")
        }
        named |= {"mm.2.weight": torch.cat([unit, -unit], 1), "mm.2.bias": torch.zeros(first.out_features)}
    _write(writer, named)


def _write_language(model: Any, tokenizer: Any, file: Path) -> None:
    import gguf

    text = model.config.text_config
    arch, pairs = _LANGUAGES[text.model_type]
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    writer = gguf.GGUFWriter(file, arch)
    for name, value in {
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "head_count": heads,
        "head_count_kv": kv_heads,
        "rope_freq_base": text.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": text.rms_norm_eps,
        "vocab_size": text.vocab_size,
        **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), width),
    }.items():
        getattr(writer, f"add_{name}")(value)
    _add_tokenizer(writer, tokenizer, text.vocab_size)
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], text.num_hidden_layers)
    named = {}
    for name, tensor in {**model.model.language_model.state_dict(prefix="model."), **_head(model)}.items():
        if pairs and (".q_proj." in name or ".k_proj." in name):
            count = heads if ".q_proj." in name else kv_heads
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        named[table.get_name(name, (".weight", ".bias"))] = tensor
    _write(writer, named)


def _head(model: Any) -> dict[str, Tensor]:
    return {} if model.config.tie_word_embeddings else {"lm_head.weight": model.lm_head.weight}


def _add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """A byte-level BPE, as llama.cpp calls it. Raises UserError for others."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    cut, bpe = values["pre_tokenizer"] or {}, values["model"]
    steps = [{key: step.get(key) for key in step if key != "trim_offsets"} for step in cut.get("pretokenizers", [cut])]
    pre = {str([_GPT2]): "gpt-2", str([_DIGITS, _GPT2]): "smollm"}.get(str(steps))
    if steps[0].get("pattern") == {"Regex": _QWEN2}:
        pre = "qwen2"
    if bpe["type"] != "BPE" or pre is None:
        raise UserError(f"--to gguf knows no name for how this tokenizer cuts text, {bpe['type']} behind {steps}")
    tokens = {number: token for token, number in bpe["vocab"].items()}
    added = {each["id"]: each for each in values["added_tokens"]}
    tokens |= {number: each["content"] for number, each in added.items()}
    kinds = [(3 if added[n]["special"] else 4) if n in added else 1 if n in tokens else 5 for n in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    for name in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id))
    writer.add_chat_template(tokenizer.chat_template)


def _write(writer: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
