"""Which samples are bad, and how long the others are: found before training, by the code that training uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

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
        """All figures, for JSON. Lengths are tokens, visual ones included.

        Args:
            context: tokens that a sample may have; None: any number.
        """
        text, visual, images = (
            sum(row[key] for row in self.rows) for key in ("text_tokens", "visual_tokens", "images")
        )
        lengths = np.array([row["text_tokens"] + row["visual_tokens"] for row in self.rows] or [0])
        counts, edges = np.histogram(lengths, bins=min(40, int(np.ptp(lengths)) + 1))
        return {
            "samples": len(self.rows) + len(self.bad),
            "bad": self.bad,
            "unused_fields": dict(self.unused.most_common()),
            "context": context,
            "too_long": [self.rows[index] for index in np.flatnonzero(lengths > (context or np.inf))],
            "lengths": {
                "mean": float(lengths.mean()),
                "quantiles": {str(share): float(np.quantile(lengths, share)) for share in QUANTILES},
                "longest": int(lengths.max()),
                "longest_id": self.rows[int(lengths.argmax())]["id"] if self.rows else None,
                "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            },
            "images": images,
            "text_tokens": text,
            "visual_tokens": visual,
            "text_to_visual": text / visual if visual else None,
        }


def _look(data: TrainingSet, row: int) -> dict[str, Any]:
    """A row's figures for `Findings`, in place of its tokens and pixels."""
    try:
        item = data.encode(row)
    except BadSampleError as bad:
        return bad.entry
    visual = item["input_ids"].count(data.processor.image_token_id)
    return {
        "row": row,
        "id": item["id"],
        "text_tokens": len(item["input_ids"]) - visual,
        "visual_tokens": visual,
        "images": visual // data.processor.num_image_tokens,
        "unused": data.source[row].unused,
    }


def check_rows(data: TrainingSet, workers: int = 0, progress: Callable[[int], None] = lambda done: None) -> Findings:
    """Encode every row of the data's source as training does, images and all.

    Args:
        workers: processes that do so; 0: this one.
        progress: gets the number of rows done.
    """
    found, rows = Findings(), cast(Dataset[int], range(len(data.source)))
    looked: Any = DataLoader(rows, batch_size=None, collate_fn=partial(_look, data), num_workers=workers)
    for done, row in enumerate(looked, 1):
        found.unused.update(row.pop("unused", ()))
        (found.bad if "reason" in row else found.rows).append(row)
        progress(done)
    return found
