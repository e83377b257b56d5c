"""Recipes: stages, evaluation, and comparisons of several runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sparsight.errors import UserError
from sparsight.settings.base import Settings
from sparsight.settings.bridges import Bridge, LayoutField, WindowedSettings, check_scaling
from sparsight.settings.data import Conversation, ConversationData, Data, MixtureData, SceneData
from sparsight.settings.methods import CompressorConfig, SkipperConfig


class ScratchLanguage(Settings):
    """A small Qwen3 trained from nothing, with a tokenizer made from the data. Widths in units, not bytes."""

    hidden: int = Field(192, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(3, ge=1)
    intermediate: int = Field(512, ge=8)
    vocabulary: int = Field(1024, ge=300, description="size of the tokenizer's table at most")
    context: int = Field(2048, ge=64)


class PretrainedLanguage(Settings):
    """A language model that is loaded, as by its name alone, and how its weights are held while they are frozen."""

    path: str = Field(description="a known name, a hub id, or a local folder")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="nf4, int8: its linear maps in 4 or 8 bits (bitsandbytes); it then trains by LoRA alone"
    )


def _kind_of_language(given: Any) -> str:
    if isinstance(given, str | PretrainedLanguage):
        return "name" if isinstance(given, str) else "pretrained"
    return "pretrained" if isinstance(given, dict) and {"path", "quantization"} & given.keys() else "scratch"


Language = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[PretrainedLanguage, Tag("pretrained")]
    | Annotated[ScratchLanguage, Tag("scratch")],
    Discriminator(_kind_of_language),
]


class Lora(Settings):
    """LoRA on linear maps of the language model's layers (peft). Merged when the stage ends, or kept."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of the linear maps, such as q_proj and v_proj; all if not given"
    )
    scaling: Literal["standard", "rslora"] = Field(
        "standard", description="of what adapters give: alpha / rank, or alpha / sqrt(rank)"
    )
    keep: bool | None = Field(
        None,
        description="adapters stay beside the weights and go on in later stages, in place of being merged when the "
        "stage ends; a quantised language model must keep them, others merge if this is not given",
    )


class LearningRates(Settings):
    """Peak learning rate of each part; a part that is not named is frozen."""

    vision: float | None = Field(None, gt=0)
    bridge: float | None = Field(None, gt=0)
    language: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _something_trains(self) -> LearningRates:
        if not self.parts():
            raise UserError("nothing trains: give a learning rate to at least one of vision, bridge, language")
        return self

    def parts(self) -> dict[str, float]:
        return {part: rate for part, rate in self if rate is not None}


