"""Hugging Face's Trainer, thinly subclassed: learning rates by part, a record of every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from rich.text import Text
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from sparsight.console import Console, Progress
from sparsight.data.batching import LARGEST, RankBatches, Step, micro_batches, plan_steps
from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.sources import SceneSource
from sparsight.devices.copies import may_overlap
from sparsight.devices.engines import check_resumed, engine, settle_bf16
from sparsight.devices.ranks import process_state, several_ranks
from sparsight.errors import UserError
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.settings.recipe import Recipe, Stage
from sparsight.sparse.attach import attach
from sparsight.sparse.callback import SparsightCallback
from sparsight.sparse.gather import causal_mask
from sparsight.training import idle, stalls
from sparsight.training.checkpoints import SafeCheckpoints, agreed_checkpoint
from sparsight.training.counter import StepCounter
from sparsight.training.optimizer import LayerwiseAdamW, MuonAdamW, optimizer_flops
from sparsight.training.quarantine import Quarantine
from sparsight.training.stages import narrow_adapters, parameter_groups, part_of

# Asks the model behind a step, if it is due; told whether that is the stage's last one. Scores by task.
Scorer = Callable[[int, bool], dict[str, float] | None]


class StepLog(Protocol):
    """Where records go; `reporting.RunLog` is one."""

    def write(self, type: str, **fields: Any) -> None: ...


class SparsightTrainer(Trainer):
    """HF's Trainer with the stage's parameter groups and planned batches, whose ``counter`` counts every step."""

    def __init__(
        self, *args: Any, stage: Stage, plan: Sequence[Step], counter: StepCounter, handle: Any = None, **kwargs: Any
    ) -> None:
        self.stage, self.plan, self.counter, self.handle = stage, plan, counter, handle
        self.look: Callable[[], None] = lambda: None  # at what the last step has sent
        self.safe: Any = next((each for each in kwargs.get("callbacks", ()) if isinstance(each, SafeCheckpoints)), None)
        model, adapted = args[0], getattr(args[0], "_hf_peft_config_loaded", False)
        self.frozen_base = adapted or getattr(model, "is_quantized", False)
        model._hf_peft_config_loaded = self.frozen_base  # a bridge may train on a packed base that has no adapters
        super().__init__(*args, **kwargs)
        settle_bf16(self.accelerator.state, counter.precision)
        model._hf_peft_config_loaded = adapted
        self.remove_callback(PrinterCallback)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.look()  # nothing is saved behind a step that was not finite
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """With packed weights, or adapters beside them, a checkpoint has the parts that train, and adapters alone of
        the language model: what is frozen is there when the stage begins."""
        if not self.frozen_base:
            return super()._save(output_dir, state_dict)
        folder, parts = Path(output_dir or self.args.output_dir), self.stage.learning_rate.parts()
        folder.mkdir(parents=True, exist_ok=True)
        trained = {
            name: tensor.contiguous()
            for name, tensor in self.model.state_dict().items()
            if part_of(name) in parts and (part_of(name) != "language" or ".lora_" in name)
        }
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not self.frozen_base:  # else most weights are not in a checkpoint
            tied = self.model.all_tied_weights_keys  # saved once, under the name of the weight that they are
            missing = [key for key in load_result.missing_keys if key not in tied]
            super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def track(self, record: Mapping[str, Any]) -> None:
        """To the trackers alone, as ``seconds/data``: `Trainer.log` would keep all records in every checkpoint."""
        nested = {name: value if isinstance(value, dict) else {"": value} for name, value in record.items()}
        flat = {f"{name}/{part}".rstrip("/"): n for name, parts in nested.items() for part, n in parts.items()}
        self.callback_handler.on_log(self.args, self.state, self.control, flat)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, as planned: nobody shuffles or shards after that."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=RankBatches(self.plan, self.args.process_index, self.args.world_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            timeout=stalls.patience() if self.args.dataloader_num_workers else 0,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            by_layer = self.stage.skipper is not None and engine().startswith("zero")
            cls = MuonAdamW if self.stage.optimizer == "muon" else LayerwiseAdamW if by_layer else cls
            self.optimizer = cls(parameter_groups(self.model, self.stage, by_layer), **options)
        return self.optimizer

    def get_batch_samples(self, batches: Any, number: int, device: Any) -> Any:
        start = time.perf_counter()
        # The number of labels stays where it was counted, unless ranks have to add theirs up.
        result = super().get_batch_samples(batches, number, device if several_ranks() else torch.device("cpu"))
        self.counter.seconds["data"] += time.perf_counter() - start
        return result

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and not self.is_deepspeed_enabled:  # which changes types
            device = self.args.device
            return data.to(device, non_blocking=may_overlap(device))  # from pinned memory: nobody waits
        return super()._prepare_input(data)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Grids of patches stay on the host, which counts by them."""
        return super()._prepare_inputs(inputs) | {key: inputs[key] for key in ("image_grid_thw",) if key in inputs}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "vision" not in self.stage.learning_rate.parts():
            self.model.model.vision_tower.eval()  # frozen is frozen: its batch norms keep their statistics too
        # Without a cache of keys and values: with one, transformers does not look for packed samples.
        inputs = {**inputs, "loss_only": True, "use_cache": False}
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        inputs["attention_mask"] = causal_mask(mask, positions, self.model.config.text_config)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """FLOPs of the last pass, as counted; HF's own count sees neither dropped tokens nor skipped layers."""
        return self.counter.last_flops

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        start, info = time.perf_counter(), inputs.pop("info")
        self.counter.replaced += info["replaced"]
        try:
            with nullcontext() if self.handle is None else self.handle.on_host(inputs):
                loss = super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {self.state.global_step + 1}: out of memory on {tuple(inputs['input_ids'].shape)} positions "
                "(the largest batches of a stage come second and third). Lower micro_batch_size or batch_tokens, or "
                "the layout; with another micro_batch_size the run goes on by --resume"
            ) from error
        passes = self.handle.take_passes() if self.handle is not None else []
        self.counter.add(inputs, info, passes[0] if passes else None)
        self.counter.losses.append(loss)
        self.counter.seconds["compute"] += time.perf_counter() - start
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """The Trainer's, in every step (a recipe's ``max_grad_norm`` is above 0). A norm that is not finite would make
        all weights NaN; ranks share gradients, so that all see it.

        Fused AdamW leaves weights and moments alone by itself then: nobody has to wait, and the step's end is looked at
        in the next one. For another optimizer it is looked at here.
        """
        start = time.perf_counter()
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # in accelerate's
        norm, losses = super()._clip_grad_norm(model), self.counter.losses
        self.look()  # at the step before
        self.before = self.state.global_step, self.state.epoch, self.lr_scheduler.state_dict()
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.counter.norm = torch.as_tensor(whole).to(losses[0])
        found = torch.stack([self.counter.norm, *losses])
        if engine() == "ddp" and optimizer.defaults.get("fused"):
            optimizer.found_inf = (~found.isfinite().all()).float()
        else:
            here, *each = found.tolist()
            self.check_finite(each, here, self.state.global_step + 1, self.counter.passes)
        self.counter.seconds["optimizer"] += time.perf_counter() - start
        return norm

    def check_finite(self, losses: Sequence[float], norm: float, step: int, passes: Sequence[list[str]]) -> None:
        """Raises UserError if the loss of a micro-batch or the gradients' norm is not."""
        if bad := [n for n, loss in enumerate(losses) if not math.isfinite(loss)]:
            found, ids = f"loss is {losses[bad[0]]}", [name for n in bad for name in passes[n]]
        elif not math.isfinite(norm):
            found = f"norm of the gradients is {norm}, though the loss is finite"
            ids = gather_object([name for each in passes for name in each])
        else:
            return
        if self.state.global_step == step:  # the optimizer has left it out: what is saved now is the step before
            self.state.global_step, self.state.epoch, rates = self.before
            self.lr_scheduler.load_state_dict(rates)
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
            self.safe.updating = -1
        raise UserError(f"step {step}: the {found}; training stops here. Its samples: " + ", ".join(ids))


