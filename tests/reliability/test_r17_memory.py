"""R17: memory stays flat: over 10,000 samples of tar shards, images decoded; in processes that load data from rows;
and over samples whose tokens are kept."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from shards import conversation, write_tar
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import Sample
from templates import family_tokenizer

READ = """
import gc, sys
import psutil
from sparsight.settings.data import ConversationData
from sparsight.data.sources import ShardSource

source = ShardSource(ConversationData(kind="shards", path=sys.argv[1]))
process = psutil.Process()
for index in range(10_000):
    sample = source[index * 7919 % len(source)]  # as a shuffled epoch does: each sample once, anywhere
    assert source.image(sample.images[0]).size == (64, 64)
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


FORKED = """
import gc, os, sys
import psutil
from sparsight.settings.data import ConversationData
from sparsight.data.sources import ConversationSource

def private():
    gc.collect()
    return psutil.Process().memory_full_info().uss

before = private()
source = ConversationSource(ConversationData(path=sys.argv[1]))
print(private() - before, flush=True)
if child := os.fork():
    sys.exit(os.waitpid(child, 0)[1])
source[0]
before = private()
for index in range(len(source)):
    source[index * 7919 % len(source)]
print(private() - before, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows_are_neither_held_nor_copied_into_processes_that_load_data(tmp_path: Path, name: str) -> None:
    """A process that is forked shares its parent's memory until one of them writes to it, and to read a Python object
    is to write its reference count. Rows kept as objects, as those of .json were: 71 MB held, and 33 MB copied."""
    turns = [{"from": speaker, "value": "some words " * 20} for speaker in ("human", "gpt") * 3]
    rows = [{"id": str(number), "conversations": turns} for number in range(20_000)]
    text = json.dumps(rows) if name == "data.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", FORKED, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, copied = map(int, done.stdout.split())
    assert held < 3_000_000, held  # measured: 582 kB
    assert copied < 3_000_000, copied  # measured: 57 kB


KEEPING = """
import gc, sys
import psutil, torch
from sparsight.settings.data import ConversationData
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import ConversationSource
from templates import family_tokenizer

class Processor:
    tokenizer, image_token, num_image_tokens = family_tokenizer("smollm2"), "<image>", 576

    def pixels(self, images):
        return {"pixel_values": torch.ones(len(images), 3, 336, 336)}

data = TrainingSet(ConversationSource(ConversationData(path=sys.argv[1])), Processor(), 300)
for index in range(300):
    item = data[index % 150]
    assert len(item["input_ids"]) > 576 and item["pixels"]["pixel_values"].shape == (1, 3, 336, 336)
    if index in (20, 149, 299):
        gc.collect()
        print(psutil.Process().memory_info().rss)
"""


def test_pixels_are_not_kept_with_tokens(tmp_path: Path) -> None:
    """Pixels of 129 images would be 175 MB."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "some words " * 40}]
    rows = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(150)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", KEEPING, str(tmp_path / "data.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # for the tests' own modules
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, once, again = map(int, done.stdout.split())
    assert once - first < 20_000_000, (first, once)  # measured: 2 MB
    assert again - once < 20_000_000, (once, again)  # measured: 1 MB, where tokens come from what is kept


def test_what_is_kept_of_tokens_is_as_large_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows of Python's numbers would be 4.4 MB."""

    class Rows:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, row: int) -> Sample:
            said = [("user", f"Question {row}?"), ("assistant", "How many apples are in the image? " * 90)]
            turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
            return Sample(str(row), turns, ())

    processor = SimpleNamespace(
        tokenizer=family_tokenizer("smollm2"), image_token="<image>", num_image_tokens=1, native=False
    )
    monkeypatch.setattr("sparsight.data.collate.KEPT", 1_000_000)
    data = TrainingSet(Rows(), processor, 300)  # type: ignore[arg-type]
    assert 600 < len(data.encode(0, text_alone=True)["input_ids"]) < 900
    tracemalloc.start()
    try:
        for row in range(300):
            data.encode(row, text_alone=True)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 1_300_000  # measured: 898,516 bytes