class Stage(Settings):
    """One stage of training, with its own layout, image size, and what trains."""

    renamed: ClassVar = frozenset({"places_of"})

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    bridge: Bridge
    position_layout: LayoutField | None = Field(
        None, description="layout whose positions the visual tokens take: the one that they will be scaled to"
    )
    proportional_attention: bool = Field(
        False, description="with position_layout: a visual token weighs in attention as all that it will be scaled to"
    )
    image_size: int | None = Field(None, ge=16, description="side of the square image in pixels; else the encoder's")
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
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more FLOPs")
    conversation: Conversation = Field(Conversation(), description="what `plan` expects of the data; training counts")
    compressor: CompressorConfig | None = Field(None, description="fewer visual tokens, in training alone")
    skipper: SkipperConfig | None = Field(None, description="layers that are skipped, in training alone")
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
        description="decay of AdamW's second moments: stages may be shorter than the 1,000 steps of 0.999",
    )
    max_grad_norm: float = Field(1.0, gt=0)
    checkpoints: int = Field(4, ge=0, description="checkpoints written over the stage")
    data: Data | None = Field(None, description="in place of the recipe's data")
    tasks: dict[str, float] | None = Field(None, description="weight of each task of scenes, in place of data.tasks")
    cache_features: bool = Field(False, description="encode each image once; the encoder must be frozen")
    max_length: int | None = Field(
        None, ge=2, description="tokens of a sample, visual ones too; the language model's context if not given"
    )
    on_too_long: Literal["error", "drop_sample", "shrink_image"] = "error"

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        micro, target, tokens, rates = (
            self.micro_batch_size,
            self.position_layout,
            self.batch_tokens,
            self.learning_rate,
        )
        # By value: what was saved with its defaults is read again.
        other = self.batch_size != type(self).model_fields["batch_size"].default or self.pack_length is not None
        order, windowed = getattr(self.bridge, "order", "coarse_to_fine"), isinstance(self.bridge, WindowedSettings)
        faults = {
            f"batch_size {self.batch_size} is not a multiple of {micro}": self.batch_size % (micro or 1),
            "batch_tokens settles what micro_batch_size does; give one of them": tokens and micro,
            "batch_tokens settles what batch_size and pack_length do; give it or them": tokens and other,
            "pack_length needs packing: true": self.pack_length and not self.packing,
            "lora needs learning_rate.language": self.lora and rates.language is None,
            "features cannot be cached while the vision encoder trains": self.cache_features and rates.vision,
            f"position_layout '{target}' needs a resampler or chain_of_sight, and no packing; found {self.bridge.kind},"
            f" packing {self.packing}": target and (self.packing or not windowed),
            f"position_layout needs order: coarse_to_fine; found {order}": target and order != "coarse_to_fine",
            f"proportional_attention needs position_layout, and no compressor; found {target}, {self.compressor}": (
                self.proportional_attention and (target is None or self.compressor)
            ),
            "on_too_long: shrink_image makes no sample shorter: a bridge gives every image the same number of visual "
            "tokens. Take a layout with fewer tokens, or set error or drop_sample": self.on_too_long == "shrink_image",
        }
        for fault, found in faults.items():
            if found:
                raise UserError(f"stage '{self.name}': {fault}")
        if target is not None and isinstance(self.bridge, WindowedSettings):
            self.bridge.scales.positions(target)  # raises
        return self

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def side(self) -> int:
        """``image_size``, once it is settled: a run asks the encoder where the recipe says none."""
        assert self.image_size is not None, f"stage '{self.name}': its image size is not settled"
        return self.image_size


# fmt: off
Format = Literal[
    "conversations", "vqav2", "gqa", "textvqa", "scienceqa", "pope", "mme", "mmbench", "refcoco", "coco_captions",
]
Metric = Literal[
    "exact_match", "bare_match", "vqa", "textvqa", "anls", "relaxed_match", "letter", "box_match", "cider_d", "yes_no",
    "mmbench", "mme",
]
# fmt: on


class HeldOut(Settings):
    """Conversations, or a benchmark's files, to ask after training; each question is asked by itself."""

    data: ConversationData
    format: Format = Field(
        "conversations", description="of the file at data.path: conversations, or as a benchmark publishes it"
    )
    answers: str | None = Field(None, description="the second file of vqav2 (annotations) and refcoco (instances)")
    split: str = Field("test", description="rows of scienceqa and refcoco, whose files hold several splits")
    prompt: str | None = Field(
        None, description="the text around '{question}'; that of the format, as lmms-eval writes it, if not given"
    )
    metric: Metric | None = Field(
        None,
        description="that of the format if not given; of conversations exact_match, which normalises answers as VQA "
        "does; cider_d is a tenth of CIDEr-D",
    )
    items: int = Field(500, ge=1, description="questions at most, from the first one")
    choices: tuple[str, ...] = Field(
        (), description="all answers that there are; the likeliest one is taken, and none is generated: not quicker"
    )

    @model_validator(mode="after")
    def _all_used(self) -> HeldOut:
        own = self.format
        faults = {
            f"answers '{self.answers}': {own} has none": self.answers and own not in ("vqav2", "refcoco"),
            f"prompt: only a benchmark's questions have one, found format {own}": (
                self.prompt and own == "conversations"
            ),
            f"choices: only conversations have them, found format {own}": self.choices and own != "conversations",
            f"prompt '{self.prompt}': expected {{question}} in it": "{question}" not in (self.prompt or "{question}"),
            f"metric {self.metric} needs format {self.metric}, found {own}": (
                self.metric in ("mme", "mmbench") and own != self.metric
            ),
            f"data.kind '{self.data.kind}': format {own} is read from its own files; leave it out": (
                own != "conversations" and self.data.kind != "json"
            ),
        }
        for fault, found in faults.items():
            if found:
                raise UserError(fault)
        return self


