"""A run under HF's Trainer or TRL's SFTTrainer that may die of SIGKILL in the middle of a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from families import batch_of, made
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.callback import SparsightCallback
from tiny import conversation, make_image, make_vlm

STEPS = 8
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 1,
    "dataloader_pin_memory": False,
}


class Recorder(TrainerCallback):
    """Which places were kept and which layers were off in each micro-batch, by optimizer step; and death."""

    def __init__(self, handle: Any, die_at: int | None) -> None:
        self.handle, self.die_at, self.step = handle, die_at, 0
        self.masks: dict[int, list[Any]] = {}
        handle.layers[0].register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen = self.masks.setdefault(self.step, [])
        seen.append((self.handle.skipped, kwargs["position_ids"].tolist()))
        if self.step == self.die_at and len(seen) == COMMON["gradient_accumulation_steps"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step


class Images(torch.utils.data.Dataset):
    """24 samples, each with an image of its own."""

    def __init__(self, name: str, model: Any) -> None:
        self.rows = [{k: v[0] for k, v in batch_of(name, model, (1,), seed).items()} for seed in range(24)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def chats() -> Any:
    from datasets import Dataset

    rows = [{"messages": conversation(f"Read {n}.", f"It is {n}."), "images": [make_image(n)]} for n in range(24)]
    for row in rows:  # one type for all contents, as Arrow wants it
        row["messages"][1]["content"] = [{"type": "text", "text": row["messages"][1]["content"]}]
    return Dataset.from_list(rows)


def train(kind: str, folder: Path, die_at: int | None = None, resume: bool = False) -> tuple[Trainer, Recorder]:
    """Train a tiny VLM with both methods on, from the last checkpoint if ``resume``."""
    name = "llava, clip + llama"
    model, processor = (made(name), None) if kind == "hf" else make_vlm("1:16")
    handle = attach(
        model,
        CompressorConfig(keep=0.25, final=1.0, method="random"),
        SkipperConfig(alpha=0.6, epsilon=0.3),
        seed=3,
    )
    recorder = Recorder(handle, die_at)
    callbacks = [SparsightCallback(handle), recorder]
    trainer: Trainer
    if kind == "hf":
        arguments = TrainingArguments(str(folder), **COMMON)
        trainer = Trainer(model, arguments, train_dataset=Images(name, model), callbacks=callbacks)
    else:
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(str(folder), **COMMON, bf16=False, max_length=None)
        trainer = SFTTrainer(model, arguments, train_dataset=chats(), processing_class=processor, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, recorder
