"""From samples to batches: encoded one by one where the pictures are, then padded and stacked.

Shapes: B samples, T positions, I images in the whole batch, H x W patches, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.data.cache import FeatureCache
from sparsight.data.chat import TooLong, encode_conversation
from sparsight.data.sources import Source


class TrainingSet(Dataset):
    """A source, encoded for a processor. Pictures come as pixels, or as cached features of a frozen encoder.

    A sample of more than ``max_length`` tokens raises: `TooLong` if such are to be dropped, else ValueError.
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        length: int,
        cache: FeatureCache | None = None,
        max_length: int | None = None,
        drop_too_long: bool = False,
    ) -> None:
        self.source = source
        self.processor = processor
        self.length = length
        self.cache = cache
        self.max_length = max_length
        self.drop_too_long = drop_too_long

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.source[index % len(self.source)]
        try:
            encoded = encode_conversation(
                self.processor.tokenizer,
                sample.messages,
                self.processor.image_token,
                self.processor.num_image_tokens,
            )
            self._check_length(encoded.input_ids)
            item: dict[str, Any] = {"id": sample.id, "input_ids": encoded.input_ids, "labels": encoded.labels}
            if self.cache is not None:  # also of no picture: a batch of text then runs the bridge like any other
                item["features"] = self.cache.read(sample.images)
            elif sample.images:
                pictures = [self.source.picture(key) for key in sample.images]
                item["pixels"] = dict(self.processor.image_processor(pictures, return_tensors="pt"))
        except ValueError as error:
            kind = TooLong if isinstance(error, TooLong) else ValueError
            raise kind(f"sample '{sample.id}': {error}") from None
        return item

    def _check_length(self, ids: list[int]) -> None:
        if self.max_length is not None and len(ids) > self.max_length:
            visual = ids.count(self.processor.image_token_id)
            raise (TooLong if self.drop_too_long else ValueError)(
                f"{len(ids)} tokens, {visual} of them visual; expected {self.max_length} (max_length) at most. Shorten "
                "it, raise max_length, take a layout with fewer visual tokens, or set on_too_long: drop_sample"
            )


class Collator:
    """Pads at the right and stacks. Samples may have 0 to k images. ``ids`` names them, and is not for the model."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(item["input_ids"]) for item in items)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([item[key] + [fill] * (longest - len(item[key])) for item in items])

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch: dict[str, Any] = {
            "ids": [item["id"] for item in items],
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", -100),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }
        pixels = [item["pixels"] for item in items if "pixels" in item]
        features = [item["features"] for item in items if "features" in item]
        if pixels:  # and the grids of a native-resolution encoder
            batch |= {key: torch.cat([item[key] for item in pixels]) for key in pixels[0]}
        if features:
            # As an encoder gives them: without autocast, weights in fp32 take no bf16.
            levels = tuple(torch.cat(level).float() for level in zip(*features, strict=True))
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(hidden_states=levels)}
        return batch
