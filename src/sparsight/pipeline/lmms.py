"""lmms-eval's way in: `lmms_eval --model sparsight --model_args pretrained=DIR,layout=cos-80 --tasks ...`.

It takes models of ours, and any image-text-to-text model of transformers. `sparsight.integrations.lmms_eval` announces
it; this module needs lmms-eval, that one does not load torch.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image

from sparsight.data.chat import stop_tokens
from sparsight.data.images import load_image
from sparsight.devices.precision import default_device, precision_on
from sparsight.devices.ranks import process_state
from sparsight.errors import UserError
from sparsight.modeling import SparsightProcessor
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.folders import model_type
from sparsight.modeling.scaling import scale_tokens
from sparsight.pipeline.evaluate import autocast
from sparsight.pipeline.files import load, load_any
from sparsight.sparse.forward import NoEffectWarning

_ARGUMENTS = ("pretrained", "layout", "image_size", "precision", "batch_size", "device")
_USED = {"max_new_tokens", "until", "num_beams", "do_sample", "temperature", "top_p"}
Chat = list[dict[str, Any]]


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
        ours = Path(pretrained).is_dir() and model_type(Path(pretrained)) in (None, SparsightConfig.model_type)
        if not ours and (layout or image_size):
            raise UserError(
                f"layout={layout}, image_size={image_size}: only models of ours have them, found {pretrained}"
            )
        self.model, self.processor = load(pretrained) if ours else load_any(pretrained)
        if layout or image_size:
            written = layout and layout.strip("'\"")  # quotes, as commas part arguments
            scale_tokens(self.model, self.processor, written, image_size)
        self.device = torch.device(device) if device else default_device()
        self.precision = precision_on(self.device, precision)
        if self.precision == "fp32" and not getattr(self.model, "is_quantized", False):
            self.model.float()
        self.model.to(self.device).eval()
        self.tokenizer, self.batch_size = self.processor.tokenizer, int(batch_size)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not (getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template):
            raise UserError(f"{pretrained}: expected chat_template.jinja beside the model, to write a question with")
        self._rank, self._world_size = process_state().process_index, process_state().num_processes

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, cut before the first of a task's stop texts."""
        given = [request.args for request in requests]
        for task, options in {args[-2]: args[1] for args in given}.items():
            sampled = (
                ("temperature", "do_sample") if options.get("temperature") and options.get("do_sample", True) else ()
            )
            unused = {key: options[key] for key in options if key in sampled or key not in _USED}
            if unused:
                said = f"task {task}: {unused} has no effect, answers are greedy"
                warnings.warn(said, NoEffectWarning, stacklevel=2)
        return self._batched(given, [options for _, options, *_ in given], self._answers)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each continuation as the answer: its negative log-likelihood, as lmms-eval takes the smallest of several,
        and whether it is the greedy answer. lmms-eval 0.7.3 makes texts of pairs, but of those in a result."""
        given = [request.args for request in requests]
        if short := next((args for args in given if len(args) < 6), None):
            raise UserError(f"expected requests with an image's document, found {short}: acc_mutual_info has none")
        wanted = [text if isinstance(text, str) else text(self._row(args)) for args in given for text in args[1:2]]
        return [GenerationResult(pair) for pair in self._batched(given, wanted, self._likelihoods)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("tasks of several rounds are not supported: choose one whose output_type is generate_until")

    def _row(self, args: Any) -> Any:
        *_, number, task, split = args
        return self.task_dict[task][split][number]

    def _chat(self, args: Any) -> Chat:
        images = (args[2](self._row(args)) if args[2] else None) or []
        if other := [type(each).__name__ for each in images if not isinstance(each, Image.Image | str)]:
            raise UserError(f"task {args[-2]}: expected images, found {other[0]}; videos and audio are not supported")
        parts = [{"type": "image", "image": load_image(each)} for each in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": args[0]}]}]

    @torch.no_grad()
    def _batched(self, given: Sequence[Any], more: Sequence[Any], answer: Callable[..., list[Any]]) -> list[Any]:
        """``answer`` for chats and what belongs to them, in batches of like length; as many images each."""
        found: list[Any] = [None] * len(given)
        same = [str(own) if isinstance(own, dict) else "" for own in more]
        rest = sorted(range(len(given)), key=lambda n: (same[n], len(given[n][0]), n))
        with autocast(self.precision, self.device):
            while rest:
                numbers: list[int] = []
                chats: list[Chat] = []
                for number in rest[: self.batch_size]:
                    chat = self._chat(given[number])
                    alike = not chats or len(chat[0]["content"]) == len(chats[0][0]["content"])
                    if not alike or same[number] != same[rest[0]]:
                        break
                    numbers, chats = [*numbers, number], [*chats, chat]
                rest = rest[len(numbers) :]
                for number, value in zip(numbers, answer(chats, [more[n] for n in numbers]), strict=True):
                    found[number] = value
        return found

    def _inputs(self, texts: list[str], chats: list[Chat], side: str) -> Any:
        self.tokenizer.padding_side = side
        images = [[part["image"] for part in chat[0]["content"][:-1]] for chat in chats]
        bos = self.tokenizer.bos_token
        written = bool(bos) and texts[0].startswith(bos)  # by the chat template
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": not written}
        inputs = self.processor(text=texts, **({"images": images} if images[0] else {}), **options)
        return inputs.to(self.device, dtype=self.model.dtype)

    def _answers(self, chats: list[Chat], options: list[dict[str, Any]]) -> list[str]:
        inputs, own = self._inputs([self._written(chat) for chat in chats], chats, "left"), options[0]
        ends = self.model.generation_config.eos_token_id
        produced = self.model.generate(
            **inputs,
            max_new_tokens=own.get("max_new_tokens", 1024),
            num_beams=own.get("num_beams") or 1,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=stop_tokens(self.tokenizer, ends) if isinstance(self.processor, SparsightProcessor) else ends,
        )
        tail = produced[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        stops = own.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return [text.strip() for text in texts]

    def _likelihoods(self, chats: list[Chat], answers: list[str]) -> list[tuple[float, bool]]:
        prompts = [self._written(chat) for chat in chats]
        texts = [self._written(chat, answer.strip()) for chat, answer in zip(chats, answers, strict=True)]
        inputs = self._inputs(texts, chats, "right")
        logits, ids = self.model(**inputs).logits, inputs["input_ids"]
        found = []
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            count = len(self.tokenizer(text)["input_ids"]) - len(self.tokenizer(prompt)["input_ids"])
            if count < 1:
                raise UserError(f"expected a text as an answer, found {answers[row]!r}, which has no tokens of its own")
            end = int(inputs["attention_mask"][row].sum())
            target = ids[row, end - count : end]
            log_probabilities = logits[row, end - count - 1 : end - 1].float().log_softmax(-1)
            chosen = log_probabilities.gather(1, target[:, None])
            found.append((-float(chosen.sum()), bool((log_probabilities.argmax(-1) == target).all())))
        return found

    def _written(self, chat: Chat, answer: str | None = None) -> str:
        """The chat as text, up to where an answer begins, or to its end."""
        write = self.processor.apply_chat_template
        prompt: str = write(chat, tokenize=False, add_generation_prompt=True)
        if answer is None:
            return prompt
        whole: str = write(
            [*chat, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], tokenize=False
        )
        if not whole.startswith(prompt):
            return prompt + answer
        return whole[: whole.index(answer, len(prompt)) + len(answer)]
