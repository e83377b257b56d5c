"""Compressor and skipper in Hugging Face's Trainer, and in those built on it (TRL's SFTTrainer)."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.utils import DistributedType, extract_model_from_parallel
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sparsight.devices.peaks import peak_flops
from sparsight.devices.precision import device_name
from sparsight.errors import UserError
from sparsight.settings.methods import CallbackConfig, CompressorConfig, SkipperConfig
from sparsight.sparse.attach import NoEffectWarning, Pass, SparseHandle, attach
from sparsight.sparse.executed import figures

_SAME = ("compressor", "skipper", "seed")  # two handles that share them see the same tokens and layers
STATE_FILE = "sparsight_sparse.json"
_IDLE = 3  # optimizer steps without a pass before the user is told
_PASSES = 8  # for each micro-batch of an optimizer step, before the user is told that it does not end
# What callbacks have attached, and the state of that training: one that failed leaves it behind.
_ATTACHED: WeakKeyDictionary[SparseHandle, TrainerState] = WeakKeyDictionary()


class SparsightCallback(TrainerCallback):
    """Attaches the methods for as long as training lasts, tells them where it stands, and logs what was executed.

        Trainer(model, ..., callbacks=[SparsightCallback(compressor=CompressorConfig(keep=0.25))])

    The model that the Trainer hands over is attached to when it begins, wrapped as it then is, and a plain one again at
    its end. So is a reference model that the trainer holds as ``ref_model`` (TRL), for it to see the same tokens and
    layers. Given a handle instead, nothing is attached or detached.

    Logged beside the loss, over the steps since the last log: ``keep``, ``visual_tokens_in`` and ``visual_tokens_out``
    (``audio_tokens_in`` and ``audio_tokens_out`` of a model that hears), ``layers_run`` (share of all),
    ``language_flops`` (executed by the language model), ``language_flops_ratio`` (to the plain model's), ``flops`` (all
    parts) and ``mfu`` (share of the device's peak, where that is known). With
    ``dense_probe`` also ``loss_dense`` and ``loss_sparse`` of one batch in eval mode.

    Args:
        handle: from `attach`, in place of compressor, skipper and seed; or several: that of the model that is trained,
            then those of models that are to see the same tokens and layers at each step, as the reference model of DPO.
        dense_probe: every so many steps; never if not given.
        compressor, skipper: either or both, as settings or as a mapping of a recipe's keys.
        seed: of the methods' draws.

    Attributes:
        handle: that of the model that is trained; None before training, if the callback attaches by itself.

    Raises:
        UserError: neither a handle nor a method is given, or both, or a setting is wrong.
    """

    def __init__(
        self,
        handle: SparseHandle | Sequence[SparseHandle] | None = None,
        dense_probe: int | None = None,
        *,
        compressor: CompressorConfig | Mapping[str, Any] | None = None,
        skipper: SkipperConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.methods: CallbackConfig | None = None
        self.handles: tuple[SparseHandle, ...] = ()
        if handle is None:
            if compressor is None and skipper is None:
                raise UserError(
                    "SparsightCallback was given nothing to attach: write SparsightCallback(compressor="
                    "CompressorConfig(...), skipper=SkipperConfig(...)), or one of them; or give it a handle"
                )
            given = {"compressor": compressor, "skipper": skipper, "seed": seed, "dense_probe": dense_probe}
            self.methods = CallbackConfig.read(given, "SparsightCallback")
        else:
            if not (compressor is None and skipper is None):
                raise UserError("SparsightCallback was given a handle and methods: give one or the other")
            if dense_probe is not None and dense_probe < 1:
                raise UserError(f"dense_probe {dense_probe}: expected a number of steps of at least 1")
            self.handles = (handle,) if isinstance(handle, SparseHandle) else tuple(handle)
            if not self.handles or not all(isinstance(each, SparseHandle) for each in self.handles):
                raise UserError(f"handle {handle!r}: expected what sparsight.attach returned, or a list of such")
        self.dense_probe = dense_probe
        self.step = 0
        self.idle = 0  # optimizer steps, one after the other, without a pass
        self.rollouts = 1, 0  # steps that share their draws, and the first step; see `_rollouts`
        self.probe: dict[str, float] = {}
        self.since = time.perf_counter()
        self.peak: float | None = None
        self.told = False  # that executed FLOPs are left out

    @property
    def handle(self) -> SparseHandle | None:
        return self.handles[0] if self.handles else None

    def settings(self) -> dict[str, Any]:
        """The state that a resumed run must share with the one before."""
        return _settings(self.methods or self.handle)

    def floating_point_ops(self, inputs: Any) -> float:
        """FLOPs of the last pass. The Trainer's own count, which ends up in ``total_flos``, sees neither dropped tokens
        nor skipped layers: set ``trainer.floating_point_ops = callback.floating_point_ops``."""
        found = self._figures(self.handle.passes[-1:]) if self.handle else {}
        return found.get("flops", found.get("language_flops", 0.0))

    def _figures(self, passes: Sequence[Pass]) -> dict[str, float]:
        """Executed figures; none, and one warning, where they cannot be counted: training goes on."""
        handle = self.handles[0]
        try:
            return figures(handle, passes)
        except Exception as error:
            model, why, told = type(handle.model).__name__, f"{type(error).__name__}: {error}", self.told
            self.told = True
            if not told:
                warnings.warn(
                    f"executed FLOPs are left out of the log: {model} cannot be counted ({why})", stacklevel=2
                )
            return {}

    def _attach(self, methods: CallbackConfig, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Attach to the model, as wrapped as the Trainer hands it over, and to the reference that the Trainer holds."""
        if getattr(args, "precompute_ref_log_probs", None):
            raise UserError(
                f"{type(args).__name__} has precompute_ref_log_probs=True: a reference that has seen all tokens and "
                "layers beforehand does not fit a policy that does not; set precompute_ref_log_probs=False"
            )
        reference = getattr(_caller("callback_handler"), "ref_model", None)
        self.handles = ()
        for each in (model,) if reference is None else (model, reference):
            _detach_leftover(each, state)
            inside, train_only = extract_model_from_parallel(each, keep_torch_compile=False), each is model
            handle = attach(inside, methods.compressor, methods.skipper, seed=methods.seed, train_only=train_only)
            _ATTACHED[handle] = state
            self.handles += (handle,)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any) -> None:
        """Attach, or check what methods are attached to; and check what is resumed.

        Raises:
            UserError: an engine that cannot skip; a model that cannot be attached to, or to which nothing is attached;
                other settings than those of the run that is resumed, or no checkpoint that tells them.
        """
        self.since, self.idle, self.step = time.perf_counter(), 0, state.global_step
        model: Any = given.get("model")
        skipper = (self.methods or self.handles[0]).skipper
        if skipper is not None and skipper.tokens == "all":
            _refuse_engine(self.handles[0].model if model is None else model, given.get("optimizer"))
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in one process: nn.DataParallel runs copies of the model, to which nothing is "
                "attached; start with torchrun, or let CUDA_VISIBLE_DEVICES show one GPU"
            )
        if self.methods is not None:
            self._attach(self.methods, model, args, state)
        if model is not None:
            _check_handles(self.handles, model)
            _tell_of_plain_reference(self.handles, model, args)
        self.peak = peak_flops(device_name(args.device), "bf16" if args.bf16 else "fp32")
        self.rollouts = _rollouts(self.handles[0], args, state)
        self.handles[0].expect_step(within=_PASSES * args.gradient_accumulation_steps)
        self.on_step_begin(args, state)
        if not state.global_step:
            return
        folder = _resumed_from(args, state)
        if (file := folder / STATE_FILE).is_file():  # else nothing was attached before
            saved = json.loads(file.read_text(encoding="utf-8"))  # perhaps by a version with fewer settings
            before = _settings(CallbackConfig.read({key: saved[key] for key in _SAME if key in saved}, file))
            changed = {key: (before.get(key), now) for key, now in self.settings().items() if before.get(key) != now}
            if changed:
                raise UserError(f"{file} was written with other settings; these differ (then, now): {changed}")
        # These engines keep weights in files of their own, by the model's own names, and have loaded them.
        if args.distributed_state.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            _reload_if_renamed(self.handles[0].model, folder)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step > self.step:
            self.step, first = state.global_step, self.handles[0]
            self.idle = 0 if first.passes_in_step else self.idle + 1
            if self.idle == _IDLE:
                warnings.warn(
                    f"the methods had no effect in {_IDLE} steps: nothing was trained on in the "
                    f"{type(first.model).__name__} that the trainer handed over, so it trains another object, to which "
                    "nothing is attached. Attach to that one, and give SparsightCallback the handle",
                    NoEffectWarning,
                    stacklevel=2,
                )
        share, begin = self.rollouts
        step = state.global_step - (state.global_step - begin) % share
        for handle in self.handles:
            handle.step(step, min(1.0, step / max(1, state.max_steps)))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for handle in self.handles:
            handle.clear_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self.dense_probe and state.global_step % self.dense_probe == 0:
            self.probe = self.handles[0].dense_probe()

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
            if self.methods is not None and handle.attached:
                try:
                    handle.detach()
                except UserError as error:  # the weights are trained, and not saved yet
                    warnings.warn(f"{error}. It stays attached; in eval mode it is the plain model", stacklevel=2)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            (folder / STATE_FILE).write_text(json.dumps(self.settings(), indent=2), encoding="utf-8")


