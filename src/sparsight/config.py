"""Recipes and component settings: frozen pydantic models; a key nobody knows is an error. No torch."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from sparsight.layouts import Layout, Scale


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys are errors, the nearest right key is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"; did you mean '{near[0]}'?" if near else "."
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"unknown key '{key}' in {cls.__name__}{hint} Known keys: {known}")
        return values


class _Bridge(Settings):
    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        """Visual tokens for one image whose feature map has (H, W) patches. The one count that all parts use."""
        raise NotImplementedError


class Linear(_Bridge):
    """One linear map per patch: H*W tokens (LLaVA)."""

    kind: Literal["linear"] = "linear"

    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        return map_size[0] * map_size[1]


class Mlp(_Bridge):
    """Two linear maps with GELU between, per patch: H*W tokens (LLaVA-1.5)."""

    kind: Literal["mlp"] = "mlp"

    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        return map_size[0] * map_size[1]


class PixelShuffle(_Bridge):
    """``factor`` x ``factor`` patches folded into one token, then an MLP (InternVL, Idefics3)."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(2, ge=1)

    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        # Ceiling: a map that does not divide is padded, never cropped.
        return -(-map_size[0] // self.factor) * -(-map_size[1] // self.factor)


class _Windowed(_Bridge):
    width: int = Field(1024, ge=1, description="width of queries and attention; the paper's is 1024")
    heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    depth: int = Field(1, ge=1, description="rounds over the feature levels")
    query_std: float = Field(
        0.02,
        gt=0,
        description="start values of the queries; the paper's 0.02 needs long training, short runs learn with 1",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> _Windowed:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        return self

    @property
    def scales(self) -> Layout:
        raise NotImplementedError

    def visual_tokens(self, map_size: tuple[int, int]) -> int:
        return self.scales.tokens


class Resampler(_Windowed):
    """The single-scale resampler: ``tokens`` queries that see the whole picture, i.e. the layout ``1:tokens``."""

    kind: Literal["resampler"] = "resampler"
    tokens: int = Field(336, ge=1)

    @property
    def scales(self) -> Layout:
        return Layout.parse(f"1:{self.tokens}")


class ChainOfSight(_Windowed):
    """Multi-scale windowed resamplers (Chain-of-Sight, section 3). The values not given are the paper's.

    Args:
        layout: scales such as ``"1:16,4:4"`` or a preset such as ``"cos-80"``.
        order: of the tokens; the paper's is coarse to fine, the other is its ablation.
        shared_queries: one set of queries for all windows of a scale (ablation), not a row for each token.
    """

    kind: Literal["chain_of_sight"] = "chain_of_sight"
    layout: str = "1:16,4:4"
    order: Literal["coarse_to_fine", "fine_to_coarse"] = "coarse_to_fine"
    shared_queries: bool = False

    def __init__(self, layout: str | Layout | None = None, /, **values: Any) -> None:
        if layout is not None:
            values["layout"] = layout
        super().__init__(**values)

    @field_validator("layout", mode="before")
    @classmethod
    def _canonical(cls, value: Any) -> str:
        return str(Layout.parse(value))

    @property
    def scales(self) -> Layout:
        return Layout.parse(self.layout)


BRIDGE_KINDS = ("linear", "mlp", "pixel_shuffle", "resampler", "chain_of_sight")


def _spelled_out(value: Any) -> Any:
    """A bridge's kind, or a layout, as the settings that it stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value == "paper":
        return {"kind": "chain_of_sight"}
    return {"kind": value} if value in BRIDGE_KINDS else {"kind": "chain_of_sight", "layout": value}


_Kinds = Annotated[Linear | Mlp | PixelShuffle | Resampler | ChainOfSight, Field(discriminator="kind")]
Bridge = Annotated[_Kinds, BeforeValidator(_spelled_out, json_schema_input_type=_Kinds | str)]
_BRIDGE: TypeAdapter[Any] = TypeAdapter(Bridge)


def bridge_settings(value: Any) -> Linear | Mlp | PixelShuffle | Resampler | ChainOfSight:
    """Settings of a bridge from settings, a dict, a kind such as ``"mlp"``, or a layout such as ``"cos-80"``.

    ``"paper"`` is Chain-of-Sight with the paper's values: 80 tokens, width 1024, 16 heads, one round.

    Raises:
        ValueError: the kind or a key is unknown, or a value is out of range.
    """
    if isinstance(value, _Bridge):
        return value  # type: ignore[return-value]
    try:
        return _BRIDGE.validate_python(value)
    except ValidationError as error:
        raise ValueError(readable(error)) from None


def check_scaling(old: Bridge, new: Bridge, sources: Mapping[int, int] | None = None) -> dict[Scale, Scale]:
    """Where each scale of a bridge would be born from; ``sources`` as in `Layout.lineage`.

    Raises:
        ValueError: the bridge ``old`` cannot become ``new``: a scale has no source, or more than the layout differs.
    """
    if not isinstance(old, _Windowed) or not isinstance(new, ChainOfSight | type(old)):
        raise ValueError(
            f"a bridge of kind {old.kind} cannot become one of kind {new.kind}: only resampler and chain_of_sight can "
            "be scaled, to chain_of_sight"
        )
    sizes = ("width", "heads", "mlp_ratio", "depth", "order", "shared_queries")
    values = {key: [getattr(each, key, ChainOfSight.model_fields[key].default) for each in (old, new)] for key in sizes}
    if changed := {key: pair for key, pair in values.items() if pair[0] != pair[1]}:
        raise ValueError(f"scaling changes the layout alone, but these differ (old, new): {changed}")
    return old.scales.lineage(new.scales, sources)


class VisualTokenCompressor(Settings):
    """Fewer visual tokens behind the bridge, in training alone (Sparse Training Scheme, stage I).

    Args:
        keep: share of the visual tokens that stay, at the stage's start.
        method: see ``sparse.compress``.
        final: share at the stage's end, reached by ``schedule``; ``keep`` throughout if not given.
        dense_every: every so many steps all tokens stay; never if not given.
        positions: tokens that stay keep their "original" places, or are "renumbered" without gaps.
    """

    keep: float = Field(0.25, gt=0, le=1)
    method: Literal["uniform", "random", "text", "pool", "similarity", "merge"] = "uniform"
    final: float | None = Field(None, gt=0, le=1)
    schedule: Literal["constant", "linear", "cosine", "steps"] = "linear"
    dense_every: int | None = Field(None, ge=1)
    positions: Literal["original", "renumbered"] = "original"


class LayerSkipper(Settings):
    """Layers of the language model that are off in a step, forward and backward, in training alone (Sparse Training
    Scheme, stage II). See ``schedules.skip_probabilities``.

    Args:
        protected: how many first and last layers always run.
        importance: of each layer, as ``sparsight analyze`` measures it; then the tilt follows it in place of depth.
    """

    alpha: float = Field(0.6, ge=0, le=1)
    epsilon: float = Field(0.3, ge=-1, le=1)
    course: Literal["falling", "constant", "rising"] = "falling"
    protected: tuple[int, int] = (0, 0)
    importance: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _probabilities(self) -> LayerSkipper:
        if self.alpha * (1 + abs(self.epsilon)) > 1:
            raise ValueError(f"alpha {self.alpha}, epsilon {self.epsilon}: expected alpha * (1 + |epsilon|) <= 1")
        if min(self.protected) < 0:
            raise ValueError(f"protected {self.protected}: expected numbers of first and last layers")
        return self


class ScratchLanguage(Settings):
    """A small Qwen3 trained from nothing, with a tokenizer made from the data. Widths in units, not bytes."""

    hidden: int = Field(192, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(3, ge=1)
    intermediate: int = Field(512, ge=8)
    vocabulary: int = Field(1024, ge=300, description="size of the tokenizer's table at most")
    context: int = Field(2048, ge=64)


class SceneData(Settings):
    """The embedded data: an endless, seeded generator of pictures with exact truth."""

    kind: Literal["scenes"] = "scenes"
    scenes: int = Field(4000, ge=1, description="different training pictures")
    kinds: int = Field(32, ge=2, le=64)
    min_things: int = Field(1, ge=1, le=8)
    max_things: int = Field(6, ge=1, le=8)
    numbers: float = Field(0.5, ge=0, le=1)
    digits: tuple[int, int] = Field((1, 2), description="fewest and most digits of a printed number")
    number_size: int = Field(40, ge=8, description="font size of a printed number, in pixels of a picture of 256")
    grid: int = Field(3, ge=2, le=3, description="cells per side that things stand in")
    noise: float = Field(0.5, ge=0, le=1)
    held_out: float = Field(0.1, ge=0, le=0.5, description="share of (kind, cell) pairs that training never shows")
    questions: int = Field(6, ge=1)
    tasks: dict[str, float] | None = Field(None, description="weight of each task; all alike if not given")
    cutouts: Literal["auto", "emoji", "shapes", "families"] = "auto"
    seed: int = 0


class ConversationData(Settings):
    """Conversations with ``conversations`` (LLaVA) or ``messages``, and ``image`` or ``images``: .json or .jsonl,
    parquet, a Dataset of Hugging Face saved on disk, or tar shards (WebDataset)."""

    kind: Literal["json", "parquet", "datasets", "shards"] = "json"
    path: str = Field(description="a file; for datasets a folder; for parquet and shards a file, a folder or a pattern")
    images: str | None = Field(None, description="folder of the pictures; the file's own folder if not given")
    index_folder: str | None = Field(None, description="where indices of shards lie; beside the shards if not given")

    @model_validator(mode="after")
    def _all_used(self) -> ConversationData:
        if self.kind == "shards" and self.images is not None:
            raise ValueError(f"images '{self.images}': pictures of shards lie in the shards; leave it out")
        if self.kind != "shards" and self.index_folder is not None:
            raise ValueError(f"index_folder '{self.index_folder}': only shards have indices; leave it out")
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


class Lora(Settings):
    """LoRA on all linear maps of the language model (peft). Merged when the stage ends."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class Conversation(Settings):
    """A conversation of the data, on average. It is what `sparsight plan` reckons with: it does not read data."""

    text: float = Field(64, gt=0, description="text tokens, those of the chat template included")
    learnt: float = Field(32, gt=0, description="text tokens that are learnt")
    images: float = Field(1, ge=0)


class LearningRates(Settings):
    """Peak learning rate of each part; a part that is not named is frozen."""

    vision: float | None = Field(None, gt=0)
    bridge: float | None = Field(None, gt=0)
    language: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _something_trains(self) -> LearningRates:
        if not self.parts():
            raise ValueError("nothing trains: give a learning rate to at least one of vision, bridge, language")
        return self

    def parts(self) -> dict[str, float]:
        return {part: rate for part, rate in self if rate is not None}


class Stage(Settings):
    """One stage of training, with its own layout, image size, and what trains."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    bridge: Bridge
    places_of: str | None = Field(
        None, description="layout whose places in the sequence the visual tokens take: the one they will be scaled to"
    )
    proportional_attention: bool = Field(
        False, description="with places_of: a visual token weighs in attention as the tokens that will be born from it"
    )
    image_size: int | None = Field(
        None, ge=16, description="side of the square image in pixels; the encoder's own if not given"
    )
    learning_rate: LearningRates
    samples: int = Field(ge=1, description="conversations seen in this stage")
    batch_size: int = Field(16, ge=1, description="conversations in one optimizer step, over all ranks")
    micro_batch_size: int | None = Field(None, ge=1, description="conversations in one forward pass")
    batch_tokens: int | None = Field(
        None, ge=1, description="in place of batch_size: positions in one forward pass, padding included"
    )
    packing: bool = Field(False, description="conversations share rows, without attention across them")
    pack_length: int | None = Field(None, ge=1, description="length of a packed row; that of the longest if not given")
    lora: Lora | None = None
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more FLOPs"
    )
    conversation: Conversation = Field(Conversation(), description="what `plan` reckons with; training counts")
    compressor: VisualTokenCompressor | None = Field(None, description="fewer visual tokens, in training alone")
    skipper: LayerSkipper | None = Field(None, description="layers that are off, in training alone")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices inside, adamw for all else; the same learning rates"
    )
    weight_decay: float = Field(0.0, ge=0)
    adam_beta2: float = Field(
        0.98,
        ge=0,
        lt=1,
        description="decay of AdamW's second moments; 0.98 remembers about 50 steps, as stages may be short, where "
        "torch's 0.999 remembers 1,000",
    )
    max_grad_norm: float = Field(1.0, gt=0)
    checkpoints: int = Field(4, ge=0, description="checkpoints written in the course of the stage")
    data: Data | None = Field(None, description="in place of the recipe's data")
    tasks: dict[str, float] | None = Field(None, description="weight of each task of scenes, in place of data.tasks")
    cache_features: bool = Field(False, description="encode each picture once; the encoder must be frozen")
    max_length: int | None = Field(
        None, ge=2, description="tokens of a sample, visual ones too; the language model's context if not given"
    )
    on_too_long: Literal["error", "drop_sample", "shrink_image"] = "error"

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"stage '{self.name}': batch_size {self.batch_size} is not a multiple of {micro}")
        if micro is not None and self.batch_tokens is not None:
            raise ValueError(f"stage '{self.name}': batch_tokens settles what micro_batch_size does; give one of them")
        # By value: what was saved with its defaults is read again.
        given = self.batch_size != type(self).model_fields["batch_size"].default or self.pack_length is not None
        if self.batch_tokens is not None and given:
            raise ValueError(
                f"stage '{self.name}': batch_tokens settles what batch_size and pack_length do; give it or them"
            )
        if self.pack_length is not None and not self.packing:
            raise ValueError(f"stage '{self.name}': pack_length needs packing: true")
        if self.lora is not None and self.learning_rate.language is None:
            raise ValueError(f"stage '{self.name}': lora needs learning_rate.language")
        if self.cache_features and self.learning_rate.vision is not None:
            raise ValueError(f"stage '{self.name}': features cannot be cached while the vision encoder trains")
        if self.places_of is not None:
            if self.packing or not isinstance(self.bridge, _Windowed):
                raise ValueError(
                    f"stage '{self.name}': places_of '{self.places_of}' needs a resampler or chain_of_sight, and no "
                    f"packing; found {self.bridge.kind}, packing {self.packing}"
                )
            if getattr(self.bridge, "order", "coarse_to_fine") != "coarse_to_fine":
                raise ValueError(f"stage '{self.name}': places_of goes with order: coarse_to_fine alone")
            self.bridge.scales.places(Layout.parse(self.places_of))
        if self.proportional_attention and (self.places_of is None or self.compressor is not None):
            raise ValueError(
                f"stage '{self.name}': proportional_attention needs places_of, and no compressor; found "
                f"{self.places_of}, {self.compressor}"
            )
        if self.on_too_long == "shrink_image":
            raise ValueError(
                f"stage '{self.name}': on_too_long: shrink_image makes no sample shorter: a bridge gives every picture "
                "the same number of visual tokens. Take a layout with fewer tokens, or set error or drop_sample"
            )
        return self

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def side(self) -> int:
        """``image_size``, once it is settled: a run asks the encoder where the recipe says none."""
        assert self.image_size is not None, f"stage '{self.name}': its image size is not settled"
        return self.image_size


class HeldOut(Settings):
    """Conversations to ask after training; each question is asked by itself."""

    data: ConversationData
    metric: Literal["exact_match", "cider_d", "box_match"] = Field(
        "exact_match", description="exact_match normalises answers as VQA does; cider_d is a tenth of CIDEr-D"
    )
    items: int = Field(500, ge=1, description="questions at most, from the first one")


def held_out_file(data: Path | None, images: Path | None, metric: str, items: int) -> HeldOut | None:
    """What `sparsight eval --data` asks; None without data.

    Raises:
        ValueError: images without data, no such metric, or a number out of range.
    """
    if data is None:
        if images is not None:
            raise ValueError(f"--images {images}: expected --data as well, the conversations about these pictures")
        return None
    source = {"path": str(data), "images": str(images) if images else None}
    try:
        return HeldOut.model_validate({"data": source, "metric": metric, "items": items})
    except ValidationError as error:
        raise ValueError(readable(error)) from None


class Evaluation(Settings):
    """Scores after training. ``scenes`` asks the embedded test split; ``none`` asks ``held_out`` alone, if there is
    any."""

    kind: Literal["scenes", "none"] = "scenes"
    items: int = Field(100, ge=1, description="questions of each task")
    batch_size: int = Field(50, ge=1)
    split: Literal["validation", "test"] = "test"
    held_out: dict[str, HeldOut] = Field(default_factory=dict, description="name -> conversations to ask")


class Recipe(Settings):
    """Everything that a run needs; a YAML file holds one."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]+$")
    seed: int = 0
    vision: str = "efficientnet-lite0"
    vision_levels: tuple[int, ...] | None = Field(
        None, description="feature levels, lower first; encoder's own if not given"
    )
    language: str | ScratchLanguage = "smollm2-135m"
    language_layers: int | None = Field(None, ge=1, description="keep only the first layers of the language model")
    resize: Literal["square", "pad", "crop", "keep"] | None = Field(
        None, description="how pictures come to image_size; square if not given, keep for a native-resolution encoder"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 (autocast) where the device has instructions for it, else fp32"
    )
    data: Data = SceneData()
    workers: int = Field(1, ge=0, description="processes that load data")
    on_bad_sample: Literal["error", "quarantine"] = Field("error", description="quarantine: another one in its place")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of the samples seen above which quarantine stops")
    report_to: tuple[Literal["trackio", "tensorboard", "wandb"], ...] = Field(
        (), description="trackers that get the run log's figures, too, through Hugging Face's Trainer"
    )
    stages: tuple[Stage, ...] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need different names, found {names}")
        cached = [stage.name for stage in self.stages if stage.cache_features]
        if cached and self.on_bad_sample == "quarantine":
            raise ValueError(
                f"on_bad_sample: quarantine, but the stages {cached} cache the features of all pictures before they "
                "train: set cache_features: false, or take out what `sparsight data check` finds"
            )
        if reserved := {"total", "score"} & set(names):
            raise ValueError(f"a stage cannot be named {sorted(reserved)}: comparisons have figures of that name")
        return self

    @model_validator(mode="after")
    def _every_stage_can_begin(self) -> Recipe:
        for old, new in pairwise(self.stages):
            try:
                if old.bridge != new.bridge:
                    check_scaling(old.bridge, new.bridge)
            except ValueError as error:
                raise ValueError(f"stages '{old.name}' -> '{new.name}': {error}") from None
        for stage in self.stages:
            self.data_of(stage)
        if "mean" in self.evaluation.held_out:
            raise ValueError("evaluation.held_out: 'mean' is the mean of all scores; choose another name")
        return self

    def source_of(self, stage: Stage) -> Data:
        """The stage's own data, or else the recipe's."""
        return stage.data or self.data

    def data_of(self, stage: Stage) -> Data:
        """A stage's data, with the tasks that it asks.

        Raises:
            ValueError: the stage names tasks, but the data are not scenes.
        """
        data = self.source_of(stage)
        if stage.tasks is None:
            return data
        if not isinstance(data, SceneData):
            raise ValueError(
                f"stage '{stage.name}' names tasks, which only scenes have; found data of kind '{data.kind}'"
            )
        return data.model_copy(update={"tasks": stage.tasks})

    def all_data(self) -> list[Data]:
        """What the stages train on, each once."""
        found: list[Data] = []
        for stage in self.stages:
            if (data := self.source_of(stage)) not in found:
                found.append(data)
        return found

    def of_the_same_data(self, stage: Stage) -> list[Stage]:
        """The stages that see the same data as this one, itself included, in their order."""
        return [each for each in self.stages if self.source_of(each) == self.source_of(stage)]

    def samples_before(self, stage: Stage) -> int:
        """Conversations that earlier stages have had of the same data."""
        same = self.of_the_same_data(stage)
        return sum(each.samples for each in same[: same.index(stage)])

    def scenes(self) -> SceneData | None:
        """The first scenes among the recipe's data, with the tasks that any stage trains on (None: all)."""
        found: list[SceneData] = []
        for stage in self.stages:
            data = self.data_of(stage)
            parts = [part.data for part in data.parts] if isinstance(data, MixtureData) else [data]
            found += [part for part in parts if isinstance(part, SceneData)]
        if not found:
            return None
        named = [each.tasks for each in found if each.tasks is not None]
        tasks = {task: w for own in named for task, w in own.items() if w > 0} if len(named) == len(found) else None
        return found[0].model_copy(update={"tasks": tasks})


def builtin_recipe(name: str) -> Path:
    """A recipe that comes with Sparsight: inside the installed package, or beside `src` in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"recipe '{name}' is not part of this installation of Sparsight")


def _builtin_named(file: Path) -> Path:
    """The built-in recipe that ``recipes/NAME`` stands for where there is no such file.

    Raises:
        FileNotFoundError: it stands for none. A bare name may be a user's file in another folder: that is only told.
    """
    folder = builtin_recipe("demo.yaml").parent
    if file == Path("recipes", file.name) and (folder / file.name).is_file():
        return folder / file.name
    named = file.name if (folder / file.name).is_file() else "NAME.yaml"
    raise FileNotFoundError(
        f"no recipe at {file.absolute()}; those that come with Sparsight are called recipes/{named} and lie in {folder}"
    )


def load_recipe(path: str | Path, overrides: list[str] | None = None, preset: str | None = None) -> Recipe:
    """Read a YAML recipe and apply ``key=value`` overrides, dotted, list items by number or by stage name.

    ``stages.pretrain.batch_size=8`` and ``data.scenes=200`` are overrides. ``recipes/NAME.yaml``, where there is no
    such file, is the recipe of that name that comes with Sparsight.

    Args:
        preset: ``few-tokens``, ``scale-settled`` or ``scale``: bridges and methods of `recipes/presets.yaml`, in place
            of the recipe's; it splits samples as overrides have left them, and overrides of its own keys and stage
            come after it.

    Raises:
        ValueError: the file is not a YAML mapping, or a key or value is wrong; the message names each. Or there is no
            such preset, or the recipe has one stage alone.
        FileNotFoundError: there is no such file.
    """
    values = _read_yaml(Path(path), overrides, preset)
    if "runs" in values:
        raise ValueError(f"{path} compares runs; it is for: sparsight demo --recipe {path}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {readable(error)}") from None


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> Comparison:
    """Read the YAML of a comparison; overrides and errors as in `load_recipe`."""
    values = _read_yaml(Path(path), overrides)
    if "stages" in values and "runs" not in values:
        raise ValueError(f"{path} is the recipe of one run; it is for: sparsight train {path}")
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {readable(error)}") from None


def load_recipes(path: str | Path, overrides: list[str] | None = None, preset: str | None = None) -> list[Recipe]:
    """The recipe of a YAML file, or those of a comparison; arguments and errors as in `load_recipe`."""
    if "runs" not in _read_yaml(Path(path), None):
        return [load_recipe(path, overrides, preset)]
    if preset is not None:
        raise ValueError(f"--preset {preset}: {path} compares runs; a preset is for one recipe")
    return load_comparison(path, overrides).recipes()


def _read_yaml(file: Path, overrides: list[str] | None, preset: str | None = None) -> dict[str, Any]:
    if not file.is_file():
        file = _builtin_named(file)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping of keys to values, found {type(values).__name__}")
    if preset is None:
        for override in overrides or []:
            _apply(values, override)
    else:
        _override_around(values, overrides or [], preset)
    return values


_OLD_PRESETS = {"fast": "few-tokens", "balanced": "scale-settled", "quality": "scale"}  # until the next release


def _lay_over(values: dict[str, Any], name: str) -> None:
    if (new := _OLD_PRESETS.get(name)) is not None:
        text = f"--preset {name} is now called {new}; the old name goes with the next release"
        warnings.warn(text, FutureWarning, stacklevel=2)
        name = new
    presets = yaml.safe_load(builtin_recipe("presets.yaml").read_text(encoding="utf-8"))
    if name not in presets:
        raise ValueError(f"--preset {name}: expected one of {', '.join(presets)}")
    stages = values.get("stages")
    if not isinstance(stages, list) or len(stages) < 2 or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"--preset {name}: expected a recipe of two stages or more: it scales between them")
    preset, last, settle = presets[name], stages[-1], None
    whole = last.get("samples")
    # What is no number is told when the recipe is read; a copy of all of it, as overrides are written into it.
    if isinstance(whole, int) and (samples := int(preset.get("settle", 0) * whole)):
        settle = deepcopy(last) | {"name": "settle", "samples": samples, "schedule": "constant_with_warmup"}
        last["samples"] = whole - samples
        stages.insert(-1, settle)
    # A bridge keeps its width and the like: those of the first stage that has any, as scaling does not change them.
    own = [stage.get("bridge") for stage in stages]
    sizes = [{k: v for k, v in each.items() if k in _Windowed.model_fields} for each in own if isinstance(each, dict)]
    kept = next(filter(None, sizes), {})
    for stage in stages:
        new = preset["late" if stage is last else "early"]
        stage |= {"compressor": None, "skipper": None, "places_of": None, "proportional_attention": stage is settle}
        stage |= new | {"bridge": kept | new["bridge"]}


_OF_PRESETS = ("bridge", "compressor", "skipper", "places_of", "proportional_attention")  # keys of every stage


def _override_around(values: dict[str, Any], overrides: list[str], preset: str) -> None:
    """Overrides, then the preset, which splits a stage as they have left it; then again what it has laid itself over,
    and what names its own stage. Numbers are those of the recipe's own stages."""
    after: list[tuple[dict[str, Any], str]] = []
    for override in overrides:
        place, _, rest = override.partition("=")[0].removeprefix("stages.").partition(".")
        stages = values.get("stages")
        if not override.startswith("stages.") or not rest or not isinstance(stages, list):
            _apply(values, override)
        elif place == "settle" and "settle" not in [each.get("name") for each in stages if isinstance(each, dict)]:
            after.append((values, override))
        else:
            stage, own = _list_item(stages, place, override), override.removeprefix(f"stages.{place}.")
            covered = rest.partition(".")[0] in _OF_PRESETS
            if covered:
                after.append((stage, own))
            try:
                _apply(values, override)
            except ValueError:
                if not covered:  # else it may be for what the preset is yet to put there
                    raise
    _lay_over(values, preset)
    for node, override in after:
        _apply(node, override)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override '{override}': expected key=value, such as seed=1")
    *path, last = key.split(".")
    node: Any = values
    for index, part in enumerate(path):
        if isinstance(node, list):
            node = _list_item(node, part, override)
        elif isinstance(node, dict):
            if node.get(part) is None:  # also what a preset has switched off
                node[part] = {}
            if part == "bridge":
                node[part] = _spelled_out(node[part])
            node = node[part]
        else:
            raise ValueError(f"override '{override}': '{'.'.join(path[:index])}' is not a mapping, found {node!r}")
    if not isinstance(node, dict):
        raise ValueError(f"override '{override}': '{'.'.join(path)}' is not a mapping, found {type(node).__name__}")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override '{override}': not valid YAML: {error}") from None


def _list_item(items: list[Any], part: str, override: str) -> Any:
    named = {item.get("name"): item for item in items if isinstance(item, dict)}
    if part in named:
        return named[part]
    if part.isdigit() and int(part) < len(items):
        return items[int(part)]
    raise ValueError(f"override '{override}': no item '{part}'; there are {[name for name in named if name]}")


# What pydantic says of a fault, in our words; {} are its own figures.
_SAID = {
    "missing": "expected a value, found none",
    "greater_than_equal": "expected {ge} or more",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected {le} or less",
    "less_than": "expected less than {lt}",
    "finite_number": "expected a finite number",
    "too_short": "expected {min_length} or more of them, found {actual_length}",
    "too_long": "expected {max_length} of them at most, found {actual_length}",
    "string_too_short": "expected {min_length} or more characters",
    "string_pattern_mismatch": "expected a text that matches {pattern}",
    "literal_error": "expected one of {expected}",
    "union_tag_invalid": "kind: expected one of {expected_tags}",
    "union_tag_not_found": "expected a mapping with a key 'kind'",
    "json_invalid": "expected JSON: {error}",
}
# By the beginning of the fault's type: the type of the value is wrong, or no such value can be read from a text.
_EXPECTED = {
    "model": "a mapping of keys to values",
    "dict": "a mapping of keys to values",
    "list": "a list",
    "tuple": "a list",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
}


def _said(fault: Any) -> str:
    kind, figures = fault["type"], fault.get("ctx", {})
    if kind == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    if kind in _SAID:
        return _SAID[kind].format(**figures)
    if (begin := kind.split("_")[0]) in _EXPECTED:
        return f"expected {_EXPECTED[begin]}"
    return str(fault["msg"])


def readable(error: ValidationError) -> str:
    """A pydantic error as one line per fault: where, what is wrong, what was given."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "recipe"
        given = fault["ctx"]["tag"] if fault["type"] == "union_tag_invalid" else fault.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
        lines.append(f"{where}: {_said(fault)}{shown}")
    return "\n".join(lines)


class Comparison(Settings):
    """Several recipes that share most keys; the first run is the one that others are compared with."""

    name: str = "comparison"
    shared: dict[str, Any] = Field(default_factory=dict, description="keys of every run's recipe")
    runs: dict[str, dict[str, Any]] = Field(min_length=2, description="run's name -> keys of its own")

    def recipes(self) -> list[Recipe]:
        """One recipe for each run: the shared keys, with the run's own laid over them."""
        recipes = []
        for name, own in self.runs.items():
            try:
                recipes.append(Recipe.model_validate(_merged(self.shared, own) | {"name": name}))
            except ValidationError as error:
                raise ValueError(f"runs.{name}: {readable(error)}") from None
        return recipes


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merged(below.get(key), above.get(key, below.get(key))) for key in {**below, **above}}
    if isinstance(below, list) and isinstance(above, list) and len(below) == len(above):
        return [_merged(low, high) for low, high in zip(below, above, strict=True)]
    return above
