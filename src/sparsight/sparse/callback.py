"""Compressor and skipper in Hugging Face's Trainer, and in those built on it (TRL's SFTTrainer)."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sparsight.devices.peaks import peak_flops
from sparsight.devices.precision import device_name
from sparsight.errors import UserError
from sparsight.sparse.attach import Pass, SparseHandle
from sparsight.sparse.executed import figures

_SAME = ("compressor", "skipper", "seed")  # two handles that share them see the same tokens and layers
STATE_FILE = "sparsight_sparse.json"


class SparsightCallback(TrainerCallback):
    """Tells an attached model where training stands, and logs what was executed.

    Logged beside the loss, over the steps since the last log: ``keep``, ``visual_tokens_in`` and ``visual_tokens_out``,
    ``layers_run`` (share of all), ``language_flops`` (executed by the language model), ``language_flops_ratio`` (to the
    plain model's), ``flops`` (all parts) and ``mfu`` (share of the device's peak, where that is known). With
    ``dense_probe`` also ``loss_dense`` and ``loss_sparse`` of one batch in eval mode.

    Args:
        handle: from `attach`; or several: that of the model that is trained, then those of models that are to
            see the same tokens and layers at each step, as the reference model of DPO.
        dense_probe: every so many steps; never if not given.
    """

    def __init__(self, handle: SparseHandle | Sequence[SparseHandle], dense_probe: int | None = None) -> None:
        if dense_probe is not None and dense_probe < 1:
            raise UserError(f"dense_probe {dense_probe}: expected a number of steps of at least 1")
        self.handles = (handle,) if isinstance(handle, SparseHandle) else tuple(handle)
        if not self.handles or not all(isinstance(each, SparseHandle) for each in self.handles):
            raise UserError(f"handle {handle!r}: expected what sparsight.attach returned, or a list of such")
        self.handle, self.dense_probe = self.handles[0], dense_probe
        self.probe: dict[str, float] = {}
        self.since = time.perf_counter()
        self.peak: float | None = None
        self.told = False  # that executed FLOPs are left out

    def settings(self) -> dict[str, Any]:
        """The state that a resumed run must share with the one before."""
        methods = {name: getattr(self.handle, name) for name in ("compressor", "skipper")}
        dumped = {name: method and method.model_dump(mode="json") for name, method in methods.items()}
        return dumped | {"seed": self.handle.seed}

    def floating_point_ops(self, inputs: Any) -> float:
        """FLOPs of the last pass. The Trainer's own count, which ends up in ``total_flos``, sees neither dropped tokens
        nor skipped layers: set ``trainer.floating_point_ops = callback.floating_point_ops``."""
        found = self._figures(self.handle.passes[-1:])
        return found.get("flops", found.get("language_flops", 0.0))

    def _figures(self, passes: Sequence[Pass]) -> dict[str, float]:
        """Executed figures; none, and one warning, where they cannot be counted: training goes on."""
        try:
            return figures(self.handle, passes)
        except Exception as error:
            model, why, told = type(self.handle.model).__name__, f"{type(error).__name__}: {error}", self.told
            self.told = True
            if not told:
                warnings.warn(
                    f"executed FLOPs are left out of the log: {model} cannot be counted ({why})", stacklevel=2
                )
            return {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any) -> None:
        """Check what methods are attached to, and what is resumed.

        Raises:
            UserError: an engine that cannot skip; a model to which nothing is attached; other settings than those of
                the run that is resumed, or no checkpoint that tells them.
        """
        self.since = time.perf_counter()
        if self.handle.skipper is not None:
            _refuse_engine(self.handle.model)
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in one process: nn.DataParallel runs copies of the model, to which nothing is "
                "attached; start with torchrun, or let CUDA_VISIBLE_DEVICES show one GPU"
            )
        if (model := given.get("model")) is not None:
            _check_handles(self.handles, model)
            _tell_of_plain_reference(self.handles, model, args)
        self.peak = peak_flops(device_name(args.device), "bf16" if args.bf16 else "fp32")
        self.on_step_begin(args, state)
        if not state.global_step:
            return
        folder = _resumed_from(args, state)
        if (file := folder / STATE_FILE).is_file():  # else nothing was attached before
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = {key: (before.get(key), now) for key, now in self.settings().items() if before.get(key) != now}
            if changed:
                raise UserError(f"{file} was written with other settings; these differ (then, now): {changed}")
        # These engines keep weights in files of their own, by the model's own names, and have loaded them.
        if args.distributed_state.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            _reload_if_renamed(self.handle.model, folder)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        for handle in self.handles:
            handle.step(state.global_step, min(1.0, state.global_step / max(1, state.max_steps)))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for handle in self.handles:
            handle.clear_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self.dense_probe and state.global_step % self.dense_probe == 0:
            self.probe = self.handle.dense_probe()

    def on_log(self, args: Any, state: TrainerState, control: Any, *, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:  # an evaluation, or the end
            return
        passes, *_others = [handle.take_passes() for handle in self.handles]  # logged is what trains
        if not passes:  # somebody else counts them
            return
        found = self._figures(passes) | self.probe
        since, self.since = self.since, time.perf_counter()
        if self.peak is not None and "flops" in found:
            found["mfu"] = found["flops"] / (self.since - since) / self.peak
        logs |= found  # for the trackers and bars that come after
        if state.log_history:
            state.log_history[-1] |= found

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for handle in self.handles:
            handle.release()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            (folder / STATE_FILE).write_text(json.dumps(self.settings(), indent=2), encoding="utf-8")


def _check_handles(handles: Sequence[SparseHandle], model: nn.Module) -> None:
    """Raises UserError if the first handle is not that of the trained model, or another one cannot act; warns where
    models see other tokens and layers."""
    inside, (first, *others) = set(model.modules()), handles
    if not first.attached:
        raise UserError("SparsightCallback was given a handle that is detached: attach again, and give it the new one")
    if first.model not in inside and model not in set(first.model.modules()):
        raise UserError(
            f"SparsightCallback was given the handle of another model ({type(first.model).__name__}) than the Trainer "
            f"trains ({type(model).__name__}), to which nothing is attached. A copy of an attached model is a plain one"
        )
    for other in others:
        if other.model not in inside and other.train_only and not other.model.training:
            raise UserError(
                f"SparsightCallback was given the handle of a second model ({type(other.model).__name__}) in eval "
                "mode, where it sees all tokens and layers: attach to it with train_only=False"
            )
        if any(getattr(other, key) != getattr(first, key) for key in _SAME):
            text = "differ in compressor, skipper or seed: their models see different tokens and layers"
            warnings.warn(f"the handles of SparsightCallback {text}", stacklevel=2)


def _tell_of_plain_reference(handles: Sequence[SparseHandle], model: nn.Module, args: TrainingArguments) -> None:
    """Warn under TRL's DPOConfig and its like, unless the reference is attached, too, or is the model itself without
    its adapter."""
    beforehand = getattr(args, "precompute_ref_log_probs", None)
    second = getattr(args, "sync_ref_model", None) is not None and getattr(args, "beta", 1.0) != 0.0
    alone = len(handles) == 1 and not hasattr(model, "peft_config")
    if beforehand or (alone and (second or beforehand is not None)):
        made = ", ".join(f"{key}={value!r}" for key in _SAME if (value := getattr(handles[0], key)) is not None)
        why = "set precompute_ref_log_probs=False, then " if beforehand else ""
        warnings.warn(
            f"{type(args).__name__} trains against a reference model, to which nothing is attached: it sees all tokens "
            f"and layers, the policy does not. Attach to both: {why}reference = sparsight.attach(trainer.ref_model, "
            f"{made}, train_only=False); trainer.add_callback(SparsightCallback([handle, reference])), in place of one",
            stacklevel=2,
        )


def _refuse_engine(model: nn.Module) -> None:
    """Raises UserError under an engine whose optimizer does not know layers."""
    engine = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):  # set by transformers and accelerate
        engine = "DeepSpeed"
    elif any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        engine = "FSDP version 1"
    if engine is not None:
        raise UserError(
            f"SkipperConfig cannot work under {engine}, which updates flat shards of all layers, skipped ones too. Use "
            "DDP or FSDP version 2 (fsdp_version: 2), or the compressor alone"
        )


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that training goes on from: the one that holds this state, as the Trainer tells no callback.

    Raises:
        UserError: neither folder that may be it is.
    """
    folders = [Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str | os.PathLike):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (file := folder / TRAINER_STATE_NAME).is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            # Two runs may have a checkpoint of the same step. As text: NaN is not equal to itself.
            if str((saved["global_step"], saved["log_history"])) == str((state.global_step, state.log_history)):
                return folder
    raise UserError(
        f"training goes on from step {state.global_step}, but not from {' or '.join(map(str, folders))}: settings and "
        "weights cannot be checked. Give TrainingArguments(resume_from_checkpoint=...) the path that train() is given"
    )


def _reload_if_renamed(model: Any, folder: Path) -> None:
    """Load a checkpoint whose tensors have other names than the model's: some families of transformers (LLaVA) save
    under their old names, of which the Trainer loads none when it resumes (seen in 5.23)."""
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    if names and not names <= model.state_dict().keys() and hasattr(type(model), "from_pretrained"):
        saved = type(model).from_pretrained(folder).state_dict()
        set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True))  # into shards too
