"""From samples to batches: encoded one by one where the images are, then padded and stacked.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import contextlib
import os
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.data.batching import pack
from sparsight.data.cache import FeatureCache
from sparsight.data.chat import encode_conversation
from sparsight.data.conversations import Sample
from sparsight.data.sources import Source
from sparsight.errors import UserError

TRIES = 50
# Bytes of tokens that each process keeps for the next epoch. Measured: 15,000 rows of 712 (576 visual) take 103 MB.
KEPT = 100_000_000


class TooLong(UserError):
    """A sample with more tokens than the limit."""


class BadSampleError(UserError):
    """A sample that cannot be trained on: ``entry`` has its row in the source, its id, the reason, and whether the
    recipe drops it for its length."""

    entry: dict[str, Any]


@dataclass(eq=False)
class TrainingSet(Dataset):
    """A source, encoded for a processor. Images come as pixels, or as cached features of a frozen encoder.

    The source starts again at its end. A sample that is to be replaced gets another in its place, drawn by the seed and
    its index alone, and the next one if that is bad too; the item's ``replaced`` has the entries of the bad ones.

    Args:
        length: items.
        offset: conversations that earlier stages have had; item 0 is the one behind them.
        max_length: tokens that a sample may have, visual ones included.
        drop_too_long: replace longer ones; else they are bad samples.
        replace_bad: replace bad samples; else they are errors (`BadSampleError`).
    """

    source: Source
    processor: Any
    length: int
    cache: FeatureCache | None = None
    _: KW_ONLY
    offset: int = 0
    max_length: int | None = None
    drop_too_long: bool = False
    replace_bad: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # A row's id, token ids and labels, and keys of its images. As lists, tokens would take three times the room.
        self._kept: dict[int, tuple[str, array[int], array[int], tuple[Any, ...]]] = {}
        self._room = KEPT

    @property
    def replaces(self) -> bool:
        """Whether any sample may be replaced by another."""
        return self.replace_bad or self.drop_too_long

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, replaced = self._first_good(index, self.encode)
        return item | ({"replaced": replaced} if replaced else {})

    def _first_good(self, index: int, read: Callable[[int], Any]) -> tuple[Any, list[dict[str, Any]]]:
        """``read`` of item ``index``'s row, or of the first good one in its place; entries of the bad ones."""
        replaced: list[dict[str, Any]] = []
        draw = random.Random(f"{self.seed}/{index}")  # alike in every process, and after resume
        for attempt in range(TRIES):
            row = draw.randrange(len(self.source)) if attempt else (index + self.offset) % len(self.source)
            try:
                return read(row), replaced
            except BadSampleError as bad:
                if not (self.replace_bad or bad.entry["dropped"]):
                    raise BadSampleError(
                        f"{bad}. To train without it, set on_bad_sample=quarantine; a run that has begun goes on with "
                        "--resume. `sparsight data check` finds all of them beforehand"
                    ) from None
                replaced.append(bad.entry)
        reason = replaced[0]["reason"]
        raise UserError(f"{reason}. {TRIES - 1} others, drawn in its place, are bad too: `sparsight data check`")

    def encode(self, row: int, text_alone: bool = False) -> dict[str, Any]:
        """One row of the source as an item.

        Args:
            text_alone: without its images, which are not read; at native resolution with the number of their patches.

        Raises:
            BadSampleError: its conversation or an image cannot be read or trained on.
        """
        name = None
        try:
            if row not in self._kept:
                sample = self.source[row]
                name = sample.id
                kept = self._text(sample)
                size = 2 * kept[1].itemsize * len(kept[1]) + 1000  # and what Python takes for all the rest
                if size <= self._room:
                    self._kept[row] = kept
                    self._room -= size
            else:
                kept = self._kept[row]
            name, ids, labels, images = kept
            item = {"id": name, "input_ids": ids.tolist(), "labels": labels.tolist()}
            if not text_alone:
                return item | self._images(images)
            if self.processor.native:
                item["patches"] = sum(self.processor.patches(*self.source.size(key)) for key in images)
            return item
        except (ValueError, OSError) as error:
            bad = BadSampleError(f"sample '{name}': {error}" if name is not None else str(error))
            dropped = self.drop_too_long and isinstance(error, TooLong)
            bad.entry = {"row": row, "id": str(row) if name is None else name, "reason": str(error), "dropped": dropped}
            raise bad from None

    def _text(self, sample: Sample) -> tuple[str, array[int], array[int], tuple[Any, ...]]:
        processor = self.processor
        encoded = encode_conversation(
            processor.tokenizer, sample.messages, processor.image_token, processor.num_image_tokens
        )
        if self.max_length is not None and len(encoded.input_ids) > self.max_length:
            visual = encoded.input_ids.count(processor.image_token_id)
            raise TooLong(
                f"{len(encoded.input_ids)} tokens, {visual} of them visual; expected at most {self.max_length} "
                "(max_length). Shorten it, raise max_length, take a layout with fewer visual tokens, or set "
                "on_too_long: drop_sample"
            )
        return sample.id, array("i", encoded.input_ids), array("i", encoded.labels), sample.images

    def _images(self, keys: Sequence[Any]) -> dict[str, Any]:
        if self.cache is not None:  # also of no image: a batch of text then runs the bridge like any other
            return {"features": self.cache.read(keys), "images": keys}
        if not keys:
            return {}
        return {"pixels": dict(self.processor.pixels([self.source.image(key) for key in keys])), "images": keys}

    def sizes(self, file: Path, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """Positions of each item, visual tokens included, and its images, or at native resolution their patches,
        (items, 2). No image is decoded. Kept in ``file``, for the next time: a resumed run deals as it began."""
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # not there yet, or cut short by a kill
            if (kept := np.load(file)).shape == (self.length, 2):
                return kept
        known: dict[int, tuple[int, int]] = {}

        def measure(row: int) -> tuple[int, int]:
            if row not in known:
                item = self.encode(row, text_alone=True)
                images = item["input_ids"].count(self.processor.image_token_id) // self.processor.num_image_tokens
                known[row] = len(item["input_ids"]), item.get("patches", images)
            return known[row]

        found = np.zeros((self.length, 2), dtype=np.int32)
        for index in range(self.length):
            found[index] = self._first_good(index, measure)[0]
            if index % 64 == 0:
                progress(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(partial, found)
        partial.replace(file)
        return found


@dataclass
class _Features(BaseModelOutputWithPooling):
    """Cached features on their way: torch cannot pin an output of transformers, as that refuses ``update``."""

    def pin_memory(self) -> _Features:
        return _Features(hidden_states=tuple(level.pin_memory() for level in self.hidden_states or ()))


def _once(batch: dict[str, Any], keys: list[Any]) -> int:
    """Leave of a batch's images those with a new key: each is encoded once. ``image_index`` has the row among them of
    each image that is asked about, if any comes again. How many there are."""
    cached, grids, pixels = batch.get("mm_encoder_outputs"), batch.get("image_grid_thw"), batch.get("pixel_values", ())
    levels = cached["image"].hidden_states if cached else (pixels if grids is None else grids,)
    rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    if len(rows) == len(keys):
        return len(levels[0])
    batch["image_index"], first = torch.tensor([rows[key] for key in keys]), [keys.index(key) for key in rows]
    if cached:
        batch["mm_encoder_outputs"] = {"image": _Features(hidden_states=tuple(level[first] for level in levels))}
    else:
        parts = pixels.split(1 if grids is None else grids.prod(1).tolist())
        batch["pixel_values"] = torch.cat([parts[number] for number in first])
        batch |= {} if grids is None else {"image_grid_thw": grids[first]}
    return len(rows)


@dataclass(frozen=True)
class Collator:
    """Pads at the right and stacks. Samples may have 0 to k images.

    With ``packing``, samples share rows as long as the longest one (or ``pack_length``), without attention across them:
    positions start anew with each, and there is no mask, as transformers tells packed rows. "info" is not for the
    model: it holds all that is counted of a batch, here and nowhere else (ids of the samples; positions that are
    ``filled``, no padding; visual tokens; supervised labels; images, and their grids of patches at native resolution;
    entries of bad samples that were replaced).

    Args:
        positions: of an image's visual tokens (`image_token_id`) among those of the last layout, and how many the last
            one has: text behind an image stands as far from it as it will then. Not with ``packing``.
        weights: of an image's visual tokens in attention, as if each were so many.
    """

    pad_token_id: int
    packing: bool = False
    pack_length: int | None = None
    image_token_id: int | None = None
    positions: tuple[Sequence[int], int] | None = None
    weights: Sequence[float] | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(item["input_ids"]) for item in items]
        rows = [[item] for item in items]
        if self.packing:
            packed = pack(lengths, max(*lengths, self.pack_length or 0))
            rows = [[items[number] for number in row] for row in packed]
            items = [item for row in rows for item in row]
        batch: dict[str, Any] = self._stacked(rows, max(lengths))
        pixels = [item["pixels"] for item in items if "pixels" in item]
        features = [item["features"] for item in items if "features" in item]
        if pixels:  # and the grids of a native-resolution encoder
            batch |= {key: torch.cat([item[key] for item in pixels]) for key in pixels[0]}
        if features:
            levels = tuple(torch.cat(level) for level in zip(*features, strict=True))
            batch["mm_encoder_outputs"] = {"image": _Features(hidden_states=levels)}
        images = _once(batch, [key for item in items for key in item.get("images", ())])
        grids = batch["image_grid_thw"].tolist() if "image_grid_thw" in batch else []
        # What the device need not count: where visual tokens stand, and where the next position has a label.
        batch["supervised_index"] = (batch["labels"].flatten()[1:] != -100).nonzero()[:, 0]
        if self.image_token_id is not None:
            batch["visual_index"] = batch["input_ids"].flatten().eq(self.image_token_id).nonzero()[:, 0]
        batch["info"] = {
            "ids": [item["id"] for item in items],
            "filled": sum(lengths),
            "visual_tokens": len(batch.get("visual_index", ())),
            "supervised": len(batch["supervised_index"]),
            "images": images,
            "grids": [(rows, columns) for _, rows, columns in grids],
            "replaced": [entry for item in items for entry in item.get("replaced", [])],
        }
        return batch

    def _stacked(self, rows: list[list[dict[str, Any]]], longest: int) -> dict[str, torch.Tensor]:
        """Ids, labels and mask, or position ids, (B, T), of rows of items."""
        ids, labels, positions = [], [], []
        for row in rows:
            ids.append(torch.tensor([id for item in row for id in item["input_ids"]]))
            # No label at a sample's first position: nothing stands before it that could say it.
            labels.append(torch.tensor([label for item in row for label in (-100, *item["labels"][1:])]))
            positions.append(torch.cat([self._positions(torch.tensor(item["input_ids"])) for item in row]))
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
        length = batch["input_ids"].shape[1]
        if self.packing or self.positions is not None:  # padding counts as samples, none longer than the others
            padded = [torch.cat([row, torch.arange(length - len(row)) % longest]) for row in positions]
            batch["position_ids"] = torch.stack(padded)
        if not self.packing:
            filled_BT = torch.arange(length) < torch.tensor([len(row) for row in ids])[:, None]
            batch["attention_mask"] = filled_BT.long() if self.weights is None else self._weighted(batch, filled_BT)
        return batch

    def _positions(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self.positions is None or self.image_token_id is None:
            return torch.arange(len(ids_T))
        own, span = torch.tensor(self.positions[0]), self.positions[1]
        visual = ids_T.eq(self.image_token_id).nonzero()[:, 0]
        steps_T = torch.ones_like(ids_T)
        steps_T[visual] = 0
        steps_T[visual[len(own) - 1 :: len(own)]] = span  # behind the last token of an image
        positions_T = steps_T.cumsum(0) - steps_T
        positions_T[visual] += own.repeat(len(visual) // len(own))
        return positions_T

    def _weighted(self, batch: dict[str, torch.Tensor], filled_BT: torch.Tensor) -> torch.Tensor:
        """A bias for the scores of attention, (B, 1, T, T): a key's log weight, and no way to later ones."""
        assert self.weights is not None and self.image_token_id is not None
        visual_BT = batch["input_ids"].eq(self.image_token_id)
        bias_BT = torch.zeros(visual_BT.shape).masked_fill(~filled_BT, -torch.inf)
        weights = torch.tensor(self.weights)
        bias_BT[visual_BT] = weights.log().repeat(int(visual_BT.sum()) // len(weights))
        length = bias_BT.shape[1]
        later_TT = torch.full((length, length), -torch.inf).triu(1)
        return bias_BT[:, None, None] + later_TT
