"""Hugging Face's Trainer, thinly subclassed: learning rates by part, honest step records, a bar, Ctrl-C."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil
import torch
from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import DataLoader
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

from sparsight.aside import moved_aside
from sparsight.console import Console, Progress
from sparsight.cost import LanguageShape, Trains, step_flops
from sparsight.data.batching import LARGEST, RankBatches, Step, micro_batches, plan_steps
from sparsight.data.collate import Collator, TrainingSet
from sparsight.devices.peaks import peak_flops
from sparsight.devices.precision import default_device, device_name
from sparsight.devices.ranks import any_rank, process_state, several_ranks
from sparsight.errors import UserError
from sparsight.layouts import Layout
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.encoders import count_flops
from sparsight.modeling.packed import attention_for_packed_rows, compared
from sparsight.modeling.short import attention
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Recipe, Stage
from sparsight.sparse.attach import Pass, SparseHandle, attach
from sparsight.sparse.callback import SparsightCallback
from sparsight.training.idle import IdleWarning
from sparsight.training.optimizer import MuonAdamW, optimizer_flops
from sparsight.training.quarantine import Quarantine
from sparsight.training.stages import parameter_groups


class StepLog(Protocol):
    """Where records go; `reporting.RunLog` is one."""

    def write(self, type: str, **fields: Any) -> None: ...


class Interrupted(Exception):
    """The user stopped the run; its last step is in a checkpoint."""


@dataclass
class StepCounter:
    """What the steps since the last record executed, counted from the batches themselves.

    ``encoder_flops``: of one image's pass through the encoder (``encoders.count_flops``); what images at their
    native resolution take is counted by their grids, when one is first met. ``precision``: bf16 or
    fp32, of whose peak on this device the share (``mfu``) is taken, where that is known. ``resident``: bytes of the
    process before the run, which are not its own.
    """

    model: SparsightForConditionalGeneration
    trains: Trains
    encoder_flops: float
    precision: str = "bf16"
    resident: int = 0

    def __post_init__(self) -> None:
        self.peak = peak_flops(device_name(default_device()), self.precision)
        self.shape = LanguageShape.from_config(self.model.config.text_config)
        self.layers_run = self.shape.layers
        self.flops_of_grid: dict[tuple[int, int], float] = {}
        self.clear()

    def clear(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.loss = 0.0
        self.cpu = cpu_seconds()
        self.ids: list[str] = []  # of this rank's samples
        self.replaced: list[dict[str, Any]] = []  # entries of bad samples, see `TrainingSet`
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # a step's peak is its own, not that of a stage before

    def add(self, inputs: dict[str, Any], info: dict[str, Any], done: Pass | None = None) -> None:
        """Count one forward and backward pass over a batch, which the methods may have made shorter (``done``).

        ``info``: ids of the batch's samples and its number of filled positions, from the `Collator`.
        """
        ids = inputs["input_ids"]
        config = self.model.config
        visual = int((ids == config.image_token_id).sum())
        labels = int((inputs["labels"][:, 1:] != -100).sum())
        batch, positions = ids.shape
        kept, self.layers_run, length = visual, self.shape.layers, positions
        if done is not None:
            kept, self.layers_run, length = done.visual_out, done.layers_run, done.length
        encoder_flops, (high, wide) = self.encoder_flops, config.map_size
        if inputs.get("mm_encoder_outputs") is not None:
            encoder_flops = 0.0
        elif (grids := inputs.get("image_grid_thw")) is not None:
            sizes = [(rows, columns) for _, rows, columns in grids.tolist()]
            encoder_flops = sum(map(self._of_grid, sizes)) / len(sizes)
            high, wide = (max(sides) for sides in zip(*sizes, strict=True))  # smaller maps are padded for the bridge
        parts = step_flops(
            replace(self.shape, layers=self.layers_run),
            config.bridge_config,
            config.level_widths,
            (high, wide),
            encoder_flops,
            batch,
            length,
            labels,
            visual // config.num_image_tokens,
            self.trains,
            compared(self.model.model.language_model, inputs),
        )
        for part, flops in parts.items():
            self.flops[part] += flops
        self.last_flops = sum(parts.values())
        filled = info["filled"]
        self.ids += info["ids"]
        self.counts["samples"] += len(info["ids"])
        self.counts["visual_tokens"] += visual
        self.counts["visual_tokens_kept"] += kept
        self.counts["text_tokens"] += filled - visual
        self.counts["padding_tokens"] += ids.numel() - filled

    def _of_grid(self, grid: tuple[int, int]) -> float:
        """FLOPs of a image of so many rows and columns of patches in the encoder."""
        if grid not in self.flops_of_grid:
            encoder, config = self.model.model.vision_tower, self.model.config
            size = grid[0] * encoder.config.patch_size, grid[1] * encoder.config.patch_size
            self.flops_of_grid[grid] = count_flops(encoder, size, config.vision_levels)
        return self.flops_of_grid[grid]

    def record(self) -> dict[str, Any]:
        """The step's record for the run log: counts, FLOPs in all and by part, seconds, memory in bytes.

        Counts and FLOPs are those of all ranks, the loss their mean; seconds and memory are this one's.
        """
        numbers = {**self.counts, **{f"flops {part}": flops for part, flops in self.flops.items()}, "loss": self.loss}
        if several_ranks():
            everyone = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.model.device)
            torch.distributed.all_reduce(everyone)
            numbers = dict(zip(numbers, everyone.tolist(), strict=True))
            numbers["loss"] /= torch.distributed.get_world_size()
        flops = {part: numbers[f"flops {part}"] for part in self.flops}
        reached = sum(flops.values()) / process_state().num_processes / max(sum(self.seconds.values()), 1e-9)
        return {
            **{name: round(numbers[name]) for name in self.counts},
            "replaced": len(self.replaced),
            "loss": numbers["loss"],
            "layers_run": self.layers_run,
            "layers": self.shape.layers,
            "flops": sum(flops.values()),
            "flops_by_part": flops,
            **({} if self.peak is None else {"mfu": reached / self.peak}),
            "seconds": dict(self.seconds),
            "cpu_seconds": max(0.0, cpu_seconds() - self.cpu),
            "memory_bytes": _memory(self.resident),
        }


def cpu_seconds() -> float:
    """CPU time of this process, and of those that load data for it, also where they have ended."""
    own = psutil.Process()
    seconds = math.fsum(own.cpu_times()[:4])  # user and system: its own, and those of children that have ended
    for child in own.children():
        with suppress(psutil.Error):  # it ends just now, and counts in the next step
            seconds += math.fsum(child.cpu_times()[:2])
    return seconds


def resident_now() -> int:
    """Bytes that the process holds when all that can be freed is freed."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps freed blocks, other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def _memory(resident: int) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return max(0, psutil.Process().memory_info().rss - resident)


