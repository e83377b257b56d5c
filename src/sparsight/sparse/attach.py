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
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import nn

from sparsight.config import LayerSkipper, VisualTokenCompressor
from sparsight.schedules import anneal, skip_probabilities, skipped_layers
from sparsight.sparse.compress import compress

# Names in transformers for features of deeper layers: where they go, and what they are.
_DEEP = {"visual_pos_masks": "deepstack_visual_embeds", "vision_mask": "deepstack_features"}
_IDLE = 50  # steps without an effect before the user is told


class NoEffectWarning(UserWarning):
    """A method is attached, but changes nothing."""


@dataclass(frozen=True)
class Parts:
    """What was found in a model: the paths of its parts, and the ids that stand for visual tokens."""

    decoder: str
    layers: int
    head: str
    vision: str
    visual_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Pass:
    """One forward pass in which the methods were on: rows, their length before and after, layers run, visual tokens."""

    rows: int
    length_in: int
    length: int
    layers_run: int
    visual_in: int
    visual_out: int


@dataclass(frozen=True)
class _Dropped:
    """Where the kept positions of the present pass come from. ``index_BK``; ``valid_BK``: no padding; length T."""

    index_BK: torch.Tensor
    valid_BK: torch.Tensor
    length: int

    def gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Keep these positions along ``axis``; the samples stand on axis 0, or on the one before ``axis``."""
        sample = 0 if axis == 1 else axis - 1
        batch, kept = self.index_BK.shape
        if x.shape[sample] == 1:
            x = x.expand(*(batch if a == sample else -1 for a in range(x.ndim)))
        shape = [1] * x.ndim
        shape[sample], shape[axis] = batch, kept
        wide = [batch if a == sample else kept if a == axis else size for a, size in enumerate(x.shape)]
        return x.gather(axis, self.index_BK.view(shape).expand(wide))

    def scatter(self, x_BKD: torch.Tensor) -> torch.Tensor:
        """Put back, zeros where nothing was kept, (B, T, D)."""
        x_BKD = x_BKD * self.valid_BK[..., None].to(x_BKD.dtype)
        empty = x_BKD.new_zeros(x_BKD.shape[0], self.length, x_BKD.shape[2])
        return empty.scatter_add(1, self.index_BK[..., None].expand_as(x_BKD), x_BKD)


def find_parts(model: Any) -> tuple[Parts, Any, list[nn.Module], Any]:
    """The decoder, its layers and the output layer of a VLM, with their paths.

    Raises:
        ValueError: the model lacks a part, or is built so that it cannot be compressed; the message says which.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or config is None:
        raise ValueError(f"{name}: expected a model of transformers with get_decoder() and a config")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: its visual tokens do not stand in the decoder's sequence")
    language = decoder = model.get_decoder()
    for inner in ("model", "decoder"):  # a causal language model inside (llama4), a decoder in its wrapping (OPT)
        decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, inner, decoder)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"{name}: its decoder {type(decoder).__name__} has no list of layers")
    if any("cross" in child for layer in layers for child, _ in layer.named_children()):
        raise ValueError(f"{name} looks at pictures by cross-attention: there are no visual tokens in its sequence")
    ids = [getattr(config, key, None) for key in ("image_token_id", "image_token_index", "video_token_id")]
    try:
        vision: Any = model.get_encoder(modality="image")
    except (TypeError, AttributeError, ValueError):
        vision = None
    if vision is None or vision is model or vision is decoder:
        raise ValueError(f"{name} has no vision tower: expected a model that encodes pictures before its decoder")
    if not any(isinstance(i, int) for i in ids):
        raise ValueError(f"{name} has no id of a visual token in its config, so its visual tokens cannot be found")
    head = model.get_output_embeddings() or getattr(language, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"{name} has no output layer: attach to the model that computes the loss")
    paths = {module: path for path, module in model.named_modules()}
    if any(module not in paths for module in (decoder, head, vision)):
        raise ValueError(f"{name}: its parts are not its own modules")
    known = tuple(sorted({i for i in ids if isinstance(i, int)}))
    return Parts(paths[decoder], len(layers), paths[head], paths[vision], known), decoder, list(layers), head


