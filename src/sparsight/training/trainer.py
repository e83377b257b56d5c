"""Hugging Face's Trainer, thinly subclassed: learning rates by part, honest step records, a bar, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from sparsight.config import Recipe, Stage
from sparsight.cost import LanguageShape, Trains, step_flops
from sparsight.data.collate import Collator, TrainingSet
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.sparse.attach import Pass, SparseHandle, attach
from sparsight.sparse.callback import SparsightCallback
from sparsight.training.quarantine import Quarantine
from sparsight.training.stages import parameter_groups


class StepLog(Protocol):
    """Where records go; `reporting.RunLog` is one."""

    def write(self, type: str, **fields: Any) -> None: ...


class Interrupted(Exception):
    """The user stopped the run; its last step is in a checkpoint."""


@dataclass
class StepCounter:
    """What the steps since the last record executed, counted from the batches themselves."""

    model: SparsightForConditionalGeneration
    trains: Trains
    encoder_flops: float

    def __post_init__(self) -> None:
        self.shape = LanguageShape.from_config(self.model.config.text_config)
        self.layers_run = self.shape.layers
        self.clear()

    def clear(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.loss = 0.0
        self.replaced: list[dict[str, Any]] = []  # entries of bad samples, see `TrainingSet`

    def add(self, inputs: dict[str, Any], done: Pass | None = None) -> None:
        """Count one forward and backward pass over a batch, which the methods may have made shorter (``done``)."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        config = self.model.config
        visual = int((ids == config.image_token_id).sum())
        labels = int((inputs["labels"][:, 1:] != -100).sum())
        batch, positions = ids.shape
        kept, self.layers_run, length = visual, self.shape.layers, positions
        if done is not None:
            kept, self.layers_run, length = done.visual_out, done.layers_run, done.length
        cached = inputs.get("mm_encoder_outputs") is not None
        parts = step_flops(
            replace(self.shape, layers=self.layers_run),
            config.bridge_config,
            config.level_widths,
            tuple(config.map_size),  # type: ignore[arg-type]
            0.0 if cached else self.encoder_flops,
            batch,
            length,
            labels,
            visual // config.num_image_tokens,
            self.trains,
        )
        for part, flops in parts.items():
            self.flops[part] += flops
        filled = int(mask.sum())
        self.counts["samples"] += batch
        self.counts["visual_tokens"] += visual
        self.counts["visual_tokens_kept"] += kept
        self.counts["text_tokens"] += filled - visual
        self.counts["padding_tokens"] += ids.numel() - filled

    def record(self) -> dict[str, Any]:
        """The step's record for the run log: counts, FLOPs in all and by part, seconds, memory in bytes."""
        return {
            **self.counts,
            "replaced": len(self.replaced),
            "loss": self.loss,
            "layers_run": self.layers_run,
            "layers": self.shape.layers,
            "flops": sum(self.flops.values()),
            "flops_by_part": dict(self.flops),
            "seconds": dict(self.seconds),
            "memory_bytes": _memory(),
        }


def _memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