class SparsightTrainer(Trainer):
    """HF's Trainer with the stage's parameter groups, and a count of what every step executed."""

    def __init__(
        self,
        *args: Any,
        stage: Stage,
        plan: Sequence[Step],
        counter: StepCounter,
        handle: SparseHandle | None = None,
        **kwargs: Any,
    ) -> None:
        self.stage, self.plan, self.counter, self.handle = stage, plan, counter, handle
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def track(self, record: dict[str, float]) -> None:
        """To the trackers alone: `Trainer.log` would keep every step's record in every checkpoint."""
        self.callback_handler.on_log(self.args, self.state, self.control, record)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, as planned: nobody shuffles or shards after that."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=RankBatches(self.plan, self.args.process_index, self.args.world_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(self.model, self.stage)
            self.optimizer = MuonAdamW(groups, **options) if self.stage.optimizer == "muon" else cls(groups, **options)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super().get_batch_samples(*args, **kwargs)
        self.counter.seconds["data"] += time.perf_counter() - start
        return result

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "vision" not in self.stage.learning_rate.parts():
            self.model.model.vision_tower.eval()  # frozen is frozen: its batch norms keep their statistics too
        # Without a cache of keys and values: with one, transformers does not look for packed samples.
        return super().compute_loss(model, {**inputs, "loss_only": True, "use_cache": False}, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """FLOPs of the last pass, as counted; HF's own count sees neither dropped tokens nor skipped layers."""
        return self.counter.last_flops

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        info = inputs.pop("info")
        self.counter.replaced += info["replaced"]
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {self.state.global_step + 1}: out of memory on {tuple(inputs['input_ids'].shape)} positions "
                "(the largest batches of a stage come second and third). Lower micro_batch_size or batch_tokens, or "
                "the layout; with another micro_batch_size the run goes on by --resume"
            ) from error
        passes = self.handle.take_passes() if self.handle is not None else []
        self.counter.add(inputs, info, passes[0] if passes else None)
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite(f"loss is {value}", info["ids"])
        self.counter.loss += value
        self.counter.seconds["compute"] += time.perf_counter() - start
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """The Trainer's, which sees every step's gradients last: a norm that is not finite would make all weights NaN.

        A recipe's ``max_grad_norm`` is above 0, so there is no step without it. Ranks share gradients, hence the norm:
        all come to the same end.
        """
        start = time.perf_counter()
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            found = f"norm of the gradients is {float(norm)}, though the loss is finite"
            raise self._not_finite(found, gather_object(self.counter.ids))
        self.counter.seconds["optimizer"] += time.perf_counter() - start  # on a GPU, it was waited for
        return norm

    def _not_finite(self, found: str, ids: Sequence[str]) -> ValueError:
        step = self.state.global_step + 1
        return ValueError(f"step {step}: the {found}; training stops here. Its samples: " + ", ".join(ids))


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
        probed: SparseHandle | None,
    ) -> None:
        self.log, self.stage, self.counter, self.bar, self.task = log, stage, counter, bar, task
        self.quarantine, self.probed = quarantine, probed
        self.stop = False
        self.started = 0.0
        self.rates: dict[str, float] = {}
        self.track: Callable[[dict[str, float]], None] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.probed is not None and state.global_step in LARGEST:  # else methods would be at their smallest there
            self.probed.at_its_largest()

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        # Here, and not at the step's end: by then the schedule has moved to the next step's.
        self.rates = {group["part"]: group["lr"] for group in kwargs["optimizer"].param_groups}
        if self.stage.optimizer == "muon":
            self.counter.flops["optimizer"] += optimizer_flops(kwargs["optimizer"])
        self.started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():  # else the next wait for the device would be taken for one for data
            torch.cuda.synchronize()
        self.counter.seconds["optimizer"] += time.perf_counter() - self.started

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.quarantine is not None:  # what other ranks found, too: all count alike, and stop together
            self.counter.replaced = gather_object(self.counter.replaced)
        record = self.counter.record()
        record = {"learning_rate": self.rates, **record}
        self.log.write("step", stage=self.stage.name, step=state.global_step, **record)
        if self.track is not None:
            self.track(dict(_flat(record)))
        speed = record["samples"] / max(sum(record["seconds"].values()), 1e-9)
        self.bar.update(
            self.task, completed=state.global_step, loss=f"{record['loss']:.3f}", speed=f"{speed:.1f} samples/s"
        )
        if self.quarantine is not None:
            self.quarantine.add(self.counter.replaced, state.global_step, record["samples"])
            bad = len(self.quarantine.found)
            self.bar.update(self.task, bad=f"{bad} bad" if bad else "")
        self.counter.clear()
        if any_rank(self.stop, self.counter.model.device):
            self.stop = control.should_save = control.should_training_stop = True