def attach(
    model: Any,
    compressor: VisualTokenCompressor | None = None,
    skipper: LayerSkipper | None = None,
    *,
    seed: int = 0,
    train_only: bool = True,
    plan: bool = False,
) -> Any:
    """Compress visual tokens and skip layers of any VLM in training.

    Args:
        seed: of the methods' draws, which are functions of (seed, step, layer) alone.
        train_only: in eval mode the model is the plain one.
        plan: change nothing, and return the `Parts` that would be touched.

    Returns:
        A `SparseHandle`, or `Parts`.

    Raises:
        ValueError: the model cannot take them, or has them already.
    """
    parts, decoder, layers, head = find_parts(model)
    if skipper is not None:
        skip_probabilities(parts.layers, 0.0, **_skip_options(skipper))  # more protected layers than there are, ...
        _check_layers(model, layers)
    if plan:
        return parts
    if hasattr(model, "_sparsight_handle"):
        raise ValueError(f"{type(model).__name__} has something attached already: detach() that handle first")
    return SparseHandle(model, parts, decoder, layers, head, compressor, skipper, seed, train_only)


def _check_layers(model: Any, layers: Sequence[nn.Module]) -> None:
    """Raises ValueError if layers hand more to one another than hidden states: then none of them can be left out."""
    name, taken = type(model).__name__, inspect.signature(type(layers[0]).forward).parameters
    shared = any(getattr(module, "is_kv_shared_layer", False) for layer in layers for module in layer.modules())
    if shared or "prev_topk_indices" in taken:
        what = "keys and values" if shared else "the choice of what is attended to"
        raise ValueError(f"{name}: layers share {what}, so none can be skipped: attach the compressor alone")


def _skip_options(skipper: LayerSkipper) -> dict[str, Any]:
    return {key: getattr(skipper, key) for key in ("alpha", "epsilon", "course", "protected", "importance")}


