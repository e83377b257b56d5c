"""Attach compressor and skipper to a VLM of transformers that was never made for them, and take them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from sparsight.errors import UserError
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.forward import Forwards, NoEffectWarning, Pass, State
from sparsight.sparse.parts import Parts, check_skippable, find_parts
from sparsight.sparse.patches import Held

__all__ = ["NoEffectWarning", "Pass", "SparseHandle", "attach"]


def attach(
    model: Any,
    compressor: CompressorConfig | SkipperConfig | None = None,
    skipper: SkipperConfig | CompressorConfig | None = None,
    *,
    seed: int = 0,
    train_only: bool = True,
    supervised_logits_only: bool = False,
) -> SparseHandle:
    """Compress visual and audio tokens and skip layers of any VLM in training; layers also of models with text alone.

    A skipper, and a compressor whose ``keep`` follows a schedule, wait for `SparseHandle.step`, which
    `SparsightCallback` calls: until then all is dense. `find_parts` shows what would be touched.

    Args:
        compressor, skipper: either or both; known by type, in either position.
        seed: of the methods' draws, which are functions of (seed, step, layer) alone.
        train_only: in eval mode the model is the plain one, and so it is in any mode inside of ``generate`` and where a
            cache of keys and values is given.
        supervised_logits_only: project on the vocabulary only the positions that predict a label (ours): loss and
            gradients are the same, and the memory of all other logits is saved. There are no logits to look at then.
            Neither method is needed beside it.

    Raises:
        UserError: the model cannot take them, or has them already, or none is given; or its loss needs all logits.
    """
    if isinstance(compressor, SkipperConfig) or isinstance(skipper, CompressorConfig):
        compressor, skipper = skipper, compressor
    if compressor is None and skipper is None and not supervised_logits_only:
        raise UserError(
            "attach was given neither a compressor nor a skipper: write attach(model, CompressorConfig(...), "
            "SkipperConfig(...)), or one of them"
        )
    for name, given, kind in (("compressor", compressor, CompressorConfig), ("skipper", skipper, SkipperConfig)):
        if not isinstance(given, kind | None):
            raise UserError(
                f"{name}: expected a {kind.__name__}, found {given!r}; write attach(model, {name}={kind.__name__}(...))"
            )
    splits = isinstance(skipper, SkipperConfig) and skipper.tokens == "visual"
    parts = find_parts(model, needs_vision=compressor is not None or splits)
    if isinstance(skipper, SkipperConfig):
        skipper.probabilities(parts.layers, 0.0)  # more protected layers than there are, ...
        check_skippable(model, model.get_submodule(parts.decoder).layers)
    if getattr(model, "_sparsight_handle", None) is not None:
        raise UserError(f"{type(model).__name__} has something attached already: detach() that handle first")
    methods: Any = compressor, skipper
    state = State(parts.layers, methods[0], methods[1], seed, train_only, supervised_logits_only)
    return SparseHandle(model, parts, state)


def _read(path: str) -> Any:
    """A property that cannot be set."""
    return property(attrgetter(path))


class SparseHandle:
    """The methods attached to a model. Made by `attach`; `step` says where training stands, `detach` takes it all off.
    Attributes are read-only."""

    model: nn.Module = _read("_forwards.model")
    parts: Parts = _read("_forwards.parts")
    layers: Sequence[nn.Module] = _read("_forwards.layers")
    splicer: Any = _read("_forwards.splicer")  # the module that puts visual tokens into the sequence
    compressor: CompressorConfig | None = _read("_state.compressor")
    skipper: SkipperConfig | None = _read("_state.skipper")
    seed: int = _read("_state.seed")
    train_only: bool = _read("_state.train_only")
    global_step: int = _read("_state.global_step")
    progress: float = _read("_state.progress")
    keep: float = _read("_state.keep")  # share of the visual tokens in this step
    skipped: tuple[bool, ...] = _read("_state.skipped")  # whether each layer is, in this step
    resting: tuple[bool, ...] = _read("_state.resting")  # whether nothing goes through each layer in this step
    attached: bool = _read("_forwards.attached")
    active: Callable[[], bool] = _read("_forwards.active")  # whether the methods act in a forward pass now
    pixel_flops: dict[str, float] = _read("_forwards.pixel_flops")
    passes_in_step: int = _read("_forwards.in_step")  # with gradients, since the last `step`
    encoder_calls: dict[str, Any] = _read("_forwards.encoder_calls")

    def __init__(self, model: nn.Module, parts: Parts, state: State) -> None:
        self._state, self._forwards = state, Forwards(model, parts, state)
        model._sparsight_handle = Held(self.detach, None)  # type: ignore[assignment]

    @property
    def passes(self) -> list[Pass]:
        """The passes that nobody has taken yet; the last ones, if there are tens of thousands."""
        return list(self._forwards.passes)

    def take_passes(self) -> list[Pass]:
        """`passes`, which are forgotten."""
        passes = self.passes
        self._forwards.passes.clear()
        return passes

    def step(self, step: int, progress: float) -> None:
        """Settle what is kept and which layers are skipped in all micro-batches of an optimizer step, numbered from 0;
        ``progress`` is the share of the stage that is done, 0 to 1."""
        if self._forwards.uncleared:
            self._forwards.tell(
                "gradients",
                "skipped layers have gradients of zero on several ranks: call handle.clear_gradients() before each "
                "step of the optimizer, as SparsightCallback does, else weight decay and moments change these layers",
                UserWarning,
            )
        self._forwards.uncleared, self._forwards.in_step = False, 0
        self._state.step(step, progress)

    def expect_step(self, within: int) -> None:
        """Warn, once, when more passes than this have gone through with gradients since the last `step`."""
        self._forwards.patience = within

    def set_skipped(self, skipped: Sequence[bool]) -> None:
        """Skip these layers until the next `step`, in place of those drawn. Raises UserError for a wrong number."""
        if len(skipped) != len(self.layers):
            raise UserError(f"skipped has {len(skipped)} values, but the model has {len(self.layers)} layers")
        self._state.skipped, self._state.waits = tuple(skipped), False

    def at_its_largest(self) -> None:
        """Settle for this step what takes most memory in the course of training: the most tokens, and all layers."""
        self._state.keep = 1.0 if self.compressor is None else self.compressor.most
        self._state.skipped, self._state.scales = (False,) * len(self.layers), (1.0,) * len(self.layers)

    def clear_gradients(self) -> None:
        """Before the optimizer's step: a skipped layer loses its gradients, so that nothing of it is updated, neither
        by weight decay nor by moments."""
        self._forwards.uncleared = False
        for layer, rests in zip(self.layers, self.resting, strict=True):
            for parameter in layer.parameters() if rests and self.attached else ():
                parameter.grad = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model, for a while."""
        before, self._state.enabled = self._state.enabled, False
        try:
            yield
        finally:
            self._state.enabled = before

    @torch.no_grad()
    def dense_probe(self) -> dict[str, float]:
        """The loss of the last batch without the methods and with them, both in eval mode; empty before any batch."""
        forwards, state, model = self._forwards, self._state, self.model
        if forwards.last is None:
            return {}
        args, kwargs, known = forwards.last
        kwargs = {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
        before = forwards.passes.copy(), state.drawn, state.train_only
        modes = [(module, module.training) for module in model.modules()]  # frozen parts may be in eval mode
        model.eval()
        forwards.probing, state.train_only = True, False
        try:
            with self.on_host(known):
                with self.disabled():
                    dense = model(*args, **kwargs).loss
                sparse = model(*args, **kwargs).loss
        finally:
            forwards.probing = False
            forwards.passes, state.drawn, state.train_only = before
            for module, training in modes:
                module.training = training
        if dense is None:
            raise UserError(
                f"the trainer gives {type(model).__name__} no labels, so there is no loss: leave out probes"
            )
        return {"loss_dense": float(dense), "loss_sparse": float(sparse)}

    @contextmanager
    def on_host(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Passes within are over a batch that the host has as well, by the same names: it is not copied back."""
        self._forwards.known = inputs
        try:
            yield
        finally:
            self._forwards.known = {}

    def release(self) -> None:
        """Let go of the last batch, which is kept for `dense_probe`."""
        self._forwards.last = None

    def report(self) -> dict[str, Any]:
        """The methods, where they are attached, and their present state."""
        shown = ("parts", "compressor", "skipper", "global_step", "progress", "keep", "skipped")
        now = {"active": self.active(), "waits_for_step": self._state.waits}
        return {name: getattr(self, name) for name in shown} | now

    def detach(self) -> None:
        """Leave the model as it was. Raises UserError if it was wrapped over what was attached, as FSDP does."""
        self._forwards.remove()
        del self.model._sparsight_handle
