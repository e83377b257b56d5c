"""lmms-eval's way in: `lmms_eval --model sparsight --model_args pretrained=DIR,layout=cos-80 --tasks ...`.

It takes models of ours, and any image-text-to-text model of transformers. `sparsight.integrations.lmms_eval` announces
it; this module needs lmms-eval, that one does not load torch.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image

from sparsight.data.images import load_image
from sparsight.devices.precision import default_device, precision_on
from sparsight.devices.ranks import process_state
from sparsight.errors import UserError
from sparsight.evaluation.ask import Item, Prompts, answer, any_prompts, batches, choice_losses
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.scaling import scale_tokens
from sparsight.pipeline.evaluate import autocast
from sparsight.pipeline.files import load_either
from sparsight.sparse.forward import NoEffectWarning

_ARGUMENTS = ("pretrained", "layout", "image_size", "precision", "batch_size", "device")
_USED = {"max_new_tokens", "until", "num_beams", "do_sample", "temperature", "top_p"}


class Sparsight(lmms):
    """A model for lmms-eval. Its "simple" interface: the images of a question, then its text.

    Args:
        pretrained: folder of a model of ours, or that or the hub id of any image-text-to-text model.
        layout, image_size: of a model of ours, in place of its own (`scale_tokens`).
        precision: auto, bf16 or fp32, as in a recipe.
        batch_size: questions answered at once; answers do not depend on it.
        device: such as cuda:1; the process's own if not given.

    Raises:
        UserError: an argument that is not known, no such model, or a layout for a model that is not ours.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        layout: str | None = None,
        image_size: int | None = None,
        precision: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for key in others.keys() - {"max_batch_size"}:  # which lmms-eval always gives
            near = difflib.get_close_matches(key, _ARGUMENTS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UserError(f"model_args: unknown '{key}'{hint} Known: {', '.join(_ARGUMENTS)}")
        if not pretrained or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(
                f"expected model_args pretrained=DIR and a --batch_size of 1 or more; found pretrained='{pretrained}', "
                f"batch_size={batch_size}"
            )
        self.model, self.processor = load_either(pretrained)
        if (layout or image_size) and not isinstance(self.model.config, SparsightConfig):
            raise UserError(
                f"layout={layout}, image_size={image_size}: only models of ours have them, found {pretrained}"
            )
        if layout or image_size:
            written = layout and layout.strip("'\"")  # quotes, as commas part arguments
            scale_tokens(self.model, self.processor, written, image_size)
        self.device = torch.device(device) if device else default_device()
        self.precision = precision_on(self.device, precision)
        if self.precision == "fp32" and not getattr(self.model, "is_quantized", False):
            self.model.float()
        self.model.to(self.device).eval()
        self.tokenizer, self.batch_size = self.processor.tokenizer, int(batch_size)
        self._rank, self._world_size = process_state().process_index, process_state().num_processes

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, cut before the first of a task's stop texts."""
        given = [request.args for request in requests]
        for task, options in {args[-2]: args[1] for args in given}.items():
            sampled = options.get("temperature") and options.get("do_sample", True)
            idle = {"temperature", "do_sample"} if sampled else set()
            idle |= {"num_beams"} if (options.get("num_beams") or 1) > 1 else set()
            if unused := {key: value for key, value in options.items() if key in idle or key not in _USED}:
                said = f"task {task}: {unused} has no effect, answers are greedy"
                warnings.warn(said, NoEffectWarning, stacklevel=2)
        room = {repr(args[1]): int(args[1].get("max_new_tokens", 1024)) for args in given}
        items = [Item(repr(args[1]), number, args[0], "") for number, args in enumerate(given)]
        with autocast(self.precision, self.device):
            texts = answer(self.model, self.processor, items, self._prompts(items, given), self.batch_size, room=room)
        for at, args in enumerate(given):
            stops = args[1].get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                texts[at] = texts[at].split(stop)[0].strip() if stop else texts[at]
        return texts

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each continuation as the answer, stop token included, as `sparsight eval --choices`: its negative
        log-likelihood, as lmms-eval takes the smallest of several, and whether it is the greedy answer. A prompt is
        read once for all of its continuations. lmms-eval 0.7.3 makes texts of pairs, but of those in a result."""
        given = [request.args for request in requests]
        if short := next((args for args in given if len(args) < 6), None):
            raise UserError(f"expected requests with an image's document, found {short}: acc_mutual_info has none")
        texts = [args[1] if isinstance(args[1], str) else args[1](self._row(args)) for args in given]
        if empty := next((text for text in texts if not text.strip()), None):
            raise UserError(f"expected a text as an answer, found {empty!r}, which has no tokens of its own")
        own: dict[Any, list[int]] = {}
        for number, args in enumerate(given):
            own.setdefault((args[0], *args[3:]), []).append(number)
        rows = list(own.values())
        items = [Item("", 0, given[row[0]][0], "", choices=tuple(texts[at].strip() for at in row)) for row in rows]
        prompts, found = self._prompts(items, [given[row[0]] for row in rows]), list[Any]([None] * len(given))
        with autocast(self.precision, self.device):
            for numbers, inputs in batches(items, prompts, {"": 0}, self.batch_size):
                choices = [items[number].choices for number in numbers]
                pairs = [part.flatten().tolist() for part in choice_losses(self.model, self.tokenizer, inputs, choices)]
                for at, *pair in zip((at for number in numbers for at in rows[number]), *pairs, strict=True):
                    found[at] = GenerationResult(tuple(pair))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("tasks of several rounds are not supported: choose one whose output_type is generate_until")

    def _row(self, args: Any) -> Any:
        *_, number, task, split = args
        return self.task_dict[task][split][number]

    def _images(self, args: Any) -> list[Image.Image]:
        images = (args[2](self._row(args)) if args[2] else None) or []
        if other := [type(each).__name__ for each in images if not isinstance(each, Image.Image | str)]:
            raise UserError(f"task {args[-2]}: expected images, found {other[0]}; videos and audio are not supported")
        return [load_image(each) for each in images]

    def _prompts(self, items: Sequence[Item], given: Sequence[Any]) -> Prompts:
        return any_prompts(self.model, self.processor, items, [partial(self._images, args) for args in given])
