"""What is wrong with data, and how long its samples are: found before training, by the code that training uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from sparsight.data.collate import BadSampleError, TrainingSet

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Findings:
    """Of each good sample ``rows``: row, id, text and visual tokens, images. Of each bad one: row, id, reason.
    ``unused``: fields that training does not use, with the number of good rows that have them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def record(self, context: int | None) -> dict[str, Any]:
        """All figures, for JSON. Lengths are tokens of a sample, visual ones included.

        Args:
            context: tokens that a sample may have: what the stage allows, or the language model knows, if they say so.
        """
        lengths = np.array([row["text_tokens"] + row["visual_tokens"] for row in self.rows] or [0])
        longest = self.rows[int(lengths.argmax())]["id"] if self.rows else None
        text, visual = (sum(row[key] for row in self.rows) for key in ("text_tokens", "visual_tokens"))
        long = [dict(row) for row, length in zip(self.rows, lengths, strict=False) if context and length > context]
        counts, edges = np.histogram(lengths, bins=min(40, int(np.ptp(lengths)) + 1))
        return {
            "samples": len(self.rows) + len(self.bad),
            "bad": self.bad,
            "unused_fields": dict(self.unused.most_common()),
            "context": context,
            "too_long": long,
            "lengths": {
                "mean": float(lengths.mean()),
                "quantiles": {str(share): float(np.quantile(lengths, share)) for share in QUANTILES},
                "longest": int(lengths.max()),
                "longest_id": longest,
                "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            },
            "images": sum(row["images"] for row in self.rows),
            "text_tokens": text,
            "visual_tokens": visual,
            "text_to_visual": text / visual if visual else None,
        }


class _Rows(Dataset):
    """Every row of a training set's source: what `Findings` holds of it, in place of tokens and pixels."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            item = self.data.encode(row)
        except BadSampleError as bad:
            return bad.entry
        processor = self.data.processor
        visual = item["input_ids"].count(processor.image_token_id)
        return {
            "row": row,
            "id": item["id"],
            "text_tokens": len(item["input_ids"]) - visual,
            "visual_tokens": visual,
            "images": visual // processor.num_image_tokens,
            "unused": self.data.source[row].unused,
        }


def check_rows(data: TrainingSet, workers: int = 0, progress: Callable[[int], None] = lambda done: None) -> Findings:
    """Encode every row of the data's source as training does, images and all, and keep what is to be told.

    Args:
        workers: processes that do so; 0: this one.
        progress: told the number of rows done.
    """
    found = Findings()
    for done, row in enumerate(DataLoader(_Rows(data), batch_size=None, num_workers=workers), 1):
        found.unused.update(row.pop("unused", ()))
        (found.bad if "reason" in row else found.rows).append(row)
        progress(done)
    return found
