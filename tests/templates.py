"""Chat templates as families of language models publish them (`data/templates`), each with a small tokenizer.

The two of Mistral are without their branches for tools. Tokenizers are learnt here: byte-level BPE, or as SentencePiece
makes it (a space before the text, bytes for what is unknown), with the family's control tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsight.modeling.chat_templates import multimodal_template
from tiny import TEXTS

FOLDER = Path(__file__).parent / "data" / "templates"


@dataclass(frozen=True)
class Family:
    """``shown``: what the template makes of an answer, and whether it is the last, in front of the stop token."""

    stop: str
    control: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None  # the stop token, if not given
    shown: Callable[[str, bool], str] = lambda text, last: text
    sentencepiece: bool = False
    system: bool = True
    greedy: bool = False  # control tokens take the spaces behind them


def _trimmed(text: str, last: bool) -> str:
    return text.strip()


def _spaced(text: str, last: bool) -> str:
    return " " + text.strip()


def _thinking(text: str, last: bool) -> str:
    return "<think>\n\n</think>\n\n" + text.lstrip("\n") if last else text


_CHATML = ("<|im_start|>", "<|endoftext|>")
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "shown": _trimmed, "sentencepiece": True}
FAMILIES = {
    "smollm2": Family("<|im_end|>", _CHATML),
    "qwen2": Family("<|im_end|>", _CHATML),
    "qwen2.5": Family("<|im_end|>", _CHATML),
    "qwen3": Family("<|im_end|>", _CHATML, shown=_thinking),
    "llama-3": Family("<|eot_id|>", _LLAMA, bos="<|begin_of_text|>", shown=_trimmed),
    "llama-3.2": Family("<|eot_id|>", _LLAMA, bos="<|begin_of_text|>", shown=_trimmed),
    "phi-3": Family("<|end|>", _PHI, bos="<s>", eos="<|endoftext|>", sentencepiece=True, greedy=True),
    "phi-3.5": Family("<|end|>", _PHI, bos="<s>", eos="<|endoftext|>", sentencepiece=True, greedy=True),
    "phi-4": Family("<|im_end|>", (*_CHATML, "<|im_sep|>")),
    "gemma-2": Family("<end_of_turn>", ("<start_of_turn>",), system=False, **_GEMMA),
    "gemma-3": Family("<end_of_turn>", ("<start_of_turn>",), **_GEMMA),
    "vicuna": Family("</s>", (), bos="<s>", shown=_spaced, sentencepiece=True),
    "mistral-v0.3": Family("</s>", ("[INST]", "[/INST]"), bos="<s>", shown=_spaced, sentencepiece=True, system=False),
    "mistral-tekken": Family("</s>", ("[INST]", "[/INST]"), bos="<s>", system=False),
}


@lru_cache
def _learnt(sentencepiece: bool) -> str:
    """A tokenizer of the kind without control tokens, as JSON."""
    raw = Tokenizer(models.BPE(byte_fallback=sentencepiece, unk_token="<unk>" if sentencepiece else None))
    if not sentencepiece:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        raw.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's and SmolLM2's
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        raw.train_from_iterator(TEXTS, trainer)
        return raw.to_str()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    values = json.loads(raw.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return json.dumps(values)


@lru_cache
def family_tokenizer(name: str) -> Any:
    """The family's tokenizer with its template made to take images, as `sparsight.build` leaves it."""
    family = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_learnt(family.sentencepiece)),
        bos_token=family.bos,
        eos_token=family.eos or family.stop,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    control = [AddedToken(text, special=True, rstrip=family.greedy) for text in (*family.control, family.stop)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*control, "<image>"]})
    tokenizer.chat_template = multimodal_template((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    return tokenizer