@dataclass(eq=False)
class _Recorder(TrainerCallback):
    """Writes a record of each step, and ``show``s how far it is."""

    trainer: SparsightTrainer
    log: StepLog
    console: Console
    show: Callable[..., None]
    quarantine: Quarantine | None
    scorer: Scorer | None
    rates: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    last: Callable[[], None] | None = None  # what the last step still has to do, once its numbers have come

    def __post_init__(self) -> None:
        self.trainer.look = self.look

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.show(completed=state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, optimizer: Any, **__: Any) -> None:
        handle = self.trainer.handle
        if handle is not None and state.global_step in LARGEST and not _alike(self.trainer.train_dataset):
            handle.at_its_largest()  # else methods would be at their smallest where memory is to run out at once
        for group in optimizer.param_groups:
            if group.get("layer") is not None:
                group["skipped"] = handle.resting[group["layer"]]

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        # Here, and not at the step's end: by then the schedule has moved to the next step's.
        self.rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
        if self.trainer.stage.optimizer == "muon":
            self.trainer.counter.flops["optimizer"] += optimizer_flops(optimizer)
        self.started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.counter.seconds["optimizer"] += time.perf_counter() - self.started

    def on_step_end(self, args: Any, state: TrainerState, control: Any, *, optimizer: Any, **_: Any) -> None:
        counter, step, stage = self.trainer.counter, state.global_step, self.trainer.stage.name
        if self.quarantine is not None:  # entries of other ranks, too: all count alike, and stop together
            counter.replaced = gather_object(counter.replaced)
        self.last = partial(self._write, step, self.rates, counter.record(), counter.passes)
        looked_at = step == min(idle.AFTER, state.max_steps)
        if control.should_training_stop or looked_at or step == state.max_steps:
            self.look()
        if self.quarantine is not None:
            self.quarantine.add(counter.replaced, step, sum(map(len, self.trainer.plan[step - 1])))
        if looked_at and (found := idle.describe_idle(counter.model, optimizer, self.trainer.handle)):
            note = f"stage '{stage}', after {step} steps: {found}"
            self.console.print(Text(note, style="yellow"))
            self.log.write("note", stage=stage, text=note)
        if self.scorer is not None:
            scores = self.scorer(step, step == state.max_steps)
            if scores is not None and args.report_to:
                self.trainer.track({"score": scores})
        counter.clear()

    def look(self) -> None:
        """Wait for the last step's numbers, if nobody has, and write its record."""
        last, self.last = self.last, None
        if last is not None:
            last()

    def _write(self, step: int, rates: dict[str, float], read: Any, passes: Any) -> None:
        counter, stage, start = self.trainer.counter, self.trainer.stage.name, time.perf_counter()
        numbers, losses, norm = read()
        counter.seconds["compute"] += time.perf_counter() - start  # on a GPU, it was waited for
        self.trainer.check_finite(losses, norm, step, passes)
        record = {"learning_rate": rates, **numbers}
        self.log.write("step", stage=stage, step=step, **record)
        if self.trainer.args.report_to:
            self.trainer.track(record)
        speed = record["samples"] / max(sum(record["seconds"].values()), 1e-9)
        text = f"{stage}, loss {record['loss']:.3f}, {speed:.1f} samples/s"
        if self.quarantine is not None:
            text += f", {len(self.quarantine.found)} bad" if self.quarantine.found else ""
        self.show(completed=step, description=text)


