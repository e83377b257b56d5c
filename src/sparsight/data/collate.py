"""From samples to batches: encoded one by one where the pictures are, then padded and stacked.

Shapes: B samples, T positions, I images in the whole batch, H x W patches, C channels.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.data.cache import FeatureCache
from sparsight.data.chat import encode_conversation
from sparsight.data.sources import Sample, Source

TRIES = 50


class BadSampleError(ValueError):
    """A sample that cannot be learnt from: ``entry`` has its row in the source, id and reason."""

    entry: dict[str, Any]


class TrainingSet(Dataset):
    """A source, encoded for a processor. Pictures come as pixels, or as cached features of a frozen encoder.

    Args:
        replace: seed with which another sample is drawn in place of a bad one, the next if that is bad too; the item's
            ``replaced`` has the entries of the bad ones. If not given, a bad sample is an error.
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        length: int,
        cache: FeatureCache | None = None,
        replace: int | None = None,
    ) -> None:
        self.source = source
        self.processor = processor
        self.length = length
        self.cache = cache
        self.replace = replace

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self.source)
        replaced: list[dict[str, Any]] = []
        draw = random.Random(f"{self.replace}/{index}")  # alike in every process, and after resume
        for _ in range(TRIES):
            try:
                return self.encode(row) | ({"replaced": replaced} if replaced else {})
            except BadSampleError as bad:
                if self.replace is None:
                    raise
                replaced.append(bad.entry)
                row = draw.randrange(len(self.source))
        reason = replaced[0]["reason"]
        raise ValueError(f"{reason}. {TRIES - 1} others, drawn in its place, are bad too: `sparsight data check`")

    def encode(self, row: int) -> dict[str, Any]:
        """One row of the source as an item.

        Raises:
            BadSampleError: its conversation or a picture cannot be read or learnt from.
        """
        sample = None
        try:
            sample = self.source[row]
            return self._item(sample)
        except (ValueError, OSError) as error:
            bad = BadSampleError(f"sample '{sample.id}': {error}" if sample else str(error))
            bad.entry = {"row": row, "id": sample.id if sample else str(row), "reason": str(error)}
            raise bad from None

    def _item(self, sample: Sample) -> dict[str, Any]:
        encoded = encode_conversation(
            self.processor.tokenizer, sample.messages, self.processor.image_token, self.processor.num_image_tokens
        )
        item: dict[str, Any] = {"id": sample.id, "input_ids": encoded.input_ids, "labels": encoded.labels}
        if self.cache is not None:  # also of no picture: a batch of text then runs the bridge like any other
            item["features"] = self.cache.read(sample.images)
        elif sample.images:
            item["pixels"] = dict(self.processor.pixels([self.source.picture(key) for key in sample.images]))
        return item


class Collator:
    """Pads at the right and stacks. Samples may have 0 to k images.

    ``replaced`` in a batch is for the trainer: the entries of bad samples, if there were any.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(item["input_ids"]) for item in items)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([item[key] + [fill] * (longest - len(item[key])) for item in items])

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch: dict[str, Any] = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", -100),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }
        if replaced := [entry for item in items for entry in item.get("replaced", [])]:
            batch["replaced"] = replaced
        pixels = [item["pixels"] for item in items if "pixels" in item]
        features = [item["features"] for item in items if "features" in item]
        if pixels:  # and the grids of a native-resolution encoder
            batch |= {key: torch.cat([item[key] for item in pixels]) for key in pixels[0]}
        if features:
            # As an encoder gives them: without autocast, weights in fp32 take no bf16.
            levels = tuple(torch.cat(level).float() for level in zip(*features, strict=True))
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(hidden_states=levels)}
        return batch
