"""Tar shards of 100,000 tiny samples: time to index them, time of the first batch after a resume, resident memory.

The first batch after a resume is taken as the Trainer does: the source is opened, the steps are planned from the sizes
of samples, which the run has kept, the loader is moved on to 90% of the epoch, and the batch behind that is read and
decoded, in this process.

    python benchmarks/shards.py [--device cpu] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.data_loader import skip_first_batches
from common import timing_options, write_result
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from sparsight.data.batching import RankBatches, plan_steps
from sparsight.data.shards import build_index
from sparsight.data.sources import ShardSource
from sparsight.settings.data import ConversationData

SAMPLES, SHARDS, SIDE, BATCH, READ = 100_000, 10, 32, 32, 10_000


class Decoded(Dataset):
    """Ids and pixels."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
        sample = self.source[index]
        return sample.id, np.asarray(self.source.image(sample.images[0]))


def write_shards(folder: Path, console: Console) -> None:
    noise = np.random.default_rng(0)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Noise."}]
    for shard in track(range(SHARDS), "writing shards", console=console):
        with tarfile.open(folder / f"{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * SAMPLES // SHARDS, (shard + 1) * SAMPLES // SHARDS):
                image = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(image, "JPEG")
                text = json.dumps({"id": str(number), "conversations": turns}).encode()
                for kind, content in (("jpg", image.getvalue()), ("json", text)):
                    member = tarfile.TarInfo(f"{number:08d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def index_all(folder: Path) -> float:
    """Seconds to index all shards."""
    start = time.perf_counter()
    for tar in sorted(folder.glob("*.tar")):
        build_index(tar, tar.with_name(f"{tar.name}.idx"))
    return time.perf_counter() - start


def resume(data: ConversationData, sizes: Path) -> float:
    """Seconds from nothing opened to the first micro-batch behind 90% of an epoch."""
    start = time.perf_counter()
    cut = {"batch_size": BATCH, "micro_batch_size": BATCH // 4}
    plan = plan_steps(SAMPLES, 0, 1, np.load(sizes), largest_first=True, **cut)
    loader = DataLoader(Decoded(ShardSource(data)), batch_sampler=RankBatches(plan), collate_fn=list)
    batch = next(iter(skip_first_batches(loader, len(loader) * 9 // 10)))
    assert len(batch) == BATCH // 4
    return time.perf_counter() - start


def read(data: ConversationData) -> dict[str, Any]:
    """Samples a second, and resident MB after each thousand of the samples, read in shuffled order."""
    items, order = Decoded(ShardSource(data)), torch.randperm(SAMPLES).tolist()[:READ]
    resident, start = [], time.perf_counter()
    for done, index in enumerate(order, 1):
        items[index]
        if done % 1000 == 0:
            resident.append(round(psutil.Process().memory_info().rss / 1e6, 2))
    return {"samples_per_second": READ / (time.perf_counter() - start), "resident_MB": resident}


def main() -> None:
    options, _ = timing_options(__doc__)
    console = Console()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ConversationData(kind="shards", path=name)
        write_shards(folder, console)
        rounds = range(options.rounds)
        indexing = [index_all(folder) for _ in track(rounds, "indexing", console=console)]
        sizes = folder / "sizes.npy"
        np.save(sizes, np.random.default_rng(0).integers(1, 100, (SAMPLES, 2)))
        resuming = [resume(data, sizes) for _ in track(rounds, "resuming", console=console)]
        result = {
            "samples": SAMPLES,
            "shards": SHARDS,
            "tar_bytes": sum(tar.stat().st_size for tar in folder.glob("*.tar")),
            "index_bytes": sum(index.stat().st_size for index in folder.glob("*.idx")),
            "indexing_seconds": {"median": statistics.median(indexing), "spread": (min(indexing), max(indexing))},
            "resume_seconds": {"median": statistics.median(resuming), "spread": (min(resuming), max(resuming))},
            "reading": read(data),
        }
    console.print(result)
    write_result("shards", result, options.out, console)


if __name__ == "__main__":
    main()
