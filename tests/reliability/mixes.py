"""Mixes of what ranks may have to train on, how they are sharded and what is switched on; a step or two of each."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from collectives import Record, divergence, every_rank
from families import IMAGE, PATCH, SIDE, WORDS, batch_of
from families import _pixels as pixels_of
from families import made as family
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from ranks import wrapped
from test_video import FRAMES, VIDEO, shown
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from tiny import make_vlm

# Images and videos in each sample of a rank's batch.
KINDS: dict[str, tuple[tuple[int, int], ...]] = {
    "text": ((0, 0), (0, 0)),
    "image": ((1, 0), (0, 0)),
    "images": ((2, 0), (1, 0)),
    "video": ((0, 1), (0, 0)),
    "both": ((0, 1), (1, 0)),
}
STILLS = ("llava, clip + llama", "sparsight", "smolvlm")
MOVING = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
MODELS = (*STILLS, *MOVING)
PACKS = STILLS[:2]  # those whose position ids are numbers of positions, and not of frames, rows and columns
SIZES = (2,) * 8 + (3, 4) * 6 + (5, 6, 8) * 2 + (12, 16, 32, 64)  # of worlds; small ones more often, as they are quick
ALL = 8  # ranks run each in worlds of so many; in larger ones, those that are alike run once
BUCKET = 0.01  # MiB of gradients that DDP reduces together: several, as in a large model


@dataclass(frozen=True)
class Mix:
    """``kinds``: what each rank has in the first step; in the next one it has what the rank behind it had."""

    kinds: tuple[str, ...]
    model: str = STILLS[0]
    engine: str = "ddp"
    steps: int = 1
    compressor: str = ""
    skipper: bool = False
    lora: bool = False
    packing: bool = False
    checkpointing: bool = False
    frozen_vision: bool = False
    seed: int = 0


def random_mix(choose: Callable[[Sequence[Any]], Any], largest: int = 64, models: Sequence[str] = MODELS) -> Mix:
    """``choose`` one of several values; the first ones are the simplest."""
    model, ranks = choose(models), choose([size for size in SIZES if size <= largest])
    kinds = [kind for kind in KINDS if model in MOVING or kind not in ("video", "both")]
    yes = (False, True)
    return Mix(
        kinds=tuple(choose(kinds) for _ in range(ranks)),
        model=model,
        engine=choose(("ddp", "fsdp2")),
        steps=choose((1, 1, 2) if ranks <= ALL else (1,)),
        compressor=choose(("", "uniform", "similarity")),
        skipper=choose(yes),
        lora=choose(yes),
        packing=model in PACKS and choose(yes),
        checkpointing=choose(yes),
        frozen_vision=choose(yes),
        seed=choose(range(999)),
    )


@st.composite
def mixes(draw: Any, **limits: Any) -> Mix:
    """The same for hypothesis, which shrinks them."""
    return random_mix(lambda values: draw(st.sampled_from(values)), **limits)


@cache
def _plain(name: str, lora: bool) -> Any:
    if name == "sparsight":
        model: Any = make_vlm()[0].train()
        targets = r".*language_model.*\.[qv]_proj"
    else:
        model = family(name)
        targets = r".*language_model.*\.[qv]_proj|.*text_model.*layers.*[qv]_proj"
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets)) if lora else model


class _Packed(pickle.Pickler):
    """A model, packed once, so that a copy takes a third of `deepcopy`'s time. Functions are not copied."""

    def __init__(self, model: Any) -> None:
        self.text, self.kept = io.BytesIO(), dict[int, Any]()
        super().__init__(self.text, pickle.HIGHEST_PROTOCOL)
        self.dump(model)

    def persistent_id(self, found: Any) -> int | None:
        if isinstance(found, (torch.Tensor, FunctionType)):
            self.kept[id(found)] = found
            return id(found)
        return None

    def copy(self) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self.text.getvalue()))
        unpickler.persistent_load = cache(lambda key: deepcopy(self.kept[key]))  # type: ignore[method-assign]
        return unpickler.load()


@cache
def _packed(name: str, lora: bool) -> _Packed:
    return _Packed(_plain(name, lora))