def held_out_file(
    data: Path | None, images: Path | None, metric: str | None, items: int, **more: str | None
) -> HeldOut | None:
    """What `sparsight eval --data` asks; None without data. ``more`` are other keys of `HeldOut`.

    Raises:
        UserError: an option that needs data, no such format or metric, or a number out of range.
    """
    if data is None:
        given = {"images": images, "metric": metric, **{key: more[key] for key in more if key != "split"}}
        if unused := next((key for key in given if given[key] is not None), None):
            raise UserError(f"--{unused} {given[unused]}: expected --data as well, the questions that it is about")
        return None
    source = {"path": str(data), "images": str(images) if images else None}
    values: dict[str, Any] = {"data": source, "metric": metric, "items": items}
    values |= {key: value for key, value in more.items() if value is not None}
    if "choices" in values:
        values["choices"] = [text.strip() for text in values["choices"].split(",")]
    return HeldOut.read(values, "eval")


class Evaluation(Settings):
    """Scores after training. ``scenes`` asks the embedded test split; ``none`` asks ``held_out`` alone, if there is
    any. A recipe that gives no kind asks scenes where a stage trains on them."""

    kind: Literal["scenes", "none"] = "scenes"
    items: int = Field(100, ge=1, description="questions of each task")
    batch_size: int = Field(50, ge=1)
    split: Literal["validation", "test"] = "test"
    held_out: dict[str, HeldOut] = Field(default_factory=dict, description="name -> conversations to ask")
    every: int | None = Field(None, ge=1, description="optimizer steps between scores of a subset during training")
    subset: int = Field(20, ge=1, description="questions of each task asked then; of scenes, the validation split's")

    def during_training(self) -> Evaluation:
        """What is asked every so many steps."""
        few = {name: each.model_copy(update={"items": self.subset}) for name, each in self.held_out.items()}
        return self.model_copy(update={"items": self.subset, "split": "validation", "held_out": few})