def _flat(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, as trackers name them: ``seconds/data``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        else:
            yield path + name, value


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


def plan_stage(data: TrainingSet, recipe: Recipe, stage: Stage, folder: Path, console: Console) -> list[Step]:
    """Which samples make which step, over all ranks. The samples' sizes are measured once, and kept in ``folder``.

    Raises:
        UserError: the batch cannot be dealt out to the ranks, or a sample cannot be read.
    """
    ranks, sizes = process_state().num_processes, None
    alike = _alike(recipe, stage)  # where they need not be dealt out, sizes need not be known
    if ranks * micro_batches(stage, ranks) > 1 or stage.packing or stage.batch_tokens or not alike:
        with process_state().main_process_first(), Progress(console=console) as bar:
            task = bar.add_task("measuring samples", total=len(data))
            sizes = data.sizes(folder / "sizes.npy", lambda done: bar.update(task, completed=done))
            bar.update(task, completed=len(data))
    return plan_steps(stage, len(data), recipe.seed, ranks, sizes, largest_first=not alike)


def _alike(recipe: Recipe, stage: Stage) -> bool:
    """Whether all samples are of about one size."""
    return isinstance(recipe.data_of(stage), SceneData)


def training_arguments(recipe: Recipe, stage: Stage, steps: int, folder: Path) -> TrainingArguments:
    """HF's arguments for a stage of so many steps."""
    saving = stage.checkpoints > 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        gradient_accumulation_steps=micro_batches(stage, process_state().num_processes),
        num_train_epochs=1,
        learning_rate=max(stage.learning_rate.parts().values()),
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup if stage.warmup < 1 else 0.999,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch_fused",
        adam_beta2=stage.adam_beta2,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="steps" if saving else "no",
        save_steps=max(1, steps // max(stage.checkpoints, 1)),
        save_total_limit=2,
        logging_strategy="no",
        report_to=list(recipe.report_to),
        run_name=f"{recipe.name}-{stage.name}",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # what a batch leaves out is given gradients of zero
    )
    # Other GPUs join by torchrun. transformers would wrap the model in nn.DataParallel, which cuts batches apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def last_checkpoint(folder: Path, console: Console) -> str | None:
    """The last checkpoint that is whole. One that a kill cut short is moved aside: its state file is written last.

    Raises:
        OSError: a state file is there and cannot be read, so that nobody knows what it holds; or it cannot be moved.
    """
    while (found := get_last_checkpoint(str(folder))) is not None:
        file = Path(found) / "trainer_state.json"
        try:
            if isinstance(json.loads(file.read_bytes()), dict):
                break
            reason = "expected a mapping in it"
        except FileNotFoundError:
            reason = "there is no such file"
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None  # a read that fails does not name it
        except ValueError as error:
            reason = f"not valid JSON: {error}"
        new = moved_aside(Path(found), f"damaged-{Path(found).name}")
        text = f"{found} is damaged ({file.name}: {reason}), perhaps cut short by a kill; it is passed over, and is now"
        console.print(Text(f"{text} {new}", style="yellow"), soft_wrap=True)
    return found


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[bad]}", style="yellow"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _collator(processor: SparsightProcessor, stage: Stage) -> Collator:
    length, places, weights = stage.batch_tokens or stage.pack_length, None, None
    if stage.position_layout is not None:
        target, scales = Layout.parse(stage.position_layout), stage.bridge.scales  # type: ignore[union-attr]
        places = scales.positions(target), target.tokens
        weights = scales.children(target) if stage.proportional_attention else None
    pad = processor.tokenizer.pad_token_id
    return Collator(pad, stage.packing, length, processor.image_token_id, places, weights)


