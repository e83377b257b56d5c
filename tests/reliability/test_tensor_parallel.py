"""D08: tensor parallelism by transformers' own `DistributedConfig`, as far as its Trainer goes, on two ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGE, batch_of, made
from safetensors.torch import load_file
from sharded import pretend
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from ranks_here import forked
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.callback import SparsightCallback
from sparsight.training.checkpoints import SafeCheckpoints

distributed = pytest.importorskip("transformers.distributed")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TOLERANCE = 1e-5  # of losses
WEIGHTS = 1e-3  # AdamW divides by gradients near zero; found: 2e-4


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()  # type: ignore[operator]


def trained(name: str, folder: Path, out: Path, ranks: int) -> dict[str, Any]:
    """With both methods, in a plain Trainer: losses, and the share of layers that ran; then steps that must leave the
    weights and moments of skipped layers alone."""
    options = {"distributed_config": distributed.DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
    if ranks > 1:
        pretend()
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    skipper = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant", layers="alternating")
    handle = attach(model, CompressorConfig(keep=0.5), skipper, seed=1)
    rows = [{k: v[0] for k, v in batch_of(name, model, (1,), seed).items()} for seed in range(40)]
    image = model.config.image_token_id if name == "sparsight" else IMAGE
    counts = [int((row["input_ids"] == image).sum()) for row in rows]  # a word of the text may be that of an image
    rows = [row for row, count in zip(rows, counts, strict=True) if count == min(counts)]
    common: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "use_cpu": True}
    common |= {"weight_decay": 0.1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "seed": 1}
    common |= {"save_steps": 2, "save_only_model": True, "dataloader_pin_memory": False}
    callbacks = [SafeCheckpoints(), SparsightCallback(handle)]
    trainer = Trainer(model, TrainingArguments(str(out), **common), train_dataset=rows, callbacks=callbacks)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    refused = ""
    if ranks > 1:
        try:
            Trainer(model, TrainingArguments(str(out), **common | {"save_only_model": False}), train_dataset=rows)
        except ValueError as error:
            refused = str(error)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    layers = [list(layer.parameters()) for layer in handle.layers]

    def state(layer: list[torch.Tensor]) -> list[torch.Tensor]:
        return [whole(each) for p in layer for each in (p, *optimizer.state.get(p, {}).values())]

    kept = moved = 0
    for step in range(6):
        handle.step(step, 0.25)
        before = [state(layer) for layer in layers]
        model(**{key: value[None] for key, value in rows[step].items()}).loss.backward()
        off = handle.skipped
        handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad()
        for layer, skipped, old in zip(layers, off, before, strict=True):
            alike = [torch.equal(x, y) for x, y in zip(old, state(layer), strict=False)]
            assert all(alike) if skipped else not any(alike[::4])
            kept += skipped and len(old) > len(layer)  # with moments
            moved += not skipped
    shards = sum(hasattr(p, "full_tensor") for p in layers[0])
    losses, run = [e["loss"] for e in logs], [e["layers_run"] for e in logs]
    return {"losses": losses, "layers": run, "refused": refused, "kept": kept, "moved": moved, "shards": shards}


@pytest.mark.parametrize("name", ["llava, clip + llama", "sparsight"])
def test_D08_attached_under_tensor_parallelism_is_one_process(tmp_path: Path, name: str) -> None:
    made(name).save_pretrained(tmp_path / "model")

    def work(ranks: int) -> Any:
        def each(rank: int) -> None:
            found = trained(name, tmp_path / "model", tmp_path / f"run{ranks}", ranks)
            torch.save(found, tmp_path / f"{ranks}-{rank}.pt")

        return each

    for ranks in (1, 2):
        codes = forked(tmp_path, work(ranks), ranks)
        assert codes == [0] * ranks, "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(ranks))[-3000:]
    one, *both = (torch.load(tmp_path / file) for file in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for found in both:
        assert found["shards"] > 0 == one["shards"] and found["layers"] == one["layers"]
        assert max(abs(a - b) for a, b in zip(found["losses"], one["losses"], strict=True)) < TOLERANCE
        assert found["kept"] == one["kept"] > 0 and found["moved"] == one["moved"] > 0
        assert "Resuming is not supported" in found["refused"]
    saved = [load_file(tmp_path / f"run{ranks}" / "checkpoint-4" / "model.safetensors") for ranks in (1, 2)]
    assert saved[0].keys() == saved[1].keys()  # whole, for anybody
    assert max(float((saved[0][key] - saved[1][key]).abs().max()) for key in saved[0]) < WEIGHTS
    shutil.rmtree(tmp_path / "model")
