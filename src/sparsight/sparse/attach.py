"""Attach compressor and skipper to a VLM of transformers that was never made for them, and take them off again.

Only attributes of instances are set (``forward`` of the decoder, of its layers and of the output layer), and they are
deleted on detaching: no module is replaced and no parameter renamed. Shapes: B samples, T positions, K kept ones,
D width, N visual tokens of an image, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsight.compat import CACHE
from sparsight.devices.ranks import largest, several_ranks, touched
from sparsight.errors import UserError
from sparsight.schedules import anneal, skip_probabilities, skipped_layers
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.blank import blank_features
from sparsight.sparse.compress import compress
from sparsight.sparse.gather import Kept, behind_cache, gather_inputs, mark_cache, packed_samples
from sparsight.sparse.parts import Parts, _check_layers, _splicer, find_parts
from sparsight.sparse.patches import Held, hook
from sparsight.sparse.visual import (
    GRID_INPUTS,
    Run,
    named,
    runs,
    sizes_of,
    tell_of_visual_labels,
    without_visual_labels,
)

_IDLE = 50  # passes without an effect before the user is told
_DENSE = 3  # the same, where it is known that no pass can have one
_PASSES = 2**15  # kept at most, where nobody takes them


class NoEffectWarning(UserWarning):
    """A method is attached, but changes nothing."""


@dataclass(frozen=True)
class Pass:
    """One forward pass in which the methods were on: rows, their length before and after, layers run, visual tokens,
    and values of the inputs of each encoder (``pixel_values`` of "image", ``pixel_values_videos`` of "video", ...)."""

    rows: int
    length_in: int
    length: int
    layers_run: int
    visual_in: int
    visual_out: int
    pixels: Mapping[str, int] = field(default_factory=dict)


def attach(
    model: Any,
    compressor: Any = None,
    skipper: Any = None,
    *,
    seed: int = 0,
    train_only: bool = True,
    plan: bool = False,
) -> Any:
    """Compress visual tokens and skip layers of any VLM in training; layers also of models without vision.

    A skipper, and a compressor whose ``keep`` follows a schedule, wait for `SparseHandle.step`, which
    `SparsightCallback` calls: until then all is dense.

    Args:
        compressor, skipper: a `CompressorConfig`, a `SkipperConfig`, or both; known by type, in either position.
        seed: of the methods' draws, which are functions of (seed, step, layer) alone.
        train_only: in eval mode the model is the plain one, and so it is in any mode inside of ``generate`` and where a
            cache of keys and values is given.
        plan: change nothing, and return the `Parts` that would be touched.

    Returns:
        A `SparseHandle`, or `Parts`.

    Raises:
        UserError: the model cannot take them, or has them already, or none is given.
    """
    if isinstance(compressor, SkipperConfig) or isinstance(skipper, CompressorConfig):
        compressor, skipper = skipper, compressor
    if compressor is None and skipper is None and not plan:
        raise UserError(
            "attach was given neither a compressor nor a skipper: write attach(model, "
            "compressor=CompressorConfig(...)), attach(model, skipper=SkipperConfig(...)), or both; "
            "attach(model, plan=True) only shows what would be touched"
        )
    for name, given, kind in (("compressor", compressor, CompressorConfig), ("skipper", skipper, SkipperConfig)):
        if not isinstance(given, kind | None):
            raise UserError(
                f"{name}: expected a {kind.__name__}, found {given!r}; write attach(model, {name}={kind.__name__}(...))"
            )
    parts, decoder, layers, head = find_parts(model, needs_vision=compressor is not None)
    if skipper is not None:
        skip_probabilities(parts.layers, 0.0, **_skip_options(skipper))  # more protected layers than there are, ...
        _check_layers(model, layers)
    if plan:
        return parts
    if getattr(model, "_sparsight_handle", None) is not None:
        raise UserError(f"{type(model).__name__} has something attached already: detach() that handle first")
    return SparseHandle(model, parts, decoder, layers, head, compressor, skipper, seed, train_only)


def _skip_options(skipper: SkipperConfig) -> dict[str, Any]:
    return {key: getattr(skipper, key) for key in ("alpha", "epsilon", "schedule", "protected", "importance")}


class SparseHandle:
    """What is attached to a model. Made by `attach`; `step` says where training stands, `detach` takes it all off."""

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        decoder: Any,
        layers: Sequence[nn.Module],
        head: Any,
        compressor: CompressorConfig | None,
        skipper: SkipperConfig | None,
        seed: int,
        train_only: bool,
    ) -> None:
        self.model, self.parts, self.decoder, self.layers, self.head = model, parts, decoder, layers, head
        self.compressor, self.skipper, self.seed, self.train_only = compressor, skipper, seed, train_only
        self.attached, self.enabled = True, True
        self.passes: list[Pass] = []  # the last ones
        self._generating, self._cached = 0, False  # calls of `generate` that we are in; whether a cache was given
        self._told: set[str] = set()
        self._first: int | None = None  # image of this step that the last pass with gradients began with
        self._drawn = 0  # images of the present step so far: each draws its own random tokens
        self._batch: tuple[Any, dict[str, Any]] | None = None
        self._visual_BT: torch.Tensor | None = None
        self._video_BT: torch.Tensor | None = None
        self._padding_BT: torch.Tensor | None = None  # 0 at padding, as the model was told
        self._positions_given = False  # by whoever calls the model, so that no cache's length is in them
        self._kept: Kept | None = None
        self._sizes: dict[str, list[int]] = {}  # visual tokens of each image, and of each video
        self._told_of_labels = False
        self._grid_inputs: dict[str, Any] = {}
        self.splicer = _splicer(model, parts.vision)
        self.pixel_flops: dict[str, float] = {}
        # The first one of each kind, to be measured on: arguments, and how many values they have.
        self.encoder_calls: dict[str, tuple[Any, dict[str, Any], int]] = {}
        self._pixels: dict[str, int] = {}
        self._encoding = False
        # Images and videos go through the vision tower one after the other.
        self.videos = "pixel_values_videos" in inspect.signature(self.splicer.forward).parameters
        self._given = 0  # inputs of the vision tower in this batch
        self._embeds_due, self._probing = False, False
        self._idle: dict[str, int] = {}
        self._patched: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, ours, what stood on the instance
        self._hang_in()
        # Dense, where it takes `step` to know what is kept and which layers are skipped.
        c = compressor
        scheduled = c is not None and (c.final is not None or c.dense_every is not None)
        self.waits = scheduled or skipper is not None
        self._uncleared = False  # layers that are off were given gradients of zero
        self.global_step, self.progress = 0, 0.0
        self.keep = 1.0 if c is None or scheduled else c.keep
        self.off: tuple[bool, ...] = (False,) * parts.layers

    def _hang_in(self) -> None:
        """Set hooks and patches, all of which `detach` takes off."""
        model = self.model
        self._hooks = [model.register_forward_pre_hook(hook(self._before), with_kwargs=True)]
        self._hooks.append(model.register_forward_hook(hook(self._after), always_call=True))
        self._hooks.append(self.splicer.register_forward_pre_hook(hook(self._before_splice), with_kwargs=True))
        self.embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._hooks.append(self.embeddings.register_forward_hook(hook(self._embedded)))
        self._patch(self.decoder, "forward", self._decoder_forward)
        self._patch(self.head, "forward", self._head_forward)
        for number, layer in enumerate(self.layers):
            self._patch(layer, "forward", self._layer_forward(number))
        self._watch_features()
        for module in model.modules():  # adapters hand the call on to a model inside
            if hasattr(type(module), "generate"):
                self._patch(module, "generate", self._generate)
        model._sparsight_handle = Held(None, None, self)  # type: ignore[assignment]

    # ------------------------------------------------------------------------------------------ course of training

    def step(self, step: int, progress: float) -> None:
        """Settle what is kept and which layers are off until the next call: one optimizer step, all its micro-batches.

        Args:
            step: number of the optimizer step, from 0.
            progress: share of the stage that is done, 0 to 1.
        """
        if self._uncleared:
            self._tell(
                "gradients",
                "layers that were skipped have gradients of zero on several ranks: call "
                "handle.clear_gradients() before each step of the optimizer (SparsightCallback does), else weight "
                "decay and moments change these layers",
                UserWarning,
            )
        self._uncleared = self.waits = False
        self.global_step, self.progress, self._drawn, self._first = step, progress, 0, None
        self.keep = 1.0
        if (c := self.compressor) is not None:
            dense = c.dense_every is not None and step % c.dense_every == 0
            self.keep = 1.0 if dense else c.keep if c.final is None else anneal(c.schedule, c.keep, c.final, progress)
        self.off = (False,) * self.parts.layers
        if self.skipper is not None:
            chances = skip_probabilities(self.parts.layers, progress, **_skip_options(self.skipper))
            self.off = skipped_layers(chances, self.seed, step)

    def at_its_largest(self) -> None:
        """Settle for this step what takes most memory in the course of training: the most tokens, and all layers."""
        if (c := self.compressor) is not None:
            self.keep = 1.0 if c.dense_every is not None else max(c.keep, c.final or 0.0)
        self.off = (False,) * self.parts.layers

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model, for a while."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def active(self) -> bool:
        """Whether the methods act in a forward pass now."""
        in_training = self.model.training and not self._generating and not self._cached
        return self.attached and self.enabled and (in_training or not self.train_only)

    def take_passes(self) -> list[Pass]:
        """What was executed since the last call; the last passes of it, if there were tens of thousands."""
        passes, self.passes = self.passes, []
        return passes

    def release(self) -> None:
        """Let go of the last batch, which is kept for `dense_probe`."""
        self._batch = None

    def clear_gradients(self) -> None:
        """Before the optimizer's step: a layer that is off loses its gradients, so that nothing of it is updated,
        neither by weight decay nor by moments."""
        self._uncleared = False
        for layer, off in zip(self.layers, self.off, strict=True):
            for parameter in layer.parameters() if off and self.attached else ():
                parameter.grad = None

    @torch.no_grad()
    def dense_probe(self) -> dict[str, float]:
        """The loss of the last batch without the methods and with them, both in eval mode; empty before any batch."""
        if self._batch is None:
            return {}
        args, kwargs = self._batch
        kwargs = {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
        before = list(self.passes), self._drawn, self._first, self.train_only
        modes = [(module, module.training) for module in self.model.modules()]  # frozen parts may be in eval mode
        self.model.eval()
        self._probing, self.train_only = True, False
        try:
            with self.disabled():
                dense = float(self.model(*args, **kwargs).loss)
            sparse = float(self.model(*args, **kwargs).loss)
        finally:
            self._probing = False
            self.passes, self._drawn, self._first, self.train_only = before
            for module, training in modes:
                module.training = training
        return {"loss_dense": dense, "loss_sparse": sparse}

    def report(self) -> dict[str, Any]:
        """What is attached where, and what it does at present."""
        return {
            "parts": self.parts,
            "compressor": self.compressor,
            "skipper": self.skipper,
            "active": self.active(),
            "waits_for_step": self.waits,
            "step": self.global_step,
            "progress": self.progress,
            "keep": self.keep,
            "layers_off": [number for number, off in enumerate(self.off) if off],
        }

    def state_dict(self) -> dict[str, Any]:
        """Where training stands; all else follows from the settings."""
        return {"step": self.global_step, "progress": self.progress, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises UserError if it was drawn with another seed."""
        if state["seed"] != self.seed:
            raise UserError(f"the state was made with seed {state['seed']}, this handle has {self.seed}")
        self.step(state["step"], state["progress"])

    def detach(self) -> None:
        """Leave the model as it was. Raises UserError if it was wrapped over what was attached, as FSDP does."""
        if not self.attached:
            raise UserError("detached already")
        for owner, name, ours, _ in self._patched:
            if owner.__dict__.get(name) is not ours:
                raise UserError(f"cannot detach: {name} of {type(owner).__name__} was wrapped since; unwrap it first")
        for owner, name, _, before in self._patched:
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
        for registered in self._hooks:
            registered.remove()
        del self.model._sparsight_handle
        self.attached, self._batch = False, None
        self.encoder_calls.clear()

    # --------------------------------------------------------------------------------------------------- patches

    def _patch(self, owner: Any, name: str, wrapper: Any) -> None:
        plain = getattr(owner, name)

        patched = Held(partial(wrapper, plain), plain)
        self._patched.append((owner, name, patched, owner.__dict__.get(name)))
        setattr(owner, name, patched)

    def _generate(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        self._generating += 1
        try:
            return plain(*args, **kwargs)
        finally:
            self._generating -= 1

    def _watch_features(self) -> None:
        """Let the module that splices visual tokens in tell how many each image and each video has, and count what
        goes into its encoders, that of sound too."""
        for kind in ("image", "video", "audio"):
            if hasattr(self.splicer, f"get_{kind}_features"):
                self._patch(self.splicer, f"get_{kind}_features", self._features(kind))

    def _features(self, kind: str) -> Any:
        def features(plain: Any, *args: Any, **kwargs: Any) -> Any:
            if self._encoding:  # some families encode a video as they do images
                return plain(*args, **kwargs)
            self._encoding = True
            try:
                found = plain(*args, **kwargs)
            finally:
                self._encoding = False
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if kind != "audio":
                self._sizes[kind] = sizes_of(self.splicer, getattr(found, "pooler_output", found), given)
            if given is not None and self.active():
                self._pixels[kind] = self._pixels.get(kind, 0) + given.numel()
                if kind not in self.pixel_flops:
                    self.encoder_calls.setdefault(kind, (args, kwargs, given.numel()))
            return found

        return features

    def _before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._kept, self._sizes, self._pixels = None, {}, {}
        inputs = named(self.model, args, kwargs)
        self._cached = any(inputs.get(name) is not None for name in (CACHE, "past_key_values"))
        if self.model.training and torch.is_grad_enabled() and not self._cached:
            # Without the graph behind what is given: it would live until the next batch.
            self._batch = args, {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        self._grid_inputs = {key: inputs.get(key) for key in GRID_INPUTS}
        self._given = sum(inputs.get(key) is not None for key in ("pixel_values", "pixel_values_videos"))
        self._padding_BT = inputs.get("attention_mask")
        self._positions_given = inputs.get("position_ids") is not None
        self._visual_BT, self._embeds_due = None, True
        if not isinstance(ids := inputs.get("input_ids"), torch.Tensor):
            return None
        self._visual_BT = torch.isin(ids, self._visual_ids(ids.device))
        image, video = (getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        self._video_BT = ids == video if video not in (None, image) else torch.zeros_like(self._visual_BT)
        if inputs.get("pixel_values_videos") is not None and not bool(self._video_BT.any()):
            self._video_BT = self._visual_BT  # GLM-4V: frames stand at the places of images
        return self._unlabelled(inputs)

    def _visual_ids(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.parts.visual_token_ids, dtype=torch.long, device=device)

    def _before_splice(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A batch of embeddings without ids: placeholders are found by their embedding, as transformers does."""
        inputs = named(module, args, kwargs)
        embeds = inputs.get("inputs_embeds")
        if not isinstance(embeds, torch.Tensor) or self._visual_BT is not None or not self._embeds_due:
            return None
        if self.compressor is not None:
            self._embeds_due = False  # what follows is no embedding of a batch
            ids = self._visual_ids(embeds.device)
            wanted = self.embeddings(ids).detach()
            self._embeds_due = True
            found = [(embeds.detach() == each.to(embeds)).all(-1) for each in wanted]
            self._visual_BT = torch.stack(found).any(0)
            video = getattr(self.model.config, "video_token_id", None)
            image = getattr(self.model.config, "image_token_id", None)
            known = [mask for i, mask in zip(ids.tolist(), found, strict=True) if i == video != image]
            self._video_BT = known[0] if known else torch.zeros_like(self._visual_BT)
            if self.active() and not bool(self._visual_BT.any()):
                self._tell(
                    "embeds",
                    "the compressor has no effect on a batch of inputs_embeds without input_ids, in which no "
                    "position has the embedding of an image placeholder: visual tokens cannot be told from text. Give "
                    "input_ids too, or unmodified embeddings beside pixel_values",
                )
        return (), inputs | {"inputs_embeds": self._embedded(module, (), embeds)}

    def _unlabelled(self, inputs: dict[str, Any]) -> Any:
        """In training, and where dense and sparse are compared: no loss is taken on visual tokens. Said once.

        Returns:
            Arguments, as a hook gives them; None where nothing changes.
        """
        assert self._visual_BT is not None
        if not (self._probing or (self.model.training and self.enabled)):
            return None
        inputs, visual, count = without_visual_labels(inputs, self._visual_BT)
        if not visual:
            return None
        if not self._told_of_labels:
            self._told_of_labels = True
            tell_of_visual_labels(visual, count)
        return (), inputs

    def _embedded(self, _: nn.Module, __: Any, embeds: torch.Tensor) -> torch.Tensor:
        """Where there are several ranks: one that has text alone, or no videos, does as the others, which have some.

        Blank images go through vision tower and projector, whose shards all ranks have to gather together, and
        what gets no gradient gets a zero. Here, behind the embeddings, is where the others encode their images.
        """
        first, self._embeds_due = self._embeds_due, False
        if not first or not several_ranks() or not (self._probing or (self.model.training and torch.is_grad_enabled())):
            return embeds
        ours = hasattr(self.splicer, "_without_images") and self.model.training  # does so by itself
        alone = ours or not self.parts.vision
        if not alone:
            seen = self._visual_BT is None or bool(self._visual_BT.any())
            calls = max(self._given, int(seen))
            # At least one, so that ranks need not ask each other where images are all that there may be.
            wanted = max(1, largest(calls, embeds.device)) if self.videos else 1
            for _blank in range(wanted - calls):
                embeds = embeds + 0.0 * blank_features(self.splicer, embeds).to(embeds.dtype)
            self._sizes.pop("image", None)  # of this batch, blank ones are none
        inside = self.parts.decoder + ".", self.parts.head + "."
        return touched(embeds, (p for name, p in self.model.named_parameters() if not name.startswith(inside)))

    def _after(self, *_: Any) -> None:
        self._kept = self._visual_BT = self._video_BT = self._padding_BT = None
        self._cached, self._embeds_due = False, False

    def _layer_forward(self, number: int) -> Any:
        def forward(plain: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not (self.off[number] and self.active()):
                return plain(hidden, *args, **kwargs)
            # Ranks wait for a gradient of every parameter: a zero, which `clear_gradients` takes away again.
            if torch.is_grad_enabled() and several_ranks():
                hidden, self._uncleared = touched(hidden, self.layers[number].parameters()), True
            return hidden

        return forward

    def _head_forward(self, plain: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The vocabulary's projection, paid for kept positions alone."""
        if self._kept is None or hidden.ndim != 3 or hidden.shape[1] != self._kept.length:
            return plain(hidden)
        return self._kept.scatter(plain(self._kept.gather(hidden, 1)))

    def _decoder_forward(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        embeds, visual_BT = kwargs.get("inputs_embeds"), self._visual_BT
        renumbered = self.compressor is not None and self.compressor.positions == "renumbered"
        kwargs = behind_cache(kwargs, embeds, renumbered, self._positions_given)
        if not self.active():
            return self._watched_dense(plain(*args, **kwargs))
        seen = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if seen is None:
            return plain(*args, **kwargs)
        rows, length = seen.shape[:2]
        visual_BT = self._matching(visual_BT, seen)
        visual = int(visual_BT.sum())
        self._watch_methods(visual)
        run = self.parts.layers - sum(self.off)
        if self.keep == 1.0 or visual == 0 or embeds is None:
            self._count(Pass(rows, length, length, run, visual, visual, dict(self._pixels)))
            return plain(*args, **kwargs)
        sample_BT = packed_samples(kwargs, rows, length)
        sample_BT = None if sample_BT is None else sample_BT.to(embeds.device)
        embeds, keep_BT = self._compressed(embeds, visual_BT, kwargs.get("attention_mask"), sample_BT)
        kept = self._kept = Kept.of(keep_BT)
        after, left = kept.index_BK.shape[1], int((keep_BT & visual_BT).sum())
        self._count(Pass(rows, length, after, run, visual, left, dict(self._pixels)))
        kwargs = gather_inputs(kwargs, kept, keep_BT, renumbered, self.decoder.config)
        output = plain(*args, **(kwargs | {"inputs_embeds": kept.gather(embeds, 1)}))
        if getattr(output, "router_logits", None) is not None:
            raise UserError(
                f"{type(self.model).__name__} was asked for router_logits, whose loss balances experts over all "
                "positions: with a compressor, set output_router_logits=False"
            )
        mark_cache(
            getattr(output, CACHE, None), length - after, bool(keep_BT[~visual_BT].all() and kept.valid_BK.all())
        )
        for key in ("last_hidden_state", "hidden_states"):
            value = getattr(output, key, None)
            if isinstance(value, torch.Tensor):
                output[key] = kept.scatter(value)
            elif value is not None:
                output[key] = tuple(kept.scatter(state) for state in value)
        return output

    def _matching(self, visual_BT: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
        """Where visual tokens stand among the decoder's positions, (B, T); nowhere, if that is not known."""
        if visual_BT is not None and visual_BT.shape == seen.shape[:2]:
            return visual_BT.to(seen.device)
        if visual_BT is not None and self.compressor is not None and bool(visual_BT.any()):
            self._tell(
                "shape",
                f"the compressor has no effect: the batch has {tuple(visual_BT.shape)} positions, but the "
                f"decoder was given {tuple(seen.shape[:2])}, so visual tokens cannot be found there",
            )
        return torch.zeros(seen.shape[:2], dtype=torch.bool, device=seen.device)

    def _count(self, done: Pass) -> None:
        if len(self.passes) >= _PASSES:
            del self.passes[: _PASSES // 2]
        self.passes.append(done)

    def _tell(self, topic: str, text: str, category: type[Warning] = NoEffectWarning) -> None:
        """Warn, once in the life of this handle."""
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(text, category, stacklevel=3)

    def _watched_dense(self, output: Any) -> Any:
        """The output of a pass without the methods. If it is trained on, which the backward pass tells, they were meant
        to act: said after a few."""
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if self.enabled and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            why = "eval mode: call model.train() before training, or attach with train_only=False"
            if self.model.training:
                why = "a cache of keys and values was given: train without one, or attach with train_only=False"
            hidden.register_hook(lambda _: self._watch("methods", True, why, _DENSE))
        return output

    def _watch_methods(self, visual: int) -> None:
        self._watch("compressor", self.compressor is not None and visual == 0, "no batch had an image")
        if self.waits:
            how = (
                "nobody has called handle.step(step, progress), which says where training stands. Give the Trainer "
                "callbacks=[SparsightCallback(handle)], or call handle.step() before each optimizer step and "
                "handle.clear_gradients() before the optimizer"
            )
            names = "compressor's schedule" if self.skipper is None else "skipper"
            self._watch(names, not any(self.off) if self.skipper is not None else self.keep == 1.0, how, _DENSE)
        else:
            self._watch("skipper", self.skipper is not None and not any(self.off), "no layer was off")

    def _watch(self, method: str, idle: bool, why: str, after: int = _IDLE) -> None:
        self._idle[method] = self._idle.get(method, 0) + 1 if idle else 0
        if self._idle[method] == after:
            self._tell(f"{method} {after}", f"the {method} had no effect in {after} passes: {why}")

    # ------------------------------------------------------------------------------------------------ compression

    def _compressed(
        self, embeds_BTD: torch.Tensor, visual_BT: torch.Tensor, mask: Any, packed_BT: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings in which kept places hold what they now stand for, and which places are kept, (B, T).

        ``packed_BT``: the packed sample that a position belongs to, if there are any.
        """
        assert self.compressor is not None
        keep_BT = torch.ones_like(visual_BT)
        for known in (mask, self._padding_BT):  # masks for each kind of layer do not tell padding, the model's own does
            if isinstance(known, torch.Tensor) and known.shape == keep_BT.shape:
                keep_BT &= known.to(keep_BT.device).bool()
        places_M2 = visual_BT.nonzero()
        found = self._runs(places_M2)
        options: dict[str, Any] = {}
        first = self._draw(len(found))
        kinds = [(run.length, run.grid or (1, run.length)) for run in found]
        for kind, group in groupby(sorted(range(len(found)), key=kinds.__getitem__), kinds.__getitem__):
            (length, grid), members = kind, list(group)
            rows_I = torch.tensor([found[number].start for number in members], device=embeds_BTD.device)
            place_IN2 = places_M2[rows_I[:, None] + torch.arange(length, device=embeds_BTD.device)]
            sample_IN, position_IN = place_IN2.unbind(-1)
            tokens_IND = embeds_BTD[sample_IN, position_IN]
            if self.compressor.method == "random":  # by number, however the step is cut into micro-batches
                options["generators"] = [self._generator(first + number) for number in members]
            if self.compressor.method == "text":
                options["text_BTD"] = embeds_BTD[sample_IN[:, 0]].detach()
                text_IT = (keep_BT & ~visual_BT)[sample_IN[:, 0]]
                if packed_BT is not None:  # that of the image's own sample
                    row_I, first_I = sample_IN[:, 0], position_IN[:, 0]
                    owner_BT = packed_BT.expand(len(keep_BT), -1)
                    text_IT = text_IT & (owner_BT[row_I] == owner_BT[row_I, first_I][:, None])
                options["text_mask_BT"] = text_IT
            few_IKD, index_IK = compress(tokens_IND, self.keep, self.compressor.method, grid=grid, **options)
            # What follows a image is said by its last position: that one stays.
            index_IK = torch.cat([index_IK[:, :-1], torch.full_like(index_IK[:, :1], length - 1)], 1)
            if self.compressor.method not in ("pool", "merge"):
                few_IKD = tokens_IND.gather(1, index_IK[..., None].expand_as(few_IKD))
            target = sample_IN.gather(1, index_IK), position_IN.gather(1, index_IK)
            keep_BT[sample_IN, position_IN] = False
            keep_BT[target] = True
            embeds_BTD = embeds_BTD.index_put(target, few_IKD.to(embeds_BTD.dtype))
        return embeds_BTD, keep_BT

    def _draw(self, images: int) -> int:
        """The number of a pass's first image in this step. A pass without gradients sees the tokens of the one with
        gradients before it: so does a reference that is the policy without its adapters."""
        if torch.is_grad_enabled() or self._first is None:
            first, self._drawn = self._drawn, self._drawn + images
            self._first = first if torch.is_grad_enabled() else None
            return first
        return self._first

    def _generator(self, image: int) -> torch.Generator:
        # Mixed into 32 bits, as torch looks at no more of a seed.
        mixed = np.random.SeedSequence([self.seed, self.global_step, image]).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    def _runs(self, places_M2: torch.Tensor) -> list[Run]:
        """Where each image's and each video's tokens are, in reading order."""
        assert self._video_BT is not None
        config: Any = self.model.config
        on_grid = getattr(self.splicer, "tokens_on_grid", not hasattr(config, "image_grid_pinpoints"))
        video_M = self._video_BT.to(places_M2.device)[places_M2[:, 0], places_M2[:, 1]]
        return runs(places_M2, video_M, self._sizes, self._grid_inputs, config, on_grid)
