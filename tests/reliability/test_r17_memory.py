"""R17: resident memory stays flat over 10,000 samples of tar shards, pictures decoded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from shards import conversation, write_tar

READ = """
import gc, sys
import psutil
from sparsight.config import ConversationData
from sparsight.data.sources import ShardSource

source = ShardSource(ConversationData(kind="shards", path=sys.argv[1]))
process = psutil.Process()
for index in range(10_000):
    sample = source[index * 7919 % len(source)]  # as a shuffled epoch does: each sample once, anywhere
    assert source.picture(sample.images[0]).size == (64, 64)
    if index % 1000 == 999:
        gc.collect()
        print(process.memory_info().rss)
"""
PIXELS = 64 * 64 * 3  # bytes of one decoded picture


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_samples(tmp_path: Path) -> None:
    """A cache of pixels would hold 111 MiB after the first thousand samples; of the tars' bytes, 18 MiB."""
    import io

    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for shard in range(10):
        members = []
        for number in range(1000):
            content = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(content, "JPEG")
            members += [(f"{number}.json", conversation(id=f"{shard}-{number}")), (f"{number}.jpg", content.getvalue())]
        write_tar(tmp_path / f"{shard}.tar", members)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    resident = [int(line) for line in done.stdout.split()]
    assert len(resident) == 10
    growth = resident[-1] - resident[0]
    # Measured: see the numbers in the message of a failure; the index itself takes 0.8 MB once it has been touched.
    assert growth < 2_000_000 < 9000 * PIXELS / 50, f"{[round(value / 1e6, 1) for value in resident]} MB"
