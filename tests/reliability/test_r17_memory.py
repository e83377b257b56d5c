"""R17: resident memory stays flat over 10,000 samples of tar shards, pictures decoded."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_samples(tmp_path: Path) -> None:
    """From the first thousand samples on. A cache of pixels would grow by 9000 x 64 x 64 x 3 bytes, 111 MB."""
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
    assert resident[-1] - resident[0] < 1_000_000, resident  # measured: 12,288 bytes
