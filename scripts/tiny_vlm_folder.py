"""Make a tiny VLM with random weights and twelve conversations with images, as folders that a trainer takes.

`python scripts/tiny_vlm_folder.py FOLDER [--family qwen2_vl | llava]`, in the environment of the trainer, so that the
files are those of its own transformers. Nothing is downloaded. The folder gets

    model/            config, weights, tokenizer, processor: what `from_pretrained` takes
    images/0.png ...
    sharegpt.json     {"images", "conversations": [{"from": "human" | "gpt", "value": "<image>..."}]} (LLaMA-Factory)
    dataset_info.json LLaMA-Factory's list of data sets: `tiny`
    llava.json        {"id", "image", "conversations"}, LLaVA's form
    messages.jsonl    {"messages": [{"role", "content": [{"type": "image", "path"}, {"type": "text", "text"}]}]}
    swift.jsonl       {"messages": [{"role", "content": "<image>..."}], "images"}, ms-swift's form
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "purple", "brown", "grey", "pink", "cyan")
QUESTION, ANSWER, SIDE = "What colour is this image?", "The whole of it is {}.", 168
SPECIAL = {
    "qwen2_vl": ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"],
    "llava": ["endoftext", "im_start", "im_end"],
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def make_tokenizer(family: str) -> Any:
    """A byte-level BPE tokenizer trained on the conversations, with the family's special tokens."""
    special = [f"<|{name}|>" for name in SPECIAL[family]] + (["<image>"] if family == "llava" else [])
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([QUESTION, *map(ANSWER.format, COLOURS)], trainer)
    tokens = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": special[1:]}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=2048, **tokens)
    image = "<image>" if family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    made.chat_template = CHAT.replace("IMAGE", image)
    return made


def make_qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Qwen2-VL: 36 visual tokens for an image. Its processor needs torchvision."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL["qwen2_vl"]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    words = {"vocab_size": len(tokenizer), "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | words | {"rope_parameters": rope, "bos_token_id": None},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **{f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        tie_word_embeddings=False,
    )
    pixels = {"min_pixels": 56 * 56, "max_pixels": SIDE * SIDE}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    )
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def make_llava(tokenizer: Any) -> tuple[Any, Any]:
    """LLaVA of CLIP and Llama: 36 visual tokens for an image."""
    try:
        images = transformers.CLIPImageProcessorPil  # its name since 5.3, where torchvision may be absent
    except AttributeError:
        images = transformers.CLIPImageProcessor
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = transformers.LlavaConfig(
        vision_config=vision | {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 28},
        text_config=TEXT | words | {"model_type": "llama", "pad_token_id": tokenizer.pad_token_id},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        images(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=28,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def write_data(folder: Path) -> None:
    """Images of one colour with a corner of another, and a conversation about each in every form."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    forms: dict[str, list[dict[str, Any]]] = {"sharegpt": [], "llava": [], "messages": [], "swift": []}
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (SIDE, SIDE), colour)
        image.paste(Image.new("RGB", (SIDE // 3, SIDE // 3), COLOURS[number - 1]), (0, 0))
        image.save(path := folder / "images" / f"{number}.png")
        asked, answer = f"<image>{QUESTION}", ANSWER.format(colour)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": QUESTION}]
        says = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        plain = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        forms["sharegpt"].append({"images": [str(path)], "conversations": turns})
        forms["llava"].append({"id": str(number), "image": path.name, "conversations": turns})
        forms["messages"].append({"messages": [{"role": "user", "content": parts}, says]})
        forms["swift"].append({"messages": plain, "images": [str(path)]})
    for name, rows in forms.items():
        lines = name in ("messages", "swift")
        text = "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=1)
        (folder / f"{name}.{'jsonl' if lines else 'json'}").write_text(text, encoding="utf-8")
    columns = {"messages": "conversations", "images": "images"}
    known = {"tiny": {"file_name": "sharegpt.json", "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(known, indent=1), encoding="utf-8")


def make_folder(folder: Path, family: str = "qwen2_vl") -> None:
    """All of it, in a folder that may exist.

    Args:
        family: "qwen2_vl" or "llava".
    """
    tokenizer = make_tokenizer(family)
    torch.manual_seed(0)
    model, processor = {"qwen2_vl": make_qwen2_vl, "llava": make_llava}[family](tokenizer)
    with torch.no_grad():  # start values of 0.02 would make all layers nearly nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_data(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="qwen2_vl", choices=list(SPECIAL))
    given = parser.parse_args()
    make_folder(given.folder.absolute(), given.family)