@cache
def _words_for_image(name: str) -> int:
    model = _plain(name, False)
    if name == "sparsight":
        return model.config.num_image_tokens
    return int(batch_of(name, model, (1,))["input_ids"].eq(IMAGE).sum())


def batch(mix: Mix, kind: str, seed: int) -> dict[str, Any]:
    """Rows of words, images and videos; the last words are supervised."""
    name, generator = mix.model, torch.Generator().manual_seed(seed)
    image = _plain(name, False).config.image_token_id if name == "sparsight" else IMAGE
    samples = []
    for stills, videos in KINDS[kind]:
        row = [20, *[image] * _words_for_image(name)] * stills + [21, *(shown(name) if videos else ())]
        samples.append(torch.tensor(row + torch.randint(30, WORDS, (4 + seed % 3,), generator=generator).tolist()))
    if mix.packing:  # as transformers takes it: positions start anew, and there is no mask
        ids = torch.cat(samples)[None]
        found = {"input_ids": ids, "position_ids": torch.cat([torch.arange(len(sample)) for sample in samples])[None]}
    else:
        ids = pad_sequence(samples, batch_first=True)
        found = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    found["labels"] = ids.masked_fill((ids < 30) | (ids >= WORDS), -100)
    stills, videos = (sum(counts) for counts in zip(*KINDS[kind], strict=True))
    if stills:
        found |= pixels_of(name, stills, generator)
    if name.startswith("qwen"):
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long() + 2 * (found["input_ids"] == VIDEO).long()
    if videos and name.startswith("qwen"):
        side = SIDE // PATCH
        found["video_grid_thw"] = torch.tensor([[FRAMES, side, side]] * videos)
        found["pixel_values_videos"] = torch.randn(videos * FRAMES * side**2, 6 * PATCH**2, generator=generator)
    elif videos:
        found["pixel_values_videos"] = torch.randn(videos, FRAMES, 3, SIDE, SIDE, generator=generator)
    return found


def train(mix: Mix, rank: int) -> None:
    """The steps of one rank, as a loop around an attached model has them."""
    model = _packed(mix.model, mix.lora).copy()
    if mix.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compressor = CompressorConfig(keep=0.5 if mix.compressor else 1.0, method=mix.compressor or "uniform")
    skipper = SkipperConfig(alpha=0.6, epsilon=0.0, schedule="constant") if mix.skipper else None
    handle = attach(model, compressor, skipper, seed=mix.seed)
    if mix.frozen_vision:
        model.get_submodule(handle.parts.vision).requires_grad_(False)
    if mix.engine == "fsdp2":
        parallel = wrapped(model, handle, "fsdp")
    else:
        parallel = DistributedDataParallel(model, bucket_cap_mb=BUCKET)
    # DTensor plans an operation on a list of tensors anew for every list.
    groups = [{"params": [p]} for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for step, kind in enumerate(_kinds(mix, rank)):
        handle.step(step, 0.0)
        parallel(**batch(mix, kind, 100 * rank + step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad()


def _kinds(mix: Mix, rank: int) -> list[str]:
    return [mix.kinds[(rank + step) % len(mix.kinds)] for step in range(mix.steps)]


def alike(mix: Mix, rank: int) -> Hashable:
    """All that a rank of a large world differs in: what it trains on, the sizes of its shards, and that it is the first
    or the last one. So those that agree in it are taken to have one batch."""
    ranks = len(mix.kinds)
    if ranks <= ALL:
        return rank
    rows = {len(parameter) for parameter in _plain(mix.model, mix.lora).parameters()} if mix.engine == "fsdp2" else ()
    shards = [min(max(each - rank * -(-each // ranks), 0), -(-each // ranks)) for each in rows]
    return rank == 0, rank == ranks - 1, *_kinds(mix, rank), *shards


def records(mix: Mix) -> list[Record]:
    return every_rank(len(mix.kinds), partial(train, mix), partial(alike, mix))


def parted(mix: Mix) -> str:
    """Where ranks part, if they do."""
    return divergence(records(mix))
