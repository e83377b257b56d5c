"""Patches of a model's forward passes, and hooks that look at each batch.

Only attributes of instances are set, and deleted again: no module is replaced and no parameter renamed. Beside its
``get_image_features`` a model may have ``tokens_on_grid``: whether visual tokens stand as patches do; and
``encodes_blank_images``: whether in training it encodes a blank image itself where a rank's batch has none.

Shapes: B samples, T positions, D width, M visual tokens of the whole batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from sparsight.compat import CACHE, returns_tuple
from sparsight.devices.copies import Host, to_device
from sparsight.devices.ranks import largest, several_ranks, touched
from sparsight.errors import UserError
from sparsight.schedules import kept_tokens, skipped_layers
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.blank import blank_features, tensors
from sparsight.sparse.compress import ON_GRID, compress_batch
from sparsight.sparse.gather import Beside, Kept, check_cache, gather_inputs, mark_cache, packed_samples
from sparsight.sparse.parts import Parts, find_loss_owner, find_splicer
from sparsight.sparse.patches import Held, hook, keep_out_of_graphs
from sparsight.sparse.visual import audio_runs, named, runs, sizes_of, without_visual_labels

_IGNORED = -100  # what the loss of transformers leaves out
_IDLE = 50  # passes without an effect before the user is told
_DENSE = 3  # the same, where it is known that no pass can have one
_PASSES = 2**15  # kept at most, where nobody takes them
# Inputs that say where tokens stand: they come to the host together.
_GRIDS = tuple(f"{kind}_{what}" for kind in ("image", "video") for what in ("grid_thw", "merge_sizes", "sizes"))
_WANTED = ("input_ids", "labels", "attention_mask", "position_ids", "cu_seq_lens_q", *_GRIDS)
_NO_TOKENS = "no input_ids of a batch had {} tokens, at as many positions as the decoder was given"
_WAITS = (
    "nobody has called handle.step(step, progress), which says where training stands. Give the Trainer "
    "callbacks=[SparsightCallback(handle)], or call handle.step() before each optimizer step and "
    "handle.clear_gradients() before the optimizer"
)
_SAME_STEP = (
    "{} passes were trained on, and all in optimizer step {}: schedules stand still, and all of them skip the same "
    "layers. The trainer's loop does not call on_step_begin of its callbacks: call handle.step(step, progress) "
    "before each optimizer step, and handle.clear_gradients() before the optimizer"
)


_ALL_LOGITS = "the model is given no labels, so the trainer takes its loss from all logits: leave it out"


class NoEffectWarning(UserWarning):
    """A method is attached, but changes nothing."""


@dataclass(frozen=True)
class Pass:
    """One forward pass in which the methods acted: rows, their length before and after, layers run, visual tokens, and
    values of the inputs of each encoder (``pixel_values`` of "image", ``pixel_values_videos`` of "video", ...), and
    audio tokens, which are none of the visual ones."""

    rows: int
    length_in: int
    length: int
    layers_run: int
    visual_in: int
    visual_out: int
    pixels: Mapping[str, int] = field(default_factory=dict)
    audio_in: int = 0
    audio_out: int = 0
    beside: int = 0  # the length in the layers that are not among ``layers_run``; 0 if nothing runs there
    labels: int | None = None  # positions projected on the vocabulary, where not all of those that the decoder got are


class _NoLogits:
    """Stands where logits would."""

    def __getattr__(self, name: str) -> Any:
        text = f"logits.{name}: with supervised_logits_only there are no logits to look at in training, only the loss"
        raise AttributeError(f"{text}: leave it out where a trainer takes its loss or metrics from logits")


def _targets(labels: torch.Tensor | None, shifted: torch.Tensor | None) -> torch.Tensor | None:
    """The label that each position predicts, (B, T), as transformers shifts them; None without labels."""
    return shifted if shifted is not None or labels is None else F.pad(labels[:, 1:], (0, 1), value=_IGNORED)


class State:
    """The methods' settings, and what holds in the optimizer step at hand."""

    def __init__(
        self,
        layers: int,
        compressor: CompressorConfig | None,
        skipper: SkipperConfig | None,
        seed: int,
        train_only: bool,
        supervised_only: bool = False,
    ) -> None:
        self.layers, self.compressor, self.skipper, self.supervised_only = layers, compressor, skipper, supervised_only
        self.seed, self.train_only, self.enabled = seed, train_only, True
        scheduled = compressor is not None and compressor.scheduled
        self.waits = scheduled or skipper is not None  # dense, until `step` says what is kept and skipped
        self.global_step, self.progress = 0, 0.0
        self.keep = 1.0 if compressor is None or scheduled else compressor.keep
        self.skipped, self.scales = (False,) * layers, (1.0,) * layers  # see `Forwards._layer`
        self.drawn: tuple[int, int | None] = 0, None  # see `generators`
        self.text_runs = skipper is not None and skipper.tokens == "visual"  # through skipped layers, too

    def step(self, step: int, progress: float) -> None:
        self.waits, self.global_step, self.progress, self.drawn = False, step, progress, (0, None)
        self.keep, self.skipped = 1.0, (False,) * self.layers
        if (c := self.compressor) is not None and (c.dense_every is None or step % c.dense_every):
            self.keep = c.keep_at(progress)
        if self.skipper is not None:
            chances = self.skipper.probabilities(self.layers, progress)
            self.skipped = skipped_layers(chances, self.seed, step, self.skipper.layers == "alternating")
            self.scales = tuple(1 / (1 - p) if self.skipper.inverse_density else 1.0 for p in chances)

    @property
    def resting(self) -> tuple[bool, ...]:
        """Whether each layer is skipped by all positions, so that nothing of it is trained in this step."""
        return (False,) * self.layers if self.text_runs else self.skipped

    def generators(self, images: int) -> list[torch.Generator]:
        """One for each image of a pass, by its number in the step, however that is cut into micro-batches.

        A pass without gradients sees the tokens of the one with gradients before it: so does a reference that is the
        policy without its adapters.
        """
        count, first = self.drawn  # images of the step so far; the one that the last pass with gradients began with
        if first is None or torch.is_grad_enabled():
            self.drawn = count + images, count if torch.is_grad_enabled() else None
            first = count
        numbers = [[self.seed, self.global_step, first + image] for image in range(images)]
        # Mixed into 32 bits, as torch looks at no more of a seed.
        seeds = [np.random.SeedSequence(number).generate_state(1) for number in numbers]
        return [torch.Generator().manual_seed(int(seed[0])) for seed in seeds]