class SparsightTrainer(Trainer):
    """HF's Trainer with the stage's parameter groups, and a count of what every step executed."""

    def __init__(
        self, *args: Any, stage: Stage, counter: StepCounter, handle: SparseHandle | None = None, **kwargs: Any
    ) -> None:
        self.stage, self.counter, self.handle = stage, counter, handle
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(parameter_groups(self.model, self.stage), **options)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super().get_batch_samples(*args, **kwargs)
        self.counter.seconds["data"] += time.perf_counter() - start
        return result

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "vision" not in self.stage.learning_rate.parts():
            self.model.model.vision_tower.eval()  # frozen is frozen: its batch norms keep their statistics too
        return super().compute_loss(model, {**inputs, "loss_only": True}, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        self.counter.replaced += inputs.pop("replaced", [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        passes = self.handle.take_passes() if self.handle is not None else []
        self.counter.add(inputs, passes[0] if passes else None)
        value = loss.item()
        if value != value or abs(value) == float("inf"):
            raise ValueError(f"step {self.state.global_step + 1}: the loss is {value}; training stops here")
        self.counter.loss += value
        self.counter.seconds["compute"] += time.perf_counter() - start
        return loss


class _Recorder(TrainerCallback):
    """Writes step records, moves the bar, and stops at Ctrl-C with a checkpoint."""

    def __init__(
        self,
        log: StepLog,
        stage: Stage,
        counter: StepCounter,
        bar: Progress,
        task: Any,
        quarantine: Quarantine | None,
    ) -> None:
        self.log, self.stage, self.counter, self.bar, self.task = log, stage, counter, bar, task
        self.quarantine = quarantine
        self.stop = False
        self.started = 0.0
        self.rates: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        # Here, and not at the step's end: by then the schedule has moved to the next step's.
        self.rates = {group["part"]: group["lr"] for group in kwargs["optimizer"].param_groups}
        self.started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.counter.seconds["optimizer"] += time.perf_counter() - self.started

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.quarantine is not None:  # what other ranks found, too: all count alike, and stop together
            self.counter.replaced = gather_object(self.counter.replaced)
        record = self.counter.record()
        self.log.write("step", stage=self.stage.name, step=state.global_step, learning_rate=self.rates, **record)
        speed = record["samples"] / max(sum(record["seconds"].values()), 1e-9)
        self.bar.update(
            self.task, completed=state.global_step, loss=f"{record['loss']:.3f}", speed=f"{speed:.1f} samples/s"
        )
        if self.quarantine is not None:
            self.quarantine.add(self.counter.replaced, state.global_step)
            bad = len(self.quarantine.bad)
            self.bar.update(self.task, bad=f"{bad} bad" if bad else "")
        self.counter.clear()
        if self.stop:
            control.should_save = control.should_training_stop = True


@contextmanager
def _ctrl_c(recorder: _Recorder, console: Console) -> Iterator[None]:
    """The first Ctrl-C ends the step and saves; the second one stops at once."""
    mine = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a process that loads data: the terminal signals it too, but its work is still needed
            return
        if recorder.stop:
            raise KeyboardInterrupt
        recorder.stop = True
        console.print("[yellow]Stopping after this step; Ctrl-C again stops at once.[/]")

    try:
        previous = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def training_arguments(recipe: Recipe, stage: Stage, folder: Path) -> TrainingArguments:
    """HF's arguments for a stage."""
    micro = stage.micro_batch_size or stage.batch_size
    saving = stage.checkpoints > 0
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch_size // micro,
        num_train_epochs=1,
        learning_rate=max(stage.learning_rate.parts().values()),
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup if stage.warmup < 1 else 0.999,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch_fused",
        adam_beta2=0.98,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="steps" if saving else "no",
        save_steps=max(1, stage.steps // max(stage.checkpoints, 1)),
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole. One that a kill cut short is removed: its state file is written last."""
    while (found := get_last_checkpoint(str(folder))) is not None:
        try:
            json.loads((Path(found) / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(found)
        else:
            break
    return found


def train_stage(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    data: TrainingSet,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    log: StepLog,
    trains: Trains,
    encoder_flops: float,
    console: Console,
    resume: bool = False,
    quarantine_file: Path | None = None,
) -> int:
    """Train one stage in place.

    Args:
        folder: checkpoints go here.
        encoder_flops: one picture's pass through the encoder (``encoders.count_flops``).
        resume: go on from the last checkpoint in ``folder``, if there is one.
        quarantine_file: where bad samples are written down (`Quarantine`), if the recipe says so.

    Returns:
        The step that training went on from; 0 from the start.

    Raises:
        Interrupted: Ctrl-C; the last step is in a checkpoint.
        ValueError: a bad sample, or more of them than the recipe allows; or a loss that is not finite.
    """
    counter = StepCounter(model, trains, encoder_flops)
    checkpoint = last_checkpoint(folder) if resume and folder.is_dir() else None
    began = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    arguments = training_arguments(recipe, stage, folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[bad]}", style="yellow"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage.name, total=stage.steps, loss="-", speed="", bad="")
        quarantine = None
        if recipe.on_bad_sample == "quarantine":
            main = arguments.process_index == 0
            quarantine = Quarantine(quarantine_file, recipe, stage, began, len(data.source), main)
        recorder = _Recorder(log, stage, counter, bar, task, quarantine)
        handle = None
        if stage.compressor is not None or stage.skipper is not None:
            handle = attach(model, stage.compressor, stage.skipper, seed=recipe.seed)
        trainer = SparsightTrainer(
            model,
            arguments,
            stage=stage,
            counter=counter,
            handle=handle,
            train_dataset=data,
            data_collator=Collator(processor.tokenizer.pad_token_id),
            processing_class=processor,
            callbacks=[recorder] if handle is None else [SparsightCallback(handle), recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if resume:  # without a checkpoint, too: steps that are in the log, but not in the weights, do not count
            log.write("resume", stage=stage.name, step=began)
        try:
            with _ctrl_c(recorder, console):
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if handle is not None:
                handle.detach()
        if recorder.stop:
            raise Interrupted(f"stopped in stage '{stage.name}' at step {trainer.state.global_step} of {stage.steps}")
    return began