class Recipe(Settings):
    """Everything that a run needs; a YAML file holds one."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    seed: int = 0
    vision: str = "efficientnet-lite0"
    vision_levels: tuple[int, ...] | None = Field(None, description="feature levels, lower first; else the encoder's")
    language: Language = "smollm2-135m"
    language_layers: int | None = Field(None, ge=1, description="keep only the first layers of the language model")
    resize: Literal["square", "pad", "crop", "keep"] | None = Field(
        None, description="how images come to image_size; square if not given, keep for a native-resolution encoder"
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
    def _consistent(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise UserError(f"stages need different names, found {names}")
        if reserved := {"total", "score"} & set(names):
            raise UserError(f"a stage cannot be named {sorted(reserved)}: comparisons have figures of that name")
        if "mean" in self.evaluation.held_out:
            raise UserError("evaluation.held_out: 'mean' is the mean of all scores; choose another name")
        cached = [stage.name for stage in self.stages if stage.cache_features]
        if cached and self.on_bad_sample == "quarantine":
            raise UserError(
                f"on_bad_sample: quarantine, but the stages {cached} cache the features of all images before they "
                "train: set cache_features: false, or take out what `sparsight data check` finds"
            )
        for old, new in pairwise(self.stages):
            try:
                if old.bridge != new.bridge:
                    check_scaling(old.bridge, new.bridge)
            except UserError as error:
                raise UserError(f"stages '{old.name}' -> '{new.name}': {error}") from None
        self._check_adapters()
        if self.scenes() is None and "kind" not in self.evaluation.model_fields_set:
            self.__dict__["evaluation"] = self.evaluation.model_copy(update={"kind": "none"})  # frozen for others
        if self.evaluation.every and self.evaluation.kind == "none" and not self.evaluation.held_out:
            raise UserError("evaluation.every: there is nothing to ask during training: give held_out, or kind: scenes")
        return self

    def _check_adapters(self) -> None:
        """Raises UserError where weights would train that are quantised, or that adapters stand on."""
        kept = None
        for stage in self.stages:
            trains, lora = stage.learning_rate.language is not None, stage.lora
            if self.quantization != "none" and ((trains and lora is None) or (lora is not None and lora.keep is False)):
                raise UserError(
                    f"stage '{stage.name}': the language model is quantised ({self.quantization}), so it trains by "
                    "LoRA alone, and adapters are never merged into it: give the stage lora, without keep: false, or "
                    "take out learning_rate.language"
                )
            if kept is not None and trains and lora != kept.lora:
                raise UserError(
                    f"stage '{stage.name}': stage '{kept.name}' keeps its adapters, so the language model trains by "
                    "them from there on: give the stage the same lora, or take out learning_rate.language"
                )
            kept = stage if self.keeps_adapters(stage) else kept

    @property
    def pretrained(self) -> PretrainedLanguage | None:
        """The language model that is loaded; None for one from scratch."""
        given = self.language
        return (
            given
            if isinstance(given, PretrainedLanguage)
            else None
            if isinstance(given, ScratchLanguage)
            else (PretrainedLanguage(path=given))
        )

    @property
    def quantization(self) -> str:
        """How the language model's frozen weights are held; "none": as they are."""
        return self.pretrained.quantization if self.pretrained is not None else "none"

    def keeps_adapters(self, stage: Stage) -> bool:
        """Whether the stage's adapters stay beside the weights when it ends."""
        return stage.lora is not None and bool(stage.lora.keep or self.quantization != "none")

    def source_of(self, stage: Stage) -> Data:
        """The stage's own data, or else the recipe's."""
        return stage.data or self.data

    def data_of(self, stage: Stage) -> Data:
        """A stage's data, with the tasks that it asks.

        Raises:
            UserError: the stage names tasks, but the data are not scenes.
        """
        data = self.source_of(stage)
        if stage.tasks is None:
            return data
        if not isinstance(data, SceneData):
            raise UserError(
                f"stage '{stage.name}' names tasks, which only scenes have; found data of kind {data.kind!r}"
            )
        return data.model_copy(update={"tasks": stage.tasks})

    def all_data(self) -> list[Data]:
        """What the stages train on, each once."""
        found = [self.source_of(stage) for stage in self.stages]
        return [data for number, data in enumerate(found) if data not in found[:number]]

    def of_the_same_data(self, stage: Stage) -> list[Stage]:
        """The stages that see the same data as this one, itself included, in their order."""
        return [each for each in self.stages if self.source_of(each) == self.source_of(stage)]

    def samples_before(self, stage: Stage) -> int:
        """Conversations that earlier stages have had of the same data."""
        same = self.of_the_same_data(stage)
        return sum(each.samples for each in same[: same.index(stage)])

    def scenes(self) -> SceneData | None:
        """The first scenes among the stages' data, with the tasks that any stage trains on (None: all)."""
        found: list[SceneData] = []
        for stage in self.stages:
            data = self.data_of(stage)
            parts = [part.data for part in data.parts] if isinstance(data, MixtureData) else [data]
            found += [part for part in parts if isinstance(part, SceneData)]
        if not found:
            return None
        tasks = None
        if all(each.tasks is not None for each in found):
            tasks = {task: weight for each in found for task, weight in (each.tasks or {}).items() if weight > 0}
        return found[0].model_copy(update={"tasks": tasks})


class Comparison(Settings):
    """Several recipes that share most keys; the first run is the one that others are compared with."""

    name: str = "comparison"
    shared: dict[str, Any] = Field(default_factory=dict, description="keys of every run's recipe")
    runs: dict[str, dict[str, Any]] = Field(min_length=2, description="run's name -> keys of its own")

    def recipes(self) -> list[Recipe]:
        """One recipe for each run: the shared keys, with the run's own laid over them."""
        own = {name: _merged(self.shared, keys) | {"name": name} for name, keys in self.runs.items()}
        return [Recipe.read(values, f"runs.{name}") for name, values in own.items()]


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merged(below.get(key), above.get(key, below.get(key))) for key in {**below, **above}}
    if isinstance(below, list) and isinstance(above, list) and len(below) == len(above):
        return [_merged(low, high) for low, high in zip(below, above, strict=True)]
    return above
