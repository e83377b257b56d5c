"""Settings of training data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sparsight.errors import UserError
from sparsight.settings.base import Settings


class SceneData(Settings):
    """The embedded data: an endless, seeded generator of images with exact truth."""

    kind: Literal["scenes"] = "scenes"
    scenes: int = Field(4000, ge=1, description="different training images")
    kinds: int = Field(32, ge=2, le=64)
    min_things: int = Field(1, ge=1, le=8)
    max_things: int = Field(6, ge=1, le=8)
    numbers: float = Field(0.5, ge=0, le=1)
    digits: tuple[int, int] = Field((1, 2), description="fewest and most digits of a printed number")
    number_size: int = Field(40, ge=8, description="font size of a printed number, in pixels of an image of 256")
    grid: int = Field(3, ge=2, le=3, description="cells per side that things stand in")
    noise: float = Field(0.5, ge=0, le=1, description="share of noisy grounds; photos stand on landscapes instead")
    held_out: float = Field(0.1, ge=0, le=0.5, description="share of (kind, cell) pairs that training never shows")
    questions: int = Field(6, ge=1)
    tasks: dict[str, float] | None = Field(None, description="weight of each task; the seven basic ones if not given")
    cutouts: Literal["auto", "emoji", "shapes", "families", "photos"] = Field(
        "auto", description="emoji if installed, else shapes; families and photos keep images apart by split"
    )
    seed: int = 0


class ConversationData(Settings):
    """Conversations with ``conversations`` (LLaVA) or ``messages``, and ``image``, ``images``, ``video`` or ``videos``:
    .json or .jsonl, parquet, a Dataset of Hugging Face saved on disk, or tar shards (WebDataset; without videos)."""

    kind: Literal["json", "parquet", "datasets", "shards"] = "json"
    path: str = Field(description="a file; for datasets a folder; for parquet and shards a file, a folder or a pattern")
    images: str | None = Field(None, description="folder of the images and videos; the file's own folder if not given")
    video_frames: int = Field(8, ge=1, description="frames of a video, evenly spread over it; each is an image")
    index_folder: str | None = Field(None, description="where indices of shards lie; beside the shards if not given")

    @model_validator(mode="after")
    def _all_used(self) -> ConversationData:
        if self.kind == "shards" and self.images is not None:
            raise UserError(f"images '{self.images}': images of shards lie in the shards; leave it out")
        if self.kind != "shards" and self.index_folder is not None:
            raise UserError(f"index_folder '{self.index_folder}': only shards have indices; leave it out")
        return self


class MixturePart(Settings):
    """One source of a mixture. ``name`` stands before its samples' ids; its number from 0 if not given."""

    data: Annotated[SceneData | ConversationData, Field(discriminator="kind")]
    weight: float = Field(1, gt=0, allow_inf_nan=False, description="its share, next to the other parts' weights")
    name: str | None = None


class MixtureData(Settings):
    """Several sources, mixed by weight."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=1)


Data = Annotated[SceneData | ConversationData | MixtureData, Field(discriminator="kind")]


class Conversation(Settings):
    """An average conversation of the data, for `sparsight plan`, which does not read data."""

    renamed: ClassVar = frozenset({"learnt"})

    text: float = Field(64, gt=0, description="text tokens, those of the chat template included")
    supervised: float = Field(32, gt=0, description="text tokens that are supervised")
    images: float = Field(1, ge=0)