def plan_stage(data: TrainingSet, stage: Stage, seed: int, folder: Path, console: Console) -> list[Step]:
    """Which samples make which step, over all ranks. The samples' sizes are measured once, and kept in ``folder``.

    Raises:
        UserError: the batch cannot be dealt out to the ranks, or a sample cannot be read.
    """
    ranks, sizes = process_state().num_processes, None
    alike = _alike(data)  # where they need not be dealt out, sizes need not be known
    cut = stage.model_dump(include={"batch_size", "micro_batch_size", "batch_tokens"})
    try:
        if ranks * micro_batches(ranks, **cut) > 1 or stage.packing or stage.batch_tokens or not alike:
            with process_state().main_process_first(), Progress(console=console) as bar:
                task = bar.add_task("measuring samples", total=len(data))
                sizes = data.sizes(folder / "sizes.npy", lambda done: bar.update(task, completed=done))
                bar.update(task, completed=len(data))
        return plan_steps(len(data), seed, ranks, sizes, packing=stage.packing, largest_first=not alike, **cut)
    except UserError as error:
        raise UserError(f"stage '{stage.name}': {error}") from None


def _alike(data: TrainingSet) -> bool:
    """Whether all samples are of about one size."""
    return isinstance(data.source, SceneSource)


def training_arguments(recipe: Recipe, stage: Stage, steps: int, folder: Path) -> TrainingArguments:
    """HF's arguments for a stage of so many steps; checkpoints go to ``folder``. Parameter groups have the rates."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        gradient_accumulation_steps=micro_batches(
            process_state().num_processes, stage.batch_size, stage.micro_batch_size, stage.batch_tokens
        ),
        num_train_epochs=1,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup if stage.warmup < 1 else 0.999,
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch_fused",
        adam_beta2=stage.adam_beta2,
        bf16=recipe.precision == "bf16" and not engine().startswith("zero"),  # there `settle_bf16` sees to it
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        save_strategy="steps" if stage.checkpoints else "no",
        save_steps=max(1, steps // max(stage.checkpoints, 1)),
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would wait for each micro-batch, to log what nobody asks for
        report_to=list(recipe.report_to),
        run_name=f"{recipe.name}-{stage.name}",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # what a batch leaves out is given gradients of zero
    )
    # Other GPUs join by torchrun. transformers would wrap the model in nn.DataParallel, which cuts batches apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _collator(processor: SparsightProcessor, stage: Stage) -> Collator:
    length, positions, weights = stage.batch_tokens or stage.pack_length, None, None
    if stage.position_layout is not None:
        target, scales = stage.position_layout, stage.bridge.scales  # type: ignore[union-attr]
        positions = scales.positions(target), target.tokens
        weights = scales.children(target) if stage.proportional_attention else None
    pad = processor.tokenizer.pad_token_id
    return Collator(pad, stage.packing, length, processor.image_token_id, positions, weights)


def _check_weights_can_be_taken(stage: Stage, attention: str) -> None:
    """Raises UserError for an attention that takes no weights of tokens, where the stage gives some."""
    if stage.proportional_attention and attention not in ("sdpa", "eager"):
        raise UserError(
            f"stage '{stage.name}': proportional_attention needs attn_implementation sdpa or eager in the language "
            f"model, found '{attention}'"
        )


def train_stage(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    data: TrainingSet,
    plan: Sequence[Step],
    stage: Stage,
    arguments: TrainingArguments,
    counter: StepCounter,
    *,
    log: StepLog,
    console: Console,
    quarantine: Quarantine | None = None,
    scorer: Scorer | None = None,
    resume: bool = False,
) -> int:
    """Train one stage in place.

    Args:
        plan: from `plan_stage`; arguments: from `training_arguments`.
        quarantine: where bad samples that ``data`` replaces are counted.
        scorer: asks the model behind steps that are due.
        resume: go on from the last checkpoint, if there is one.

    Returns:
        The step that training went on from; 0 from the start.

    Raises:
        Interrupted: by a signal; the last step is in a checkpoint.
        UserError: a bad sample, or more of them than the recipe allows; a loss or gradients that are not finite;
            or attention that takes no weights of tokens.
    """
    _check_weights_can_be_taken(stage, model.model.language_model.config._attn_implementation)
    checkpoint = agreed_checkpoint(Path(str(arguments.output_dir)), console) if resume else None
    if checkpoint:
        check_resumed(Path(checkpoint))
    began = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    if quarantine is not None:
        quarantine.begin(began, data.offset + sum(len(batch) for step in plan[:began] for batch in step))
    handle = None
    if stage.compressor is not None or stage.skipper is not None:
        handle = attach(model, stage.compressor, stage.skipper, seed=arguments.seed)
    settings: dict[str, Any] = {"stage": stage, "plan": plan, "counter": counter, "handle": handle}
    settings |= {"data_collator": _collator(processor, stage), "processing_class": processor, "train_dataset": data}
    safe = SafeCheckpoints(console, f"stage '{stage.name}'", checkpoint)
    callbacks = [safe] if handle is None else [safe, SparsightCallback(handle)]
    trainer = SparsightTrainer(model, arguments, callbacks=callbacks, **settings)
    with Progress(console=console) as bar, stalls.Watchdog(f"stage '{stage.name}'") as watchdog:
        show = partial(bar.update, bar.add_task(stage.name, total=len(plan)))
        trainer.add_callback(watchdog)
        trainer.add_callback(_Recorder(trainer, log, console, show, quarantine, scorer and watchdog.unwatched(scorer)))
        if resume:  # without a checkpoint, too: steps that are in the log, but not in the weights, do not count
            log.write("resume", stage=stage.name, step=began)
        try:
            with narrow_adapters(model, stage, arguments.bf16):
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            trainer.look()
            if handle is not None and engine() == "ddp":  # else wrapped by the engine, and not to be run again
                handle.detach()
    return began