@dataclass
class Batch:
    """The batch that goes through the model at present."""

    parts: Parts
    video: int | None = None  # id of the tokens of videos, where it is not that of images
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the model's, by name
    host: Host = field(default_factory=Host)
    cached: bool = False  # whether keys and values were given
    embeds_due: bool = False  # whether its embeddings are still to come
    sizes: dict[str, list[int]] = field(default_factory=dict)  # visual tokens of each image, and of each video
    pixels: Counter[str] = field(default_factory=Counter)  # see `Pass`
    kept: Kept | None = None  # the positions that the decoder got; None if all
    beside: Beside | None = None  # those that go through skipped layers; None if none does, or all do
    projected_M: torch.Tensor | None = None  # numbers of the positions that have logits; None if all have

    def _ids(self, ids: Sequence[int]) -> np.ndarray | None:
        if not isinstance(given := self.inputs.get("input_ids"), torch.Tensor):
            return None
        return np.isin(self.host(given), ids) if ids else np.zeros(tuple(given.shape), dtype=bool)

    @cached_property
    def visual_BT(self) -> np.ndarray | None:
        """Where visual tokens stand; None where that is not known."""
        return self._ids(self.parts.visual_token_ids)

    @cached_property
    def audio_BT(self) -> np.ndarray | None:
        return self._ids(self.parts.audio_token_ids)

    @cached_property
    def video_BT(self) -> np.ndarray | None:
        found = self._ids(() if self.video is None else (self.video,))
        if self.inputs.get("pixel_values_videos") is not None and found is not None and not found.any():
            return self.visual_BT  # GLM-4V: frames stand at the positions of images
        return found


