"""From samples to batches: encoded one by one where the pictures are, then padded and stacked.

Shapes: B samples, T positions, I images in the whole batch, H x W patches, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.data.batching import pack
from sparsight.data.cache import FeatureCache
from sparsight.data.chat import Encoded, TooLong, encode_conversation
from sparsight.data.sources import Sample, Source


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
            encoded = self._encode(sample)
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

    def _encode(self, sample: Sample) -> Encoded:
        processor = self.processor
        return encode_conversation(
            processor.tokenizer, sample.messages, processor.image_token, processor.num_image_tokens
        )

    def lengths(self, file: Path, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """Positions of each sample, visual tokens included; no picture is read. Kept in ``file``, for the next time."""
        if file.is_file():
            return np.load(file)
        found = np.zeros(self.length, dtype=np.int32)
        for index in range(self.length):
            sample = self.source[index % len(self.source)]
            try:
                found[index] = len(self._encode(sample).input_ids)
            except ValueError as error:
                raise ValueError(f"sample '{sample.id}': {error}") from None
            if index % 64 == 0:
                progress(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(partial, found)
        partial.replace(file)
        return found


class Collator:
    """Pads at the right and stacks. Samples may have 0 to k images.

    With ``packing``, samples share rows as long as the longest one (or ``pack_length``), without attention across them:
    places start anew with each, and there is no mask, as transformers tells packed rows. What the trainer wants to know
    stands under "info" and is not for the model: numbers of samples and of positions that are no padding.
    """

    def __init__(self, pad_token_id: int, packing: bool = False, pack_length: int | None = None) -> None:
        self.pad_token_id, self.packing, self.pack_length = pad_token_id, packing, pack_length

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(item["input_ids"]) for item in items]
        rows = [[number] for number in range(len(items))]
        if self.packing:
            rows = pack(lengths, max(*lengths, self.pack_length or 0))
            items = [items[number] for row in rows for number in row]
        batch: dict[str, Any] = self._stacked(items, [len(row) for row in rows])
        batch["info"] = {"samples": len(items), "filled": sum(lengths), "ids": [item["id"] for item in items]}
        pixels = [item["pixels"] for item in items if "pixels" in item]
        features = [item["features"] for item in items if "features" in item]
        if pixels:  # and the grids of a native-resolution encoder
            batch |= {key: torch.cat([item[key] for item in pixels]) for key in pixels[0]}
        if features:
            # As an encoder gives them: without autocast, weights in fp32 take no bf16.
            levels = tuple(torch.cat(level).float() for level in zip(*features, strict=True))
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(hidden_states=levels)}
        return batch

    def _stacked(self, items: list[dict[str, Any]], counts: list[int]) -> dict[str, torch.Tensor]:
        """Ids, labels and mask, or places, (B, T), of rows that hold so many items each."""
        keys = {"input_ids": self.pad_token_id, "labels": -100, "position_ids": 0}
        rest, rows = iter(items), []
        for count in counts:
            row: dict[str, list[int]] = {key: [] for key in keys}
            for item in islice(rest, count):
                row["input_ids"] += item["input_ids"]
                row["labels"] += [-100, *item["labels"][1:]]  # nothing stands before the first one that could say it
                row["position_ids"] += range(len(item["input_ids"]))
            rows.append(row)
        longest = max(len(row["labels"]) for row in rows)
        batch = {
            key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
            for key, fill in keys.items()
        }
        if not self.packing:
            del batch["position_ids"]
            filled_B = torch.tensor([len(row["labels"]) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < filled_B[:, None]).long()
        return batch
