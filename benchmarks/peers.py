"""What others do to train faster, restated so that it runs around the same language model in the same step.

Shapes: B samples, T positions, K of them drawn, R samples drawn, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sparsight.sparse.gather import Kept

CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def build_llava(language: Any, image_id: int, clip: dict[str, int] = CLIP) -> tuple[Any, torch.nn.Module]:
    """transformers' LLaVA around ``language``, for cached features of CLIP-L, and its projector."""
    vision = CLIPVisionConfig(**clip, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=language.config, image_token_id=image_id)
    with torch.device("meta"):  # the tower never runs
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = language.base_model, language.get_output_embeddings()
    model.train()
    return model, LlavaMultiModalProjector(config).to(language.device)


@contextmanager
def wrapped(model: Any, wrapper: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Decoder layers' ``forward`` goes through ``wrapper(plain, place, hidden, ...)``; place: 0 to 1, first to last."""
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layer.forward = partial(wrapper, layer.forward, number / max(1, len(layers) - 1))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def drawn(place: float) -> torch.Generator:
    """Differs from layer to layer, and is the same in every step: so are its FLOPs."""
    return torch.Generator().manual_seed(round(1000 * place))


def layer_dropout(plain: Callable[..., Any], place: float, x_BTD: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """torchtune's layer dropout, 0.5: each layer runs on the samples of the batch that it drew, the others pass by."""
    row_R = torch.rand(len(x_BTD), generator=drawn(place)).lt(0.5).nonzero()[:, 0].to(x_BTD.device)
    if not len(row_R):
        return x_BTD
    return x_BTD.index_copy(0, row_R, plain(x_BTD[row_R], **inputs).to(x_BTD.dtype))


def random_ltd(
    plain: Callable[..., Any], place: float, x_BTD: torch.Tensor, *, position_embeddings: Any, **inputs: Any
) -> torch.Tensor:
    """DeepSpeed's random-LTD, half of the tokens: each layer but the first and last draws, from text and images
    alike, those that go through it; the others pass by. (Theirs leaves rotary positions uncut, and fails on Llama.)"""
    if place in (0.0, 1.0):
        return plain(x_BTD, position_embeddings=position_embeddings, **inputs)
    batch, length, width = x_BTD.shape
    index_BK = torch.rand(batch, length, generator=drawn(place)).topk(length // 2).indices.sort().values
    kept = Kept(index_BK.to(x_BTD.device), torch.ones_like(index_BK, dtype=torch.bool), length)
    positions = tuple(kept.gather(part, 1) for part in position_embeddings)
    few_BKD = plain(kept.gather(x_BTD, 1), position_embeddings=positions, **inputs)
    return x_BTD.scatter(1, kept.index_BK[..., None].expand(-1, -1, width), few_BKD.to(x_BTD.dtype))