class Left(NamedTuple):
    """What the host knows of the positions that stay: how many in each row, how many visual and audio tokens, and
    whether all else stays and rows are of one length; and how much of a row is text."""

    lengths: np.ndarray
    text: np.ndarray
    visual: int
    audio: int
    even: bool


def _fsdp(layer: nn.Module) -> Any:
    """What FSDP version 2 knows of a layer, its hooks' owner; None if it does not shard the layer."""
    return layer._get_fsdp_state() if isinstance(layer, FSDPModule) else None


class Forwards:
    """The patches and hooks of a model, what they have seen, and how to take them off."""

    def __init__(self, model: Any, parts: Parts, state: State) -> None:
        keep_out_of_graphs()
        loss = find_loss_owner(model) if state.supervised_only else None
        self.model, self.parts, self.state = model, parts, state
        self.decoder = model.get_submodule(parts.decoder)
        self.head, self.layers = model.get_submodule(parts.head), list(self.decoder.layers)
        self.embeddings = model.get_input_embeddings()
        self.splicer = find_splicer(model, parts.vision or parts.audio)
        self.attached, self.batch, self.passes = True, Batch(parts), deque[Pass](maxlen=_PASSES)
        self.given: dict[str, Any] = {}  # what the model was called with
        self.known: Mapping[str, Any] = {}  # inputs of the batch at hand that the trainer has on the host
        # Arguments of the last batch that was trained on, and what was known of it.
        self.last: tuple[Any, dict[str, Any], Mapping[str, Any]] | None = None
        self.probing = False  # whether dense and sparse are compared at present
        self.uncleared = False  # whether skipped layers were given gradients of zero
        self.in_step, self.patience = 0, 0  # passes with gradients since the last step; after so many it is overdue
        # FLOPs for each value of an encoder's input, and its first arguments with their values, to be measured on.
        self.pixel_flops: dict[str, float] = {}
        self.encoder_calls: dict[str, tuple[Any, dict[str, Any], int]] = {}
        self._beside = WeakTensorKeyDictionary()  # by the masks or positions of passes whose graph still lives
        self._generating, self._encoding = 0, False  # calls that we are inside of
        self._told: set[str] = set()
        self._idle: Counter[str] = Counter()
        self._patched: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, ours, what stood on the instance
        self._gathering: dict[int, list[Any]] = {}  # layer -> its hooks, and those of FSDP among them
        self._hooks = [
            model.register_forward_pre_hook(hook(self._called), with_kwargs=True, prepend=True),
            model.register_forward_pre_hook(hook(self._before), with_kwargs=True),
            model.register_forward_hook(hook(self._after), always_call=True),
            self.embeddings.register_forward_hook(hook(self._embedded)),
        ]
        self._patch(self.decoder, "forward", self._decode)
        self._patch(self.head, "forward", self._project)
        if loss is not None:
            self._patch(loss, "_loss_function", self._loss, loss.loss_function)
        for number, layer in enumerate(self.layers):
            self._patch(layer, "forward", partial(self._layer, number, returns_tuple(layer)))
        for kind in ("image", "video", "audio"):
            if hasattr(self.splicer, f"get_{kind}_features"):
                self._patch(self.splicer, f"get_{kind}_features", partial(self._encode, kind))
        for module in model.modules():  # adapters hand the call on to a model inside
            if hasattr(type(module), "generate"):
                self._patch(module, "generate", self._generate)

    def _patch(self, owner: Any, name: str, wrapper: Callable[..., Any], plain: Any = None) -> None:
        plain = getattr(owner, name) if plain is None else plain
        ours = Held(partial(wrapper, plain), plain)
        self._patched.append((owner, name, ours, owner.__dict__.get(name)))
        setattr(owner, name, ours)

    def remove(self) -> None:
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
        for hooks, theirs in chain.from_iterable(self._gathering.values()):
            hooks |= theirs
        self.attached, self.last = False, None
        self.encoder_calls.clear()

    def active(self) -> bool:
        """Whether the methods act in a forward pass now."""
        training = self.model.training and not self._generating and not self.batch.cached
        return self.attached and self.state.enabled and (training or not self.state.train_only)

    def _called(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before all other hooks: that of a trainer may put embeddings in place of ids and images (ms-swift)."""
        self.given = named(self.model, args, kwargs)
        cached = any(self.given.get(name) is not None for name in (CACHE, "past_key_values"))
        if self.model.training and torch.is_grad_enabled() and not cached:
            # Without the graph behind what is given: it would live until the next batch.
            kwargs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            self.last = args, kwargs, self.known

    def _before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs, config = named(self.model, args, kwargs), self.model.config
        cached = any(inputs.get(name) is not None for name in (CACHE, "past_key_values"))
        every = self.given | inputs
        host = Host({name: every.get(name) for name in _WANTED}, self.known)
        image, video = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        video = None if video == image else video
        batch = self.batch = Batch(self.parts, video, every, host, cached, embeds_due=True)
        # In training, and where dense and sparse are compared, no loss is taken on visual or audio tokens.
        if inputs.get("labels") is not None and (self.probing or (self.model.training and self.state.enabled)):
            if (visual_BT := batch.visual_BT) is None or (audio_BT := batch.audio_BT) is None:
                return None
            inputs, text = without_visual_labels(inputs, visual_BT | audio_BT, self.parts.kinds, host)
            if text:
                self.tell("labels", text, UserWarning)
                return (), inputs
        return None

    def _embedded(self, _: nn.Module, __: Any, embeds: torch.Tensor) -> torch.Tensor:
        """On several ranks: one that has text alone, or no videos, does as the others, which have some.

        Blank images go through vision tower and projector, whose shards all ranks have to gather together, and
        what gets no gradient gets a zero. Here, behind the embeddings, is where the others encode their images.
        """
        batch, training = self.batch, self.model.training
        due, batch.embeds_due = batch.embeds_due, False
        if not due or not several_ranks() or not (self.probing or (training and torch.is_grad_enabled())):
            return embeds
        if self.parts.audio:
            self._refuse_some_without_audio(embeds.device)
        if self.parts.vision and not (training and getattr(self.splicer, "encodes_blank_images", False)):
            given = sum(batch.inputs.get(key) is not None for key in ("pixel_values", "pixel_values_videos"))
            calls = max(given, int(batch.visual_BT is None or bool(batch.visual_BT.any())))
            # At least one, so that ranks need not ask each other where images are all that there may be.
            videos = "pixel_values_videos" in inspect.signature(self.splicer.forward).parameters
            wanted = max(1, largest(calls, embeds.device)) if videos else 1
            for _blank in range(wanted - calls):
                embeds = embeds + 0.0 * blank_features(self.splicer, embeds).to(embeds.dtype)
            batch.sizes.pop("image", None)  # blank ones are none of this batch
        inside = self.parts.decoder + ".", self.parts.head + "."
        return touched(embeds, (p for name, p in self.model.named_parameters() if not name.startswith(inside)))

    def _refuse_some_without_audio(self, device: torch.device) -> None:
        """Raises UserError, on all ranks, if some have audio, others none, and shards of the encoder are to be
        gathered together. Without shards, zeros for gradients do."""
        sharded = any(isinstance(p, DTensor) for p in self.model.get_submodule(self.parts.audio).parameters())
        given = int(self.batch.audio_BT is not None and bool(self.batch.audio_BT.any()))
        if sharded and largest(given, device) and largest(1 - given, device):
            raise UserError(
                f"{type(self.model).__name__}: some ranks' batches have audio, others none, and all ranks must gather "
                "the shards of the audio encoder together: put one clip into every rank's batch, or use DDP"
            )

    def _after(self, _: nn.Module, __: Any, output: Any) -> Any:
        done, self.batch = self.batch, Batch(self.parts)
        if done.projected_M is None or output is None:
            return None
        if isinstance(output, tuple):
            return output[0], _NoLogits(), *output[2:]
        output.logits = _NoLogits()
        return output

    def _generate(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        self._generating += 1
        try:
            return plain(*args, **kwargs)
        finally:
            self._generating -= 1

    def _encode(self, kind: str, plain: Any, *args: Any, **kwargs: Any) -> Any:
        """Note how many tokens each image, or video, has, and how many values went into its encoder."""
        if self._encoding:  # some families encode a video as they do images
            return plain(*args, **kwargs)
        self._encoding = True
        try:
            found = plain(*args, **kwargs)
        finally:
            self._encoding = False
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if kind != "audio":
            self.batch.sizes[kind] = sizes_of(self.splicer, found, given)
        if given is not None and self.active():
            self.batch.pixels[kind] += given.numel()
            if kind not in self.pixel_flops:
                self.encoder_calls.setdefault(kind, (args, kwargs, given.numel()))
        return found

    def _count_encoded(self) -> None:
        """Note what encoders were given that a trainer's hook has called, not the model."""
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            method = getattr(self.splicer, f"get_{kind}_features", None)
            if method is not None and isinstance(pixels := self.batch.inputs.get(key), torch.Tensor):
                taken = inspect.signature(method).parameters
                args = {name: value for name, value in self.batch.inputs.items() if name in taken}
                self.batch.pixels[kind] += pixels.numel()
                if kind not in self.pixel_flops:
                    self.encoder_calls.setdefault(kind, ((), args, pixels.numel()))

    def _watch_gathers(self) -> None:
        """A layer's shards are gathered by FSDP's hooks, before our patch of its forward is asked: those of a skipped
        layer are not called. Here, as models are sharded before or after they are attached to."""
        for number, layer in enumerate(self.layers):
            state = _fsdp(layer) if self.state.resting[number] and number not in self._gathering else None
            if state is None:
                continue
            layer.unshard()  # once: else FSDP, accumulating gradients in another type, would miss the weights
            layer.reshard()
            self._gathering[number] = []
            for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
                theirs = {key: plain for key, plain in hooks.items() if getattr(plain, "__self__", None) is state}
                self._gathering[number].append((hooks, theirs))
                hooks |= {k: Held(partial(self._unless_skipped, number, plain), plain) for k, plain in theirs.items()}

    def _unless_skipped(self, number: int, plain: Any, *args: Any) -> Any:
        return None if self.state.resting[number] and self.active() else plain(*args)

    def _layer(self, number: int, as_tuple: bool, plain: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        skipped, scale = self.state.skipped[number], self.state.scales[number]
        if not (skipped or scale != 1.0) or not self.active():
            return plain(hidden, *args, **kwargs)
        if not skipped:
            found = plain(hidden, *args, **kwargs)
            out, *rest = found if isinstance(found, tuple) else (found,)
            out = torch.lerp(hidden, out, scale)  # hidden + scale * (out - hidden), exact where nothing was added
            return (out, *rest) if isinstance(found, tuple) else out
        if self.state.text_runs:
            beside = self._beside_of(kwargs)
            return plain(hidden, *args, **kwargs) if beside is None else beside.through(plain, hidden, *args, **kwargs)
        layer = self.layers[number]
        if (fsdp := _fsdp(layer)) is not None:  # whose hooks cast, too
            policy = fsdp._mp_policy
            for dtype in (policy.cast_forward_inputs and policy.param_dtype, policy.output_dtype):
                hidden = hidden.to(dtype or hidden.dtype)
        # Ranks wait for a gradient of every parameter: a zero, which `clear_gradients` takes away again.
        if torch.is_grad_enabled() and several_ranks():
            before, hidden = hidden, touched(hidden, layer.parameters())
            self.uncleared = self.uncleared or hidden is not before  # shards that nobody gathers need none
        return (hidden, None) if as_tuple else hidden  # no attention weights

    def _beside_of(self, inputs: Mapping[str, Any]) -> Beside | None:
        """Of the pass at hand; in recomputation, of the one whose masks or positions a layer is given again."""
        given = (inputs.get(name) for name in ("position_embeddings", "position_ids", "attention_mask"))
        key = next(iter(tensors(list(given))), None)
        if (beside := self.batch.beside) is not None and key is not None:
            self._beside[key] = beside
        return self._beside.get(key) if beside is None and key is not None else beside

    def _project(self, plain: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The vocabulary's projection, paid for kept positions alone, or for those that predict a label."""
        batch, kept = self.batch, self.batch.kept
        if self.state.supervised_only and self.active():
            given = (batch.inputs.get(name) for name in ("labels", "shift_labels"))
            target_BT = _targets(*(x if x is None else torch.from_numpy(batch.host(x)) for x in given))
            known = target_BT is not None and target_BT.shape == hidden.shape[:2]
            self._watch("supervised_logits_only", not known, _ALL_LOGITS, _DENSE)
            if known and target_BT is not None:
                batch.projected_M = to_device(np.flatnonzero(target_BT.numpy() != _IGNORED), hidden.device)
                if self.passes:
                    self.passes[-1] = replace(self.passes[-1], labels=len(batch.projected_M))
                return plain(hidden.flatten(0, 1).index_select(0, batch.projected_M)[None])
        if kept is None or hidden.ndim != 3 or hidden.shape[1] != kept.length:
            return plain(hidden)
        return kept.scatter(plain(kept.gather(hidden, 1)))

    def _loss(self, plain: Any, logits: torch.Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The loss of the logits that there are."""
        if (at_M := self.batch.projected_M) is not None:
            target_BT: Any = _targets(labels, kwargs.get("shift_labels"))
            kwargs["shift_labels"] = target_BT.flatten()[at_M.to(target_BT.device)][None]
        return plain(logits, labels, *args, **kwargs)

    def _decode(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        state, batch, embeds = self.state, self.batch, kwargs.get("inputs_embeds")
        renumbered = state.compressor is not None and state.compressor.positions == "renumbered"
        check_cache(kwargs.get(CACHE), given=batch.inputs.get("position_ids") is not None)
        self._watch_gathers()
        if torch.is_grad_enabled():
            self.in_step += 1
            if self.in_step - 1 == self.patience > 0:
                self.tell("steps", _SAME_STEP.format(self.in_step, state.global_step))
        if not self.active():
            return self._watch_dense(plain(*args, **kwargs))
        seen = next((x for x in (embeds, kwargs.get("input_ids"), *args) if x is not None), None)
        if seen is None:
            return plain(*args, **kwargs)
        visual_BT, audio_BT = batch.visual_BT, batch.audio_BT
        if visual_BT is None or audio_BT is None or visual_BT.shape != seen.shape[:2]:  # not known where they stand
            visual_BT = audio_BT = np.zeros(tuple(seen.shape[:2]), dtype=bool)
        visual, audio = int(visual_BT.sum()), int(audio_BT.sum())
        if visual and not batch.pixels:
            self._count_encoded()
        if not batch.cached:  # else a token of an answer
            self._watch_methods(visual + audio)
        text_BT, (rows, length), layers = ~(visual_BT | audio_BT), seen.shape[:2], self.parts.layers
        splits = state.text_runs and any(state.skipped) and 0 < visual + audio < text_BT.size
        layers -= sum(state.skipped) * (splits or not state.text_runs)
        done = Pass(rows, length, length, layers, visual, visual, dict(batch.pixels), audio, audio)
        if state.keep == 1.0 or visual + audio == 0 or embeds is None:
            if splits:
                text_BT &= self._valid(kwargs, text_BT.shape)
                done = self._split(done, kwargs, to_device(text_BT, seen.device), text_BT.sum(1))
            self.passes.append(done)
            return plain(*args, **kwargs)
        if self.known and self.known.get("attention_mask") is None:
            kwargs["attention_mask"] = None  # `causal_mask` has made it of the position ids
        embeds, keep_BT, left = self._compress(embeds, visual_BT, audio_BT, kwargs)
        kept = batch.kept = Kept.of(keep_BT, left.lengths, self._multiple(kwargs, embeds.device))
        length = kept.index_BK.shape[1]
        done = replace(done, length=length, visual_out=left.visual, audio_out=left.audio)
        if splits:
            text_BK = kept.gather(to_device(text_BT, embeds.device), 1) & kept.valid_BK
            done = self._split(done, kwargs, text_BK, left.text)
        self.passes.append(done)
        there = np.flatnonzero(visual_BT), left.visual
        kwargs = gather_inputs(kwargs, kept, keep_BT, renumbered, self.decoder.config, batch.host, there)
        output = plain(*args, **(kwargs | {"inputs_embeds": kept.gather(embeds, 1)}))
        if getattr(output, "router_logits", None) is not None:
            raise UserError(
                f"{type(self.model).__name__} was asked for router_logits, whose loss balances experts over all "
                "positions: with a compressor, set output_router_logits=False"
            )
        padded = length > left.lengths.max()
        mark_cache(getattr(output, CACHE, None), left.even and not (padded or renumbered))
        for key in ("last_hidden_state", "hidden_states"):
            value = getattr(output, key, None)
            if isinstance(value, torch.Tensor):
                output[key] = kept.scatter(value)
            elif value is not None:
                output[key] = tuple(kept.scatter(each) for each in value)
        return output

    def _split(self, done: Pass, inputs: Mapping[str, Any], text_BT: torch.Tensor, lengths: np.ndarray) -> Pass:
        """Settle which positions go through skipped layers, in this pass, by how many of them each row has."""
        backend = getattr(self.decoder.config, "_attn_implementation", None) or ""
        if "flash" in backend and packed_samples(inputs, text_BT, self.batch.host) is not None:
            raise UserError(f"packed samples under {backend}, and a skipper with tokens 'visual': use sdpa or eager")
        self.batch.beside = Beside(Kept.of(text_BT, lengths), text_BT)
        return replace(done, beside=int(lengths.max()))

    def _multiple(self, inputs: Mapping[str, Any], device: torch.device) -> int:
        """What lengths after compression are padded to a multiple of."""
        may_be_packed = inputs.get("attention_mask") is None and inputs.get("position_ids") is not None
        if self.state.compressor is None or not self.model.training or may_be_packed:
            return 1
        compiled = any(each._compiled_call_impl is not None for each in (self.model, self.decoder, *self.layers))
        usual = 1 if device.type == "cpu" else 64 if compiled else 8
        return self.state.compressor.pad_to_multiple_of or usual

    def _valid(self, inputs: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """The positions that are no padding, (B, T)."""
        valid_BT = np.ones(shape, dtype=bool)
        # Masks for each kind of layer do not tell padding, the model's own does.
        for mask in (each.get("attention_mask") for each in (inputs, self.batch.inputs, self.known)):
            if isinstance(mask, torch.Tensor) and mask.shape == shape:
                valid_BT = valid_BT & self.batch.host(mask).astype(bool)
        return valid_BT

    def _compress(
        self, embeds: torch.Tensor, visual_BT: np.ndarray, audio_BT: np.ndarray, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, Left]:
        """Embeddings in which kept positions hold what they now stand for, which positions are kept, (B, T), and what
        the host knows of these."""
        batch, state, config, host = self.batch, self.state, self.model.config, self.batch.host
        assert state.compressor is not None and batch.video_BT is not None
        valid_BT, method = self._valid(inputs, visual_BT.shape), state.compressor.method
        on_grid = getattr(self.splicer, "tokens_on_grid", not hasattr(config, "image_grid_pinpoints"))
        seen_M2, heard_M2, video_M = np.argwhere(visual_BT), np.argwhere(audio_BT), batch.video_BT[visual_BT]
        grids = {key: host(x) for key in _GRIDS if isinstance(x := batch.inputs.get(key), torch.Tensor)}
        newline = hasattr(self.splicer, "image_newline")
        found = runs(seen_M2, video_M, batch.sizes, {**batch.inputs, **grids}, config, on_grid=on_grid, newline=newline)
        if method in ON_GRID and any(run.grid is None and video_M[run.start] for run in found):
            raise UserError(
                f"{type(self.model).__name__}: the rows and columns of a video's frames are not known, and method "
                f"'{method}' goes by them. Take 'uniform', 'random', 'text' or 'merge'"
            )
        every, at_M2 = found + audio_runs(heard_M2, len(seen_M2)), np.concatenate([seen_M2, heard_M2])
        generators = state.generators(len(every)) if method == "random" else []
        packed = packed_samples(inputs, embeds, host)
        options: dict[str, Any] = {"generators": generators, "packed_BT": packed and packed.segment_BT}
        embeds, keep_BT = compress_batch(embeds, valid_BT, at_M2, every, state.keep, method, **options)
        few = [kept_tokens(run.length, state.keep) for run in every]
        text_BT = ~(visual_BT | audio_BT)
        rows = np.bincount(at_M2[[run.start for run in every], 0], few, len(valid_BT))
        text = (valid_BT & text_BT).sum(1)
        lengths = text + rows.astype(int)
        seen = sum(few[: len(found)])
        even = bool(valid_BT[text_BT].all() and (lengths == lengths[0]).all())
        return embeds, keep_BT, Left(lengths, text, seen, sum(few) - seen, even)

    def tell(self, topic: str, text: str, category: type[Warning] = NoEffectWarning) -> None:
        """Warn, once for each topic."""
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(text, category, stacklevel=3)

    def _watch_dense(self, output: Any) -> Any:
        """The output of a pass without the methods. If it is trained on, which the backward pass tells, they were meant
        to act: said after a few."""
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if self.state.enabled and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            why = "eval mode: call model.train() before training, or attach with train_only=False"
            if self.model.training:
                why = "a cache of keys and values was given: train without one, or attach with train_only=False"
            hidden.register_hook(lambda _: self._watch("methods", True, why, _DENSE))
        return output

    def _watch_methods(self, tokens: int) -> None:
        state = self.state
        for method, acts in (("compressor", state.compressor is not None), ("skipper's tokens", state.text_runs)):
            self._watch(method, acts and tokens == 0, _NO_TOKENS.format(self.parts.kinds))
        if state.waits:
            self._watch("compressor's schedule" if state.skipper is None else "skipper", True, _WAITS, _DENSE)
        else:
            due = state.skipper is not None and state.progress < 1 - state.skipper.dense_last
            self._watch("skipper", due and not any(state.skipped), "no layer was skipped")

    def _watch(self, method: str, idle: bool, why: str, after: int = _IDLE) -> None:
        self._idle[method] = self._idle[method] + 1 if idle else 0
        if self._idle[method] == after:
            self.tell(f"{method} {after}", f"the {method} had no effect in {after} passes: {why}")
