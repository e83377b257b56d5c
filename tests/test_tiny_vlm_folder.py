"""The folder that trainers are tried with holds a VLM that transformers loads, and data that it understands."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach

SCRIPT = Path(__file__).parents[1] / "scripts" / "tiny_vlm_folder.py"


def load_script():
    spec = importlib.util.spec_from_file_location("tiny_vlm_folder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_tiny_folder_trains_and_compresses(tmp_path: Path, family: str) -> None:
    if family == "qwen2_vl":
        pytest.importorskip("torchvision", reason="Qwen2-VL's processor needs torchvision")
    load_script().make_folder(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").train()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / "messages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 10
    text = processor.apply_chat_template(rows[0]["messages"], tokenize=False)
    image = Image.open(rows[0]["messages"][0]["content"][0]["path"])
    batch = processor(text=[text], images=[image], return_tensors="pt")
    image_id = model.config.image_token_id
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == image_id, -100)
    handle = attach(model, CompressorConfig(keep=0.25), SkipperConfig())
    handle.step(0, 0.0)
    model(**batch, labels=labels).loss.backward()
    (seen,) = handle.take_passes()
    assert (seen.visual_in, seen.visual_out) == (36, 9)
