"""From samples to batches: encoded one by one where the images are, then padded and stacked.

Shapes: B samples, T positions, I images in the whole batch, H x W patches, C channels.
"""

from __future__ import annotations

import contextlib
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparsight.data.batching import pack
from sparsight.data.cache import FeatureCache
from sparsight.data.chat import TooLong, encode_conversation
from sparsight.data.conversations import Sample
from sparsight.data.sources import Source
from sparsight.errors import UserError

TRIES = 50
# Bytes of tokens that each process keeps for the next epoch. Measured: 15,000 rows of 712 (576 visual) take 103 MB.
KEPT = 100_000_000


class BadSampleError(UserError):
    """A sample that cannot be learnt from: ``entry`` has its row in the source, id and reason, and whether it was too
    long where the recipe drops such."""

    entry: dict[str, Any]


class TrainingSet(Dataset):
    """A source, encoded for a processor. Images come as pixels, or as cached features of a frozen encoder.

    The source starts again at its end. In place of a sample that is to be replaced another is drawn, by the seed and
    the place alone, the next if that is bad too; the item's ``replaced`` has the entries of the bad ones.

    Args:
        length: items.
        offset: conversations that earlier stages have had; item 0 is the one behind them.
        max_length: tokens that a sample may have, visual ones included.
        drop_too_long: replace longer ones; else they are bad samples.
        replace_bad: replace bad samples; else they are errors (`BadSampleError`).
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        length: int,
        cache: FeatureCache | None = None,
        *,
        offset: int = 0,
        max_length: int | None = None,
        drop_too_long: bool = False,
        replace_bad: bool = False,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.processor = processor
        self.length = length
        self.offset = offset
        self.cache = cache
        self.max_length = max_length
        self.drop_too_long = drop_too_long
        self.replace_bad = replace_bad
        self.seed = seed
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
        """What ``read`` makes of item ``index``'s row, or of the first good one in its place; entries of the bad."""
        replaced: list[dict[str, Any]] = []
        for row in self._candidates(index):
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

    def _candidates(self, index: int) -> Iterator[int]:
        yield (index + self.offset) % len(self.source)
        draw = random.Random(f"{self.seed}/{index}")  # alike in every process, and after resume
        for _ in range(TRIES - 1):
            yield draw.randrange(len(self.source))

    def encode(self, row: int, text_alone: bool = False) -> dict[str, Any]:
        """One row of the source as an item.

        Args:
            text_alone: without its images, which are not read; at native resolution with the number of their patches.

        Raises:
            BadSampleError: its conversation or a image cannot be read or learnt from.
        """
        name = None
        try:
            kept = self._kept.get(row)
            if kept is None:
                sample = self.source[row]
                name = sample.id
                item, images = self._text(sample), sample.images
                self._keep(row, item, images)
            else:
                name, ids, labels, images = kept
                item = {"id": name, "input_ids": ids.tolist(), "labels": labels.tolist()}
            if not text_alone:
                return item | self._images(images)
            return item | ({"patches": self._patches(images)} if self.processor.native else {})
        except (ValueError, OSError) as error:
            bad = BadSampleError(f"sample '{name}': {error}" if name is not None else str(error))
            name = str(row) if name is None else name
            bad.entry = {"row": row, "id": name, "reason": str(error), "dropped": isinstance(error, TooLong)}
            raise bad from None

    def _keep(self, row: int, item: dict[str, Any], images: tuple[Any, ...]) -> None:
        ids, labels = array("i", item["input_ids"]), array("i", item["labels"])
        size = 2 * ids.itemsize * len(ids) + 1000  # and what Python takes for all the rest
        if size <= self._room:
            self._kept[row] = item["id"], ids, labels, images
            self._room -= size

    def _text(self, sample: Sample) -> dict[str, Any]:
        processor = self.processor
        encoded = encode_conversation(
            processor.tokenizer, sample.messages, processor.image_token, processor.num_image_tokens
        )
        if self.max_length is not None and len(encoded.input_ids) > self.max_length:
            visual = encoded.input_ids.count(processor.image_token_id)
            raise (TooLong if self.drop_too_long else ValueError)(
                f"{len(encoded.input_ids)} tokens, {visual} of them visual; expected {self.max_length} (max_length) at "
                "most. Shorten it, raise max_length, take a layout with fewer visual tokens, or set on_too_long: "
                "drop_sample"
            )
        return {"id": sample.id, "input_ids": encoded.input_ids, "labels": encoded.labels}

    def _images(self, keys: Sequence[Any]) -> dict[str, Any]:
        if self.cache is not None:  # also of no image: a batch of text then runs the bridge like any other
            return {"features": self.cache.read(keys)}
        if not keys:
            return {}
        return {"pixels": dict(self.processor.pixels([self.source.image(key) for key in keys]))}

    def _patches(self, keys: Sequence[Any]) -> int:
        return sum(self.processor.patches(*self.source.size(key)) for key in keys)

    def sizes(self, file: Path, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """Positions of each item, visual tokens included, and its images, or at native resolution their patches,
        (items, 2). No image is decoded. Kept in ``file``, for the next time: a resumed run deals as it began."""
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # not there yet, or cut short by a kill
            if (kept := np.load(file)).shape == (self.length, 2):
                return kept
        known: dict[int, tuple[int, int]] = {}
        processor = self.processor

        def measure(row: int) -> tuple[int, int]:
            if row not in known:
                item = self.encode(row, text_alone=True)
                images = item["input_ids"].count(processor.image_token_id) // processor.num_image_tokens
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


class Collator:
    """Pads at the right and stacks. Samples may have 0 to k images.

    With ``packing``, samples share rows as long as the longest one (or ``pack_length``), without attention across them:
    positions start anew with each, and there is no mask, as transformers tells packed rows. "info" is not for the
    model: it holds all that is counted of a batch, here and nowhere else (ids of the samples; positions that are
    ``filled``, no padding; visual tokens; supervised labels; images, and their grids of patches at native resolution;
    entries of bad samples that were replaced).

    Args:
        places: of a image's visual tokens (`image_token_id`) among the last one's, and how many those are: text
            behind a image then stands as far from it as it will once there are so many tokens. Not with ``packing``.
        weights: of a image's visual tokens in attention, as if each were so many.
    """

    def __init__(
        self,
        pad_token_id: int,
        packing: bool = False,
        pack_length: int | None = None,
        image_token_id: int | None = None,
        places: tuple[list[int], int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.pad_token_id, self.packing, self.pack_length = pad_token_id, packing, pack_length
        self.image_token_id, self.places = image_token_id, places
        self.weights = None if weights is None else torch.tensor(weights)

    def _positions(self, ids: list[int]) -> Iterable[int]:
        if self.places is None:
            return range(len(ids))
        places, span = self.places
        positions, start, seen = [], 0, 0
        for token in ids:
            if token == self.image_token_id:
                positions.append(start + places[seen])
                seen = (seen + 1) % len(places)
                start += 0 if seen else span
            else:
                positions.append(start)
                start += 1
        return positions

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(item["input_ids"]) for item in items]
        rows = [[number] for number in range(len(items))]
        if self.packing:
            rows = pack(lengths, max(*lengths, self.pack_length or 0))
            items = [items[number] for row in rows for number in row]
        batch: dict[str, Any] = self._stacked(items, [len(row) for row in rows])
        pixels = [item["pixels"] for item in items if "pixels" in item]
        features = [item["features"] for item in items if "features" in item]
        if pixels:  # and the grids of a native-resolution encoder
            batch |= {key: torch.cat([item[key] for item in pixels]) for key in pixels[0]}
        if features:
            levels = tuple(torch.cat(level) for level in zip(*features, strict=True))
            batch["mm_encoder_outputs"] = {"image": _Features(hidden_states=levels)}
        batch["info"] = self._info(items, batch, sum(lengths))
        return batch

    def _info(self, items: list[dict[str, Any]], batch: dict[str, Any], filled: int) -> dict[str, Any]:
        features = batch["mm_encoder_outputs"]["image"].hidden_states[0] if "mm_encoder_outputs" in batch else ()
        grids = batch["image_grid_thw"].tolist() if "image_grid_thw" in batch else []
        visual = 0 if self.image_token_id is None else int((batch["input_ids"] == self.image_token_id).sum())
        return {
            "ids": [item["id"] for item in items],
            "filled": filled,
            "visual_tokens": visual,
            "supervised": int((batch["labels"][:, 1:] != -100).sum()),
            "images": len(grids or batch.get("pixel_values", features)),
            "grids": [(rows, columns) for _, rows, columns in grids],
            "replaced": [entry for item in items for entry in item.get("replaced", [])],
        }

    def _stacked(self, items: list[dict[str, Any]], counts: list[int]) -> dict[str, torch.Tensor]:
        """Ids, labels and mask, or places, (B, T), of rows that hold so many items each."""
        longest = max(len(item["labels"]) for item in items)
        rest, rows = iter(items), []
        for count in counts:
            row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
            for item in islice(rest, count):
                row["input_ids"] += item["input_ids"]
                row["labels"] += [-100, *item["labels"][1:]]  # nothing stands before the first one that could say it
                row["position_ids"] += self._positions(item["input_ids"])
            rows.append(row)
        lengths = [len(row["labels"]) for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            padding = max(lengths) - length
            row["input_ids"] += [self.pad_token_id] * padding
            row["labels"] += [-100] * padding
            # As samples of their own, none longer than the others.
            row["position_ids"] += [place % longest for place in range(padding)]
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        if not self.packing:
            if self.places is None:
                del batch["position_ids"]
            filled_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            batch["attention_mask"] = filled_BT.long() if self.weights is None else self._weighted(batch, filled_BT)
        return batch

    def _weighted(self, batch: dict[str, torch.Tensor], filled_BT: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of attention, (B, 1, T, T): a key's log weight, and no way to later ones."""
        assert self.weights is not None and self.image_token_id is not None
        visual_BT = batch["input_ids"].eq(self.image_token_id)
        bias_BT = torch.zeros(visual_BT.shape).masked_fill(~filled_BT, -torch.inf)
        bias_BT[visual_BT] = self.weights.log().repeat(int(visual_BT.sum()) // len(self.weights))
        length = bias_BT.shape[1]
        later_TT = torch.full((length, length), -torch.inf).triu(1)
        return bias_BT[:, None, None] + later_TT
