"""A small language model and its tokenizer, made from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sparsight.modeling.chat_templates import FLATTEN, LEAN
from sparsight.modeling.processing import IMAGE_TOKEN
from sparsight.settings.recipe import ScratchLanguage


def scratch_tokenizer(settings: ScratchLanguage, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts`` (digits apart)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", IMAGE_TOKEN]
    raw, by_byte = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_byte])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=[*special[1:4], IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = FLATTEN + LEAN
    return tokenizer


def scratch_language(
    settings: ScratchLanguage, texts: Iterable[str]
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A small Qwen3 with random weights, and its `scratch_tokenizer`.

    Its normalised queries and keys let so small a model take large learning rates.
    """
    tokenizer = scratch_tokenizer(settings, texts)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        initializer_range=settings.hidden**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    lm = Qwen3ForCausalLM(config)
    # Rows of unit size, as a trained model has them; with 0.02 the first hundreds of steps go to growing them.
    nn.init.normal_(lm.get_input_embeddings().weight, std=1.0)
    nn.init.normal_(lm.get_output_embeddings().weight, std=0.02)
    return lm, tokenizer