def _settings(source: Any) -> dict[str, Any]:
    dumped = {key: method and method.model_dump(mode="json") for key in _SAME[:2] for method in [getattr(source, key)]}
    return dumped | {"seed": source.seed}


def _caller(attribute: str) -> Any:
    """The object that has called us, by what it has: a Trainer tells callbacks neither itself nor its reference."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not hasattr(frame.f_locals.get("self"), attribute):
        frame = frame.f_back
    return frame and frame.f_locals["self"]


def _rollouts(handle: SparseHandle, args: TrainingArguments, state: TrainerState) -> tuple[int, int]:
    """How many optimizer steps are trained on the same rollouts (TRL's GRPO and RLOO), and the step that the first of
    these began with. All of them skip and keep the same, so that log-probabilities of the policy, of the policy before
    and of the reference can be compared.

    Raises:
        UserError: they could not be.
    """
    if (slices := getattr(args, "steps_per_generation", None)) is None:
        return 1, 0
    every, accumulate = slices * getattr(args, "num_iterations", 1), args.gradient_accumulation_steps
    compressor, beforehand = handle.compressor, accumulate % every != 0
    scheduled = compressor is not None and compressor.scheduled
    scored = beforehand or getattr(args, "beta", 0.0) or getattr(args, "use_vllm", False)
    if compressor is not None and compressor.method == "random" and scored:
        raise UserError(
            f"{type(args).__name__} scores its rollouts, shuffles them, and trains on them: method random would keep "
            "other tokens each time. Use another method, as uniform; or, without vLLM, set beta=0 and "
            "steps_per_generation and num_iterations so that gradient_accumulation_steps is a multiple of both together"
        )
    if not beforehand:
        return 1, 0
    if every % accumulate and (scheduled or handle.skipper is not None):
        raise UserError(
            f"{type(args).__name__} trains on its rollouts for {every} micro-batches, which is no multiple of "
            f"gradient_accumulation_steps={accumulate}: they are scored in a step that skips other layers, or keeps "
            "other tokens, than those that train on them. Make steps_per_generation * num_iterations a multiple, or "
            "use a compressor with a constant keep"
        )
    done = getattr(_caller("callback_handler"), "_step", 0) // accumulate  # TRL counts on, over several train()
    return max(1, every // accumulate), state.global_step - done


def _detach_leftover(model: nn.Module, state: TrainerState) -> None:
    """Take off what the callback of a training that failed has left behind."""
    for handle in [handle for handle, since in _ATTACHED.items() if handle.attached and since is not state]:
        if handle.model in set(model.modules()):
            handle.detach()


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


def _refuse_engine(model: nn.Module, optimizer: Any) -> None:
    """Raises UserError under an engine whose optimizer does not know layers; that of `sparsight train` has a group for
    each one."""
    engine, groups = None, getattr(optimizer, "param_groups", ())
    if any("layer" in group for group in groups):
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):  # set by transformers and accelerate
        engine = "DeepSpeed"
    elif any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        engine = "FSDP version 1"
    if engine is not None:
        raise UserError(
            f"SkipperConfig cannot work under {engine}, which updates flat shards of all layers, skipped ones too. Use "
            "tokens='visual', DDP or FSDP version 2 (fsdp_version: 2), or the compressor alone"
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
