"""The feature cache of a stage: images encoded once, and charged once to every run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

import torch
from rich.progress import TaskID
from rich.text import Text

from sparsight.console import Progress
from sparsight.data.cache import FeatureCache, build_cache, image_rows
from sparsight.data.sources import Source
from sparsight.devices.precision import default_device
from sparsight.devices.ranks import process_state
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.pipeline.evaluate import autocast
from sparsight.pipeline.files import Session
from sparsight.settings.recipe import Stage


@dataclass(frozen=True)
class Encoding:
    """Seconds and FLOPs that this run paid to encode its images once."""

    seconds: float
    flops: float


def cached_features(
    session: Session,
    stage: Stage,
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    source: Source,
    encoder_flops: float,
) -> tuple[FeatureCache, Encoding]:
    log, made_of = session.log, hashlib.sha256()
    for tensor in model.model.vision_tower.state_dict().values():
        made_of.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    rows, contents = image_rows(source.fingerprints())
    how = model.config.vision_levels, session.recipe.precision, processor.image_processor.to_json_string()
    made_of.update(f"{contents} {how}".encode())
    folder = session.cache_root / made_of.hexdigest()[:16]
    images = len(set(rows.values()))

    # A model that comes from disk is not on the GPU yet; only the Trainer takes it there, and FSDP in its own way.
    tower, device = model.model.vision_tower, default_device()

    def encode(part: Sequence[Hashable]) -> tuple[torch.Tensor, ...]:
        pixels = processor.pixels([source.image(key) for key in part])
        return model.model.encode_images(**pixels.to(device))

    def warn(text: str) -> None:
        session.console.print(Text(text, style="yellow"), soft_wrap=True)

    model.eval()
    with process_state().main_process_first(), ExitStack() as stack, autocast(session.recipe.precision, device):

        @lru_cache(maxsize=1)
        def shown() -> tuple[Progress, TaskID]:  # not where the cache is there already
            bar = stack.enter_context(Progress(console=session.console))
            return bar, bar.add_task("encoding images", total=images)

        def tell(done: int) -> None:
            bar, task = shown()
            bar.update(task, completed=done)

        before = model.device
        tower.to(device)
        cache = build_cache(folder, rows, encode, tell, tell=warn)
        tower.to(before)
    _tell_whether_it_pays(cache, list(rows), stage, session)
    if not session.main:
        return cache, Encoding(0.0, 0.0)
    # Seconds and FLOPs of building the cache count in every run once, also where another run has built it: by itself,
    # each would have to build it.
    others = {name: cache["folder"] for name, cache in log.run().caches.items() if name != stage.name}
    paid = str(folder) in others.values()
    cost = Encoding(0.0, 0.0) if paid else Encoding(cache.seconds, encoder_flops * images)
    log.write("cache", stage=stage.name, folder=str(folder), images=images, seconds=cost.seconds, flops=cost.flops)
    return cache, cost


def _tell_whether_it_pays(cache: FeatureCache, keys: Sequence[Hashable], stage: Stage, session: Session) -> None:
    """Encoding every image once and reading it for each sample, against encoding it for each sample, over all stages
    of the run that cache the same; said once, where it does not pay."""
    recipe = session.recipe
    same = [each for each in recipe.of_the_same_data(stage) if each.cache_features]
    if stage != same[0]:
        return
    start, some = time.perf_counter(), keys[:64]
    for key in some:
        cache.read([key])
    reading, encoding = (time.perf_counter() - start) / len(some), cache.seconds / len(set(cache.rows.values()))
    samples = sum(each.samples for each in same)
    cached, plain = cache.seconds + samples * reading, samples * encoding
    if cached > plain:
        session.console.print(
            f"cached features: {encoding * 1e3:.1f} ms to encode an image, {reading * 1e3:.1f} ms to read it. The run "
            f"does not see images often enough for it to pay ({cached:.0f} s against {plain:.0f} s): unless other runs "
            "use them, set cache_features: false",
            soft_wrap=True,
        )