class SparseHandle:
    """What is attached to a model. Made by `attach`; `step` says where training stands, `detach` takes it all off."""

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        decoder: Any,
        layers: Sequence[nn.Module],
        head: Any,
        compressor: VisualTokenCompressor | None,
        skipper: LayerSkipper | None,
        seed: int,
        train_only: bool,
    ) -> None:
        self.model, self.parts, self.decoder, self.layers, self.head = model, parts, decoder, layers, head
        self.compressor, self.skipper, self.seed, self.train_only = compressor, skipper, seed, train_only
        self.attached, self.enabled = True, True
        self.passes: list[Pass] = []
        self._drawn = 0  # passes of the present step: each draws its own random tokens
        self._batch: tuple[Any, dict[str, Any]] | None = None
        self._visual_BT: torch.Tensor | None = None
        self._dropped: _Dropped | None = None
        self._images: list[int] = []
        self._idle = {"compressor": 0, "skipper": 0}
        self._patched: list[tuple[Any, str, Any, Any]] = []  # owner, attribute, ours, what stood on the instance
        self._hooks = [model.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._hooks.append(model.register_forward_hook(self._after, always_call=True))
        self._patch(decoder, "forward", self._decoder_forward)
        self._patch(head, "forward", self._head_forward)
        for number, layer in enumerate(layers):
            self._patch(layer, "forward", self._layer_forward(number))
        self._watch_features()
        model._sparsight_handle = self  # type: ignore[assignment]
        self.step(0, 0.0)

    # ------------------------------------------------------------------------------------------ course of training

    def step(self, step: int, progress: float) -> None:
        """Settle what is kept and which layers are off until the next call: one optimizer step, all its micro-batches.

        Args:
            step: number of the optimizer step, from 0.
            progress: share of the stage that is done, 0 to 1.
        """
        self.global_step, self.progress, self._drawn = step, progress, 0
        self.keep = 1.0
        if (c := self.compressor) is not None:
            dense = c.dense_every is not None and step % c.dense_every == 0
            self.keep = 1.0 if dense else c.keep if c.final is None else anneal(c.schedule, c.keep, c.final, progress)
        self.off: tuple[bool, ...] = (False,) * self.parts.layers
        if self.skipper is not None:
            chances = skip_probabilities(self.parts.layers, progress, **_skip_options(self.skipper))
            self.off = skipped_layers(chances, self.seed, step)

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
        return self.attached and self.enabled and (self.model.training or not self.train_only)

    def take_passes(self) -> list[Pass]:
        """What was executed since the last call."""
        passes, self.passes = self.passes, []
        return passes

    def clear_gradients(self) -> None:
        """Before the optimizer's step: a layer that is off loses its gradients, so that nothing of it is updated,
        neither by weight decay nor by moments."""
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
        before = list(self.passes), self._drawn, self.train_only, self.model.training
        self.model.eval()
        with self.disabled():
            dense = float(self.model(*args, **kwargs).loss)
        self.train_only = False
        sparse = float(self.model(*args, **kwargs).loss)
        self.passes, self._drawn, self.train_only, training = before
        self.model.train(training)
        return {"loss_dense": dense, "loss_sparse": sparse}

    def report(self) -> dict[str, Any]:
        """What is attached where, and what it does at present."""
        return {
            "parts": self.parts,
            "compressor": self.compressor,
            "skipper": self.skipper,
            "active": self.active(),
            "step": self.global_step,
            "progress": self.progress,
            "keep": self.keep,
            "layers_off": [number for number, off in enumerate(self.off) if off],
        }

    def state_dict(self) -> dict[str, Any]:
        """Where training stands; all else follows from the settings."""
        return {"step": self.global_step, "progress": self.progress, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError if it was drawn with another seed."""
        if state["seed"] != self.seed:
            raise ValueError(f"the state was made with seed {state['seed']}, this handle has {self.seed}")
        self.step(state["step"], state["progress"])

    def detach(self) -> None:
        """Leave the model as it was. Raises ValueError if it was wrapped over what was attached, as FSDP does."""
        if not self.attached:
            raise ValueError("detached already")
        for owner, name, ours, _ in self._patched:
            if owner.__dict__.get(name) is not ours:
                raise ValueError(f"cannot detach: {name} of {type(owner).__name__} was wrapped since; unwrap it first")
        for owner, name, _, before in self._patched:
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
        for hook in self._hooks:
            hook.remove()
        del self.model._sparsight_handle
        self.attached = False

    # --------------------------------------------------------------------------------------------------- patches

    def _patch(self, owner: Any, name: str, wrapper: Any) -> None:
        plain = getattr(owner, name)

        @wraps(plain)  # transformers reads signatures
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(plain, *args, **kwargs)

        self._patched.append((owner, name, patched, owner.__dict__.get(name)))
        setattr(owner, name, patched)

    def _watch_features(self) -> None:
        """Let the module that splices visual tokens in tell how many each image has."""

        def get_image_features(plain: Any, *args: Any, **kwargs: Any) -> Any:
            found = plain(*args, **kwargs)
            features = getattr(found, "pooler_output", found)
            self._images = [int(image.shape[-2]) for image in features] if features is not None else []
            return found

        owner: Any = getattr(self.model, "model", self.model)
        if hasattr(owner, "get_image_features"):
            self._patch(owner, "get_image_features", get_image_features)

    def _before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._dropped, self._images = None, []
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.model.training:
            self._batch = args, kwargs
        self._visual_BT = None
        if isinstance(ids, torch.Tensor):
            self._visual_BT = torch.isin(ids, torch.tensor(self.parts.visual_token_ids, device=ids.device))

    def _after(self, *_: Any) -> None:
        self._dropped = self._visual_BT = None

    def _layer_forward(self, number: int) -> Any:
        def forward(plain: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.off[number] and self.active():
                return self._touched(hidden, self.layers[number])
            return plain(hidden, *args, **kwargs)

        return forward

    def _touched(self, hidden: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """DDP waits for a gradient of every parameter: a zero, which `clear_gradients` takes away again."""
        if not (torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return hidden
        zero = sum(0.0 * p.sum() for p in layer.parameters() if p.requires_grad)
        return hidden + (zero.to(hidden.dtype) if isinstance(zero, torch.Tensor) else 0.0)

    def _head_forward(self, plain: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The vocabulary's projection, paid for kept positions alone."""
        if self._dropped is None or hidden.ndim != 3 or hidden.shape[1] != self._dropped.length:
            return plain(hidden)
        return self._dropped.scatter(plain(self._dropped.gather(hidden, 1)))

    def _decoder_forward(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        embeds, visual_BT = kwargs.get("inputs_embeds"), self._visual_BT
        if not self.active() or embeds is None or visual_BT is None or visual_BT.shape != embeds.shape[:2]:
            return plain(*args, **kwargs)
        visual = int(visual_BT.sum())
        self._watch("compressor", self.compressor is not None and visual == 0)
        self._watch("skipper", self.skipper is not None and not any(self.off))
        rows, length = embeds.shape[:2]
        run = self.parts.layers - sum(self.off)
        self._drawn += 1
        if self.keep == 1.0 or visual == 0:
            self.passes.append(Pass(rows, length, length, run, visual, visual))
            return plain(*args, **kwargs)
        kwargs = dict(kwargs)
        embeds, keep_BT = self._compressed(embeds, visual_BT, kwargs.get("attention_mask"))
        lengths_B = keep_BT.sum(1)
        kept = int(lengths_B.max())
        index_BK = (~keep_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        valid_BK = torch.arange(kept, device=embeds.device) < lengths_B[:, None]
        dropped = self._dropped = _Dropped(index_BK, valid_BK, embeds.shape[1])
        self.passes.append(Pass(rows, length, kept, run, visual, int((keep_BT & visual_BT).sum())))
        self._gather_inputs(kwargs, dropped, keep_BT, visual_BT)
        output = plain(*args, **(kwargs | {"inputs_embeds": dropped.gather(embeds, 1)}))
        if getattr(output, "router_logits", None) is not None:
            raise ValueError(
                f"{type(self.model).__name__} was asked for router_logits, whose loss balances experts over all "
                "positions: with a compressor, set output_router_logits=False"
            )
        for key in ("last_hidden_state", "hidden_states"):
            value = getattr(output, key, None)
            if isinstance(value, torch.Tensor):
                output[key] = dropped.scatter(value)
            elif value is not None:
                output[key] = tuple(dropped.scatter(state) for state in value)
        return output

    def _watch(self, method: str, idle: bool) -> None:
        self._idle[method] = self._idle[method] + 1 if idle else 0
        if self._idle[method] == _IDLE:
            why = "no batch had a picture" if method == "compressor" else "no layer was off"
            warnings.warn(f"the {method} had no effect in {_IDLE} passes: {why}", NoEffectWarning, stacklevel=2)

    # ------------------------------------------------------------------------------------------------ compression

    def _compressed(
        self, embeds_BTD: torch.Tensor, visual_BT: torch.Tensor, mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings in which kept places hold what they now stand for, and which places are kept, (B, T)."""
        assert self.compressor is not None
        keep_BT = torch.ones_like(visual_BT)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            keep_BT &= mask.bool()
        places_M2 = visual_BT.nonzero()
        runs = self._runs(places_M2)
        options: dict[str, Any] = {}
        if self.compressor.method == "random":
            draw = self.global_step * 2**20 + self._drawn
            options["generator"] = torch.Generator().manual_seed((self.seed * 2**40 + draw) % 2**63)
        starts = [0, *accumulate(runs)]
        for length, members in groupby(sorted(range(len(runs)), key=lambda number: runs[number]), runs.__getitem__):
            rows_I = torch.tensor([starts[number] for number in members], device=embeds_BTD.device)
            place_IN2 = places_M2[rows_I[:, None] + torch.arange(length, device=embeds_BTD.device)]
            sample_IN, position_IN = place_IN2.unbind(-1)
            tokens_IND = embeds_BTD[sample_IN, position_IN]
            if self.compressor.method == "text":
                options["text_BTD"] = embeds_BTD[sample_IN[:, 0]].detach()
                options["text_mask_BT"] = (keep_BT & ~visual_BT)[sample_IN[:, 0]]
            side = round(length**0.5)
            grid = (side, side) if side * side == length else None
            few_IKD, index_IK = compress(tokens_IND, self.keep, self.compressor.method, grid=grid, **options)
            # What follows a picture is said by its last position: that one stays.
            index_IK = torch.cat([index_IK[:, :-1], torch.full_like(index_IK[:, :1], length - 1)], 1)
            if self.compressor.method not in ("pool", "merge"):
                few_IKD = tokens_IND.gather(1, index_IK[..., None].expand_as(few_IKD))
            target = sample_IN.gather(1, index_IK), position_IN.gather(1, index_IK)
            keep_BT[sample_IN, position_IN] = False
            keep_BT[target] = True
            embeds_BTD = embeds_BTD.index_put(target, few_IKD.to(embeds_BTD.dtype))
        return embeds_BTD, keep_BT

    def _runs(self, places_M2: torch.Tensor) -> list[int]:
        """How many visual tokens each image has, in reading order: as its features say, else by unbroken runs."""
        if sum(self._images) == len(places_M2):
            return self._images
        step_M = places_M2[1:] - places_M2[:-1]
        breaks = ((step_M[:, 0] != 0) | (step_M[:, 1] != 1)).nonzero().flatten().add(1).tolist()
        edges = [0, *breaks, len(places_M2)]
        return [end - start for start, end in pairwise(edges)]

    def _gather_inputs(
        self, kwargs: dict[str, Any], dropped: _Dropped, keep_BT: torch.Tensor, visual_BT: torch.Tensor
    ) -> None:
        """Every input that runs along the sequence, cut to the kept positions."""
        assert self.compressor is not None
        batch, length = visual_BT.shape
        kwargs["attention_mask"] = _gather_mask(kwargs.get("attention_mask"), dropped)
        places = kwargs.get("position_ids")
        if self.compressor.positions == "renumbered":
            kwargs["position_ids"] = torch.arange(dropped.index_BK.shape[1], device=visual_BT.device).expand(batch, -1)
        else:
            kwargs["position_ids"] = dropped.index_BK if places is None else dropped.gather(places, places.ndim - 1)
        self._gather_deep(kwargs, dropped, keep_BT)
        for key, value in kwargs.items():
            known = ("inputs_embeds", "attention_mask", "position_ids", *_DEEP, *_DEEP.values())
            if key not in known and isinstance(value, torch.Tensor) and tuple(value.shape[:2]) == (batch, length):
                kwargs[key] = dropped.gather(value, 1)

    def _gather_deep(self, kwargs: dict[str, Any], dropped: _Dropped, keep_BT: torch.Tensor) -> None:
        """Features that are added in deeper layers: one for each visual position (M), a list or by layer."""
        for places, features in _DEEP.items():
            if (mask := kwargs.get(places)) is None:
                continue
            kept_M = keep_BT[mask if mask.ndim == 2 else mask[..., 0]]
            levels = kwargs[features]
            if isinstance(levels, dict):
                kwargs[features] = {layer: level[kept_M] for layer, level in levels.items()}
            else:
                kwargs[features] = [level[kept_M] for level in levels]
            valid = dropped.valid_BK if mask.ndim == 2 else dropped.valid_BK[..., None]
            kwargs[places] = dropped.gather(mask, 1) & valid


def _gather_mask(mask: Any, dropped: _Dropped) -> Any:
    """The mask of any backend that is a tensor, for the kept positions."""
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return dropped.valid_BK.long()
    if isinstance(mask, dict):  # one for each kind of layer
        return {key: _gather_mask(value, dropped) for key, value in mask.items()}
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise ValueError(f"cannot compress under an attention mask of type {type(mask).__name__}: use sdpa or eager")
    rows = dropped.gather(mask.transpose(1, 2), 1).transpose(1, 2)
    both = dropped.gather(rows.permute(0, 3, 1, 2), 1).permute(0, 2, 3, 1)
    # Padding at the end sees and is seen by nothing but itself: causal, behind all that counts.
    seen = dropped.valid_BK[:, None, None] | torch.eye(both.shape[-1], dtype=torch.bool, device=both.device)
    blocked = False if both.dtype == torch.bool else torch.finfo(both.dtype).min
    return both.masked_fill(~seen, blocked)
