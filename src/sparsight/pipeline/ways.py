"""One checkpoint asked in several ways: layouts of visual tokens, and shares of these; the time and memory of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsight.compat import CACHE
from sparsight.devices.flops import flop_counter
from sparsight.errors import UserError
from sparsight.evaluation.answers import AnswerFile
from sparsight.evaluation.ask import Questions, Scores, any_prompts, our_prompts
from sparsight.evaluation.significance import bootstrap, holm, paired_test
from sparsight.layouts import Layout
from sparsight.modeling import SparsightProcessor
from sparsight.modeling.scaling import laid_out
from sparsight.schedules import kept_tokens
from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.parts import find_parts

ROUNDS, STEPS, ROWS = 5, 16, 8  # of timing: rounds, tokens that are decoded, questions in a batch


@dataclass(frozen=True)
class Way:
    """A layout of visual tokens (none: the model's own), and the share of them that the ``method`` of a compressor
    leaves."""

    layout: str | None = None
    keep: float = 1.0
    method: str = "uniform"

    def __str__(self) -> str:
        own = "own layout" if self.layout is None else self.layout
        return own if self.keep == 1 else f"{own}, {self.keep:g} of them ({self.method})"

    @contextmanager
    def taken(self, model: Any, processor: Any) -> Iterator[None]:
        """The model asked like this, for a while. Raises UserError if it cannot take the layout."""
        with nullcontext() if self.layout is None else laid_out(model, processor, self.layout):
            compressor = CompressorConfig.read({"keep": self.keep, "method": self.method}, "--keep")
            handle = attach(model, compressor, train_only=False) if self.keep != 1 else None
            try:
                yield
            finally:
                if handle is not None:
                    handle.detach()

    def kept(self, out: Path, folder: str | Path, *asked: Any) -> list[AnswerFile]:
        """Files of the answers, and of those of the control; ``asked``: what else decides them."""
        files = sorted(file for end in ("safetensors", "json") for file in Path(folder).glob(f"*.{end}"))
        model = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        keys = (hashlib.sha256(repr((str(folder), model, self, n, asked)).encode()) for n in range(2))
        return [AnswerFile(out / "answers.jsonl", key.hexdigest()[:16]) for key in keys]


def ways_of(model: Any, processor: Any, layouts: str | None, keep: str | None, method: str) -> list[Way]:
    """Every layout with every share, as the command line has them: presets between commas, or layouts of scales between
    semicolons. Raises UserError for one that the model cannot take."""
    texts: list[str | None] = [None]
    if layouts is not None:
        if not isinstance(processor, SparsightProcessor):
            raise UserError(
                f"--layouts {layouts}: a model of type '{model.config.model_type}' has no layout; expected one of "
                "Sparsight. --keep works on any"
            )
        parts = [[part] if ":" in part else part.split(",") for part in layouts.split(";")]
        texts = [text.strip() for part in parts for text in part]
    try:
        shares = [float(share) for share in (keep or "1").split(",")]
    except ValueError:
        raise UserError(f"--keep {keep}: expected shares between commas, such as 1,0.5,0.25") from None
    ways = [Way(text, share, method) for text in texts for share in shares]
    for way in ways:
        try:
            if way.layout is not None:
                Layout.parse(way.layout)
            with way.taken(model, processor):
                pass
        except UserError as error:
            raise UserError(f"{way}: this checkpoint cannot be asked like that: {error}") from None
    return ways


@torch.no_grad()
def _measured(model: Any, processor: Any, questions: Questions, count: bool) -> dict[str, float]:
    """Seconds, and bytes of keys and values, of a question in a batch; with ``count`` also FLOPs to the first token."""
    ours, rows, device = isinstance(processor, SparsightProcessor), min(ROWS, len(questions.items)), model.device
    by_length = sorted(questions.items, key=lambda item: len(item.question))
    items = [by_length[len(by_length) // 2]] * rows  # one question, so that no row is padded
    encode: Any = nullcontext
    if ours:
        pixels = processor.pixels([questions.image(item.image) for item in questions.items[:rows]]).to(device)
        encode = partial(model.get_image_features, **pixels, return_dict=True)
        _, prompt = our_prompts(model, processor, items, encode().pooler_output, torch.arange(rows, device=device))
    else:
        _, prompt = any_prompts(model, processor, items, [lambda: [questions.image(items[0].image)]] * rows)
    inputs, pad = prompt(range(rows)), processor.tokenizer.pad_token_id

    def generate(tokens: int) -> Any:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
        return model.generate(**inputs, **options, return_dict_in_generate=True)

    seconds, results = [], []
    for step in (encode, partial(generate, 1), partial(generate, 1 + STEPS)):
        start = time.perf_counter()
        results.append(step())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start) / rows)
    found = {"encode_seconds": seconds[0], "prefill_seconds": seconds[1]}
    found["decode_seconds"] = (seconds[2] - seconds[1]) / STEPS
    cache = results[1][CACHE if CACHE in results[1] else "past_key_values"]
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found["cache_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in held) / rows
    visual = torch.isin(inputs["input_ids"], torch.tensor(find_parts(model).visual_token_ids, device=device))
    found["visual_tokens"] = int(visual.sum()) // rows
    if count:
        with flop_counter(model) as counter:
            encode()
            generate(1)
        found["flops"] = counter.get_total_flops() / rows
    return found


def costs_of(model: Any, processor: Any, ways: Sequence[Way], questions: Questions) -> list[dict[str, float]]:
    """What a question costs in each way: medians of rounds in which the ways take turns. On a GPU also the peak."""
    model.eval()
    rounds: list[list[dict[str, float]]] = [[] for _ in ways]
    for number in range(1 + ROUNDS):
        for way, own in zip(ways, rounds, strict=True):
            if on_gpu := model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            with way.taken(model, processor):
                own.append(_measured(model, processor, questions, count=number == 0))
            own[-1]["visual_tokens"] = kept_tokens(int(own[-1]["visual_tokens"]), way.keep)
            if on_gpu:
                own[-1]["peak_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return [own[0] | {key: median(each[key] for each in own[1:]) for key in own[1]} for own in rounds]


def curve_of(ways: Sequence[Way], results: Sequence[Scores], costs: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """A record for each way: mean over the tasks with its 95% interval, difference from the first way with that of a
    paired test, p raised for the number of ways (Holm), scores by task, and costs."""
    parts = [[point for own in result.points.values() for point in own] for result in results]
    images = [image for own in results[0].images.values() for image in own]
    tasks = [task for task, own in results[0].points.items() for _ in own]
    tests = [paired_test(own, parts[0], images, tasks) for own in parts[1:]]
    raised = iter(holm([test.p_value for test in tests]))
    curve: list[dict[str, Any]] = []
    for way, own, result, cost in zip(ways, parts, results, costs, strict=True):
        whole, test = bootstrap(own, images, tasks), tests[len(curve) - 1] if curve else None
        record: dict[str, Any] = {"layout": way.layout, "keep": way.keep, "method": way.method, **cost}
        record |= {"score": whole.mean, "interval": [whole.low, whole.high]}
        if test is not None:
            record |= {"difference": test.difference, "difference_interval": [test.low, test.high]}
            record["p_value"] = next(raised)
        record |= {"scores": result.scores, "shuffled": result.shuffled, "blind": result.blind}
        curve.append(record | {"items": result.items})
    return curve