def _check_kernel(model: SparsightForConditionalGeneration, stage: Stage) -> None:
    kernel = model.model.language_model.config._attn_implementation
    if stage.proportional_attention and kernel not in ("sdpa", "eager"):
        raise UserError(
            f"stage '{stage.name}': proportional_attention needs attn_implementation sdpa or eager in the language "
            f"model, found '{kernel}'"
        )


def train_stage(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    data: TrainingSet,
    plan: Sequence[Step],
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    log: StepLog,
    counter: StepCounter,
    console: Console,
    resume: bool = False,
    quarantine: Quarantine | None = None,
) -> int:
    """Train one stage in place.

    Args:
        plan: from `plan_stage`.
        folder: checkpoints go here.
        resume: go on from the last checkpoint in ``folder``, if there is one.
        quarantine: where bad samples that ``data`` replaces are counted.

    Returns:
        The step that training went on from; 0 from the start.

    Raises:
        Interrupted: Ctrl-C; the last step is in a checkpoint.
        UserError: a bad sample, or more of them than the recipe allows; or a loss or gradients that are not finite; or
            attention by a kernel that takes no weights of tokens.
    """
    _check_kernel(model, stage)
    with process_state().main_process_first():
        checkpoint = last_checkpoint(folder, console) if resume and folder.is_dir() else None
    with _bar(console) as bar:
        task = bar.add_task(stage.name, total=len(plan), loss="-", speed="", bad="")
        began = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
        if quarantine is not None:
            seen = data.offset + sum(len(batch) for step in plan[:began] for batch in step)
            same = [each.name for each in recipe.of_the_same_data(stage)]
            quarantine.begin(stage.name, began, seen, len(data.source), same)
        handle = None
        if stage.compressor is not None or stage.skipper is not None:
            handle = attach(model, stage.compressor, stage.skipper, seed=recipe.seed)
        probed = None if _alike(recipe, stage) else handle
        recorder = _Recorder(log, stage, counter, bar, task, quarantine if data.replaces else None, probed)
        idle = IdleWarning(model, stage.name, log, console, handle)
        trainer = SparsightTrainer(
            model,
            training_arguments(recipe, stage, len(plan), folder),
            stage=stage,
            plan=plan,
            counter=counter,
            handle=handle,
            train_dataset=data,
            data_collator=_collator(processor, stage),
            processing_class=processor,
            callbacks=[recorder, idle] if handle is None else [SparsightCallback(handle), recorder, idle],
        )
        recorder.track = trainer.track if recipe.report_to else None
        if resume:  # without a checkpoint, too: steps that are in the log, but not in the weights, do not count
            log.write("resume", stage=stage.name, step=began)
        try:
            by_sample = stage.packing and stage.compressor is None  # a compressor keeps samples apart itself
            rows = attention_for_packed_rows if by_sample else attention
            with rows(model.model.language_model), _ctrl_c(recorder, console):
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if handle is not None:
                handle.detach()
        if recorder.stop:
            raise Interrupted(f"stopped in stage '{stage.name}' at step {trainer.state.global_step} of {len(plan)}")
    return began
