"""A whole run: recipe -> stages -> checkpoints -> scores, through files, so that any part can be run again."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedConfig

from sparsight.config import (
    ChainOfSight,
    Comparison,
    ConversationData,
    Data,
    Evaluation,
    Recipe,
    Resampler,
    SceneData,
    ScratchLanguage,
    Stage,
)
from sparsight.cost import Trains
from sparsight.cost.devices import keep_measurement, measurements
from sparsight.cost.forecast import calibration_key, forecast, inner_sizes
from sparsight.counting import default_device, device_name
from sparsight.data.cache import FeatureCache, build_cache, picture_rows
from sparsight.data.check import check_rows
from sparsight.data.collate import TrainingSet
from sparsight.data.images import load_image
from sparsight.data.scenes import ScenesDataset, chance
from sparsight.data.sources import Sample, Source, open_source, scene_config
from sparsight.distributed import process_state
from sparsight.evaluation.scenes import Scores, evaluate_scenes, score_answer
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.build import build, build_processor, language_folder, scratch_language, scratch_tokenizer
from sparsight.modeling.encoders import count_flops
from sparsight.modeling.scale import scale_tokens
from sparsight.reporting import (
    Run,
    RunLog,
    check_table,
    environment,
    layer_table,
    read_run,
    read_runs,
    report,
    write_analysis,
    write_card,
    write_check,
    write_inspection,
)
from sparsight.reporting.comparison import percent, write_atomic
from sparsight.reporting.runlog import step_seconds
from sparsight.sparse.analysis import Analysis, measure, suggest
from sparsight.training.calibrate import fit
from sparsight.training.quarantine import Quarantine
from sparsight.training.stages import PartPlan, add_lora, merge_lora, select_trainable
from sparsight.training.trainer import StepCounter, plan_stage, train_stage

EXAMPLES = 8
CALIBRATION_STEPS = 12
CALIBRATED = ("1:16", "1:16,4:4", "1:16,2:16,8:1", "1:16,2:16,16:1")  # layouts for `plan --calibrate`
WAITING = 0.1  # share of the time waiting for data, above which there is something to mend
RECIPE_FILE = "sparsight_recipe.json"


def run(recipe: Recipe, out: Path, console: Console, resume: bool = False, cache_root: Path | None = None) -> Path:
    """Train a recipe's stages one after the other, then score the result.

    Args:
        out: the run's folder: ``run.jsonl``, a folder for each stage, ``model`` at the end.
        resume: go on where the run in ``out`` stopped.
        cache_root: where cached features lie; ``out/cache`` if not given.

    Returns:
        The folder of the final model.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is off.
        ValueError: ``resume`` with a recipe that differs from the run's, or a tracker that is not installed.
    """
    if missing := [name for name in recipe.report_to if importlib.util.find_spec(name) is None]:
        raise ValueError(f"report_to: {missing} cannot be imported; pip install {' '.join(missing)}, or take it out")
    ranks = process_state()
    main = ranks.is_main_process  # it alone writes and tells
    log = _open_log(recipe, out, resume) if main else RunLog(Path(os.devnull), append=True)
    console = console if main else Console(quiet=True)
    session = Session(recipe, out, log, console, resume, cache_root or out / "cache", main)
    model: SparsightForConditionalGeneration | None = None
    processor: SparsightProcessor | None = None
    offset = 0
    with session.log:
        for stage in recipe.stages:
            ranks.wait_for_everyone()
            saved = out / stage.name / "model"
            if resume and saved.is_dir():
                console.print(f"stage [bold]{stage.name}[/]: done already")
                model, processor = load(saved)
            else:
                model, processor = enter_stage(recipe, stage, model, processor, console)
                _run_stage(session, stage, offset, model, processor)
                if main:
                    _save(model, processor, session, saved)
            offset += stage.samples
        assert model is not None and processor is not None
        final = out / recipe.stages[-1].name / "model"
        if main and recipe.evaluation.kind == "scenes":
            _score(session, model, processor, str(final))
            write_card(final, recipe, read_run(session.log.path))  # now with scores
    return final


@dataclass(frozen=True)
class Session:
    """One sitting of a run: what every part of it needs to know."""

    recipe: Recipe
    out: Path
    log: RunLog
    console: Console
    resume: bool
    cache_root: Path
    main: bool = True  # of all ranks


def _open_log(recipe: Recipe, out: Path, resume: bool) -> RunLog:
    file = out / "run.jsonl"
    values = recipe.model_dump(mode="json")
    lines = file.read_bytes().splitlines() if file.is_file() else []
    if len(lines) < 2:  # no more than a header: it failed before its first stage, by a wrong name perhaps
        file.unlink(missing_ok=True)
    else:
        if not resume:
            raise FileExistsError(f"{out} holds a run already; go on with --resume, or choose another --out")
        header = json.loads(lines[0])
        before = header.get("recipe", {})
        changed = sorted(key for key in values if before.get(key) != values[key])
        if changed:
            raise ValueError(f"{out} was run with another recipe; these keys differ: {changed}")
        return RunLog(file, append=True)
    log = RunLog(file)
    log.write(
        "header",
        version=1,
        run=recipe.name,
        environment=environment(),
        recipe=values,
        samples_hash=samples_hash(recipe),
    )
    return log


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def samples_hash(recipe: Recipe) -> str:
    """Equal for runs that see the same samples in the same order."""
    seen = {
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "stages": [(stage.samples, stage.batch_size, stage.batch_tokens, stage.tasks) for stage in recipe.stages],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def load(folder: Path) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """A saved model and its processor.

    Raises:
        ValueError: the folder holds no Sparsight model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no model there; expected a folder with config.json")
    model = SparsightForConditionalGeneration.from_pretrained(folder)
    recipe = _trained_by(folder)
    if recipe is not None and isinstance(recipe.language, ScratchLanguage) and not torch.cuda.is_available():
        # As `scratch_language` chose. A checkpoint does not say it, and a resumed run must compute the same bits.
        model.model.language_model.set_attn_implementation("eager")
    return model, SparsightProcessor.from_pretrained(folder)


def _trained_by(folder: Path) -> Recipe | None:
    file = folder / RECIPE_FILE
    return Recipe.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def _own_scenes(folder: Path) -> SceneData:
    recipe = _trained_by(folder)
    return recipe.data if recipe is not None and isinstance(recipe.data, SceneData) else SceneData()


def enter_stage(
    recipe: Recipe,
    stage: Stage,
    model: SparsightForConditionalGeneration | None,
    processor: SparsightProcessor | None,
    console: Console,
) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """Build the model for the first stage, or take it to the next one's layout and image size."""
    if model is not None and processor is not None:
        report = scale_tokens(model, processor, stage.bridge, stage.image_size)
        if report.born or report.image_size[0] != report.image_size[1]:
            console.print(Text(str(report)))
        return model, processor
    torch.manual_seed(recipe.seed)
    language: Any = recipe.language
    tokenizer = None
    if isinstance(language, ScratchLanguage):
        language, tokenizer = scratch_language(language, _texts(recipe, stage))
    try:
        return build(
            recipe.vision,
            language,
            stage.bridge,
            tokenizer=tokenizer,
            image_size=stage.image_size,
            vision_levels=recipe.vision_levels,
            language_layers=recipe.language_layers,
            resize=recipe.resize,
        )
    except OSError as error:
        raise _not_loaded(recipe, error) from None


def calibrate_recipe(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Time real steps of a recipe's costliest stage at a few numbers of tokens, for `sparsight plan`.

    Returns:
        What is kept: seconds of a pass and of a FLOP, see ``cost.forecast.calibrated``.
    """
    cost = max(forecast(recipe), key=lambda cost: sum(cost.flops.values()))
    own, most = inner_sizes(cost.stage.bridge), max(each.tokens for each in forecast(recipe))
    bridges: list[Any] = [Resampler(tokens=n, **own) for n in sorted({16, most // 3 + 1, 2 * most // 3 + 1, most})]
    if isinstance(cost.stage.bridge, ChainOfSight):
        bridges = [ChainOfSight(layout, **own) for layout in CALIBRATED]
    with tempfile.TemporaryDirectory() as name:
        done = [
            timed_steps(recipe, cost.stage, bridge, Path(name))
            for bridge in track(bridges, f"calibrating on stage {cost.stage.name}", console=console)
        ]
    passes = cost.batch // cost.micro_batch
    parts = [{part: value / passes for part, value in each.flops.items()} for each in done]
    found: dict[str, Any] = fit(parts, [each.seconds / passes for each in done])
    found |= {"encoder": done[0].encoder or found["linear"], "device": device_name(default_device())}
    before = measurements().get("calibrations", {})
    file = keep_measurement(calibrations=before | {calibration_key(recipe): found})
    console.print(f"calibrated on [bold]{found['device']}[/]; kept in {file}")
    return found


@dataclass(frozen=True)
class TimedSteps:
    """Medians of an optimizer step: FLOPs by part, seconds. ``encoder``: seconds of a cached encoder's FLOP, or 0."""

    flops: dict[str, float]
    seconds: float
    encoder: float


def timed_steps(recipe: Recipe, stage: Stage, bridge: Any, folder: Path) -> TimedSteps:
    """A short real run of one stage, with another bridge and every token and layer. ``folder`` keeps its features."""
    samples = CALIBRATION_STEPS * (stage.batch_size if stage.batch_tokens is None else stage.batch_tokens // 64 + 1)
    plain = {"samples": samples, "checkpoints": 0, "compressor": None, "skipper": None, "bridge": bridge}
    update = {"stages": (stage.model_copy(update=plain),), "evaluation": Evaluation(kind="none"), "report_to": ()}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(recipe.model_copy(update=update), Path(out), Console(quiet=True), cache_root=folder / "cache")
        steps = read_run(Path(out)).stages[0].steps[2:]  # the first ones warm up
        lines = (Path(out) / "run.jsonl").read_text(encoding="utf-8").splitlines()
    cached = [json.loads(line) for line in lines if line.startswith('{"type": "cache"')]
    flops = {
        part: statistics.median(step["flops_by_part"][part] for step in steps) for part in steps[0]["flops_by_part"]
    }
    encoder = cached[0]["seconds"] / cached[0]["flops"] if cached else 0.0
    return TimedSteps(flops, statistics.median(map(step_seconds, steps)), encoder)


def _not_loaded(recipe: Recipe, error: OSError) -> ValueError:
    """transformers does not say which name it could not find."""
    language = recipe.language
    names = f"vision '{recipe.vision}'" + (f" or language '{language}'" if isinstance(language, str) else "")
    return ValueError(f"{names} cannot be loaded: {error}")


def stage_data(recipe: Recipe, stage: Stage) -> Data:
    """The recipe's data, with the tasks that this stage asks.

    Raises:
        ValueError: the stage names tasks, but the data are not scenes.
    """
    if stage.tasks is None:
        return recipe.data
    if not isinstance(recipe.data, SceneData):
        raise ValueError(
            f"stage '{stage.name}' names tasks, which only scenes have; found data of kind '{recipe.data.kind}'"
        )
    return recipe.data.model_copy(update={"tasks": stage.tasks})


def max_length(stage: Stage, language: PreTrainedConfig) -> int | None:
    """Tokens that a sample may have: the stage's, or the language model's context; None if that has no end.

    Raises:
        ValueError: the stage allows more than the context.
    """
    context = getattr(language, "max_position_embeddings", None)
    if stage.max_length is None or context is None or stage.max_length <= context:
        return stage.max_length or context
    raise ValueError(
        f"stage '{stage.name}': max_length {stage.max_length} is more than the language model's context of {context}"
    )


def _texts(recipe: Recipe, stage: Stage) -> list[str]:
    """What a scratch language model's tokenizer is learnt from; bad samples are told where they are trained on."""
    source = open_source(recipe.data, 3000, stage.image_size, strict=recipe.on_bad_sample == "error")
    texts = []
    for index in range(min(3000, len(source))):
        try:
            messages = source[index].messages
        except ValueError:
            continue
        texts += [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    return texts


def _run_stage(
    session: Session,
    stage: Stage,
    offset: int,
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
) -> None:
    recipe, log, console = session.recipe, session.log, session.console
    lora = add_lora(model, stage, recipe.seed)
    plan = select_trainable(model, stage)
    config = model.config
    _print_stage(stage, plan, config.num_image_tokens, console)
    data = _training_set(recipe, stage, offset, processor, config.text_config)
    folder = session.out / stage.name / "checkpoints"
    steps = plan_stage(data, recipe, stage, folder, console)
    log.write(
        "stage",
        stage=stage.name,
        bridge=stage.bridge.kind,
        layout=str(stage.bridge.scales) if hasattr(stage.bridge, "scales") else "",
        visual_tokens=config.num_image_tokens,
        image_size=stage.image_size,
        samples=stage.samples,
        steps=len(steps),
        trainable_parameters=sum(part.trainable for part in plan),
        total_parameters=sum(part.total for part in plan),
        trains={part.part: part.trainable for part in plan if part.trainable},
    )
    if stage.gradient_checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    elif model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    encoder_flops = count_flops(model.model.vision_tower, stage.image_size, config.vision_levels)
    encoding = Encoding(0.0, 0.0)
    if stage.cache_features:
        data.cache, encoding = _cached(session, stage, model, processor, data.source, encoder_flops)
    start = time.perf_counter()
    counter = StepCounter(model, Trains.of(stage), encoder_flops, recipe.precision)
    quarantine = Quarantine(session.out / "quarantine.jsonl", recipe.max_bad, session.main)
    began = train_stage(
        model, processor, data, steps, recipe, stage, folder, log, counter, console, session.resume, quarantine
    )
    seconds = time.perf_counter() - start
    merge_lora(lora)
    if not session.main:
        return
    logged = next(logged for logged in read_run(log.path).stages if logged.name == stage.name)
    done, waiting = logged.steps, logged.data_wait or 0.0
    # A resumed stage also took what its steps before the checkpoint took.
    seconds += sum(step_seconds(step) for step in done if step["step"] <= began)
    advice = ": raise workers, or cache_features for a frozen encoder" if waiting > WAITING else ""
    console.print(f"{waiting:.1%} of the time waiting for data{advice}", style="yellow" if advice else None)
    log.write(
        "stage_end",
        stage=stage.name,
        seconds=seconds + encoding.seconds,
        executed_flops=sum(step["flops"] for step in done) + encoding.flops,
        encoding_seconds=encoding.seconds,
        samples=stage.samples,
        data_wait=waiting,
    )


def _training_set(
    recipe: Recipe, stage: Stage, offset: int, processor: SparsightProcessor, language: PreTrainedConfig
) -> TrainingSet:
    """A stage's data, behind the ``offset`` conversations of earlier stages."""
    quarantined = recipe.on_bad_sample == "quarantine"
    return TrainingSet(
        open_source(stage_data(recipe, stage), offset + stage.samples, stage.image_size, strict=not quarantined),
        processor,
        stage.samples,
        offset=offset,
        max_length=max_length(stage, language),
        drop_too_long=stage.on_too_long == "drop_sample",
        replace_bad=quarantined,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class Encoding:
    """What encoding the pictures once cost this run: seconds and FLOPs."""

    seconds: float
    flops: float


def _cached(
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
    rows, contents = picture_rows(source.keys(), source.fingerprint)
    made_of.update(f"{contents} {model.config.vision_levels} {processor.image_processor.to_json_string()}".encode())
    folder = session.cache_root / made_of.hexdigest()[:16]
    pictures = len(set(rows.values()))

    def encode(part: Sequence[Hashable]) -> tuple[torch.Tensor, ...]:
        pixels = processor.pixels([source.picture(key) for key in part])
        return model.model.encode_images(**pixels.to(model.device))

    model.eval()
    with (
        process_state().main_process_first(),
        Progress(console=session.console) as bar,
        autocast(session.recipe.precision, model.device),
    ):
        task = bar.add_task("encoding pictures", total=pictures)
        cache = build_cache(folder, rows, encode, lambda n: bar.update(task, completed=n))
        bar.update(task, completed=pictures)
    _tell_whether_it_pays(cache, list(rows), stage, session.console)
    if not session.main:
        return cache, Encoding(0.0, 0.0)
    # Every run is charged once for what its cache took, also when another run has built it: alone, it would have to.
    lines = log.path.read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines if line.startswith('{"type": "cache"') and line.endswith("}")]
    paid = any(record.get("folder") == str(folder) and record.get("stage") != stage.name for record in logged)
    cost = Encoding(0.0, 0.0) if paid else Encoding(cache.seconds, encoder_flops * pictures)
    log.write("cache", stage=stage.name, folder=str(folder), pictures=pictures, seconds=cost.seconds, flops=cost.flops)
    return cache, cost


def _tell_whether_it_pays(cache: FeatureCache, keys: Sequence[Hashable], stage: Stage, console: Console) -> None:
    """Encoding every picture once and reading it for each sample, against encoding it for each sample."""
    start, some = time.perf_counter(), keys[:64]
    for key in some:
        cache.read([key])
    reading, encoding = (time.perf_counter() - start) / len(some), cache.seconds / len(set(cache.rows.values()))
    cached, plain = cache.seconds + stage.samples * reading, stage.samples * encoding
    text = f"cached features: {encoding * 1e3:.1f} ms to encode a picture, {reading * 1e3:.1f} ms to read it"
    if cached > plain:
        text += (
            f". This stage alone does not see them often enough for it to pay ({cached:.0f} s against {plain:.0f} s):"
            " unless other stages or runs use them, set cache_features: false"
        )
    console.print(Text(text))


def _save(
    model: SparsightForConditionalGeneration, processor: SparsightProcessor, session: Session, folder: Path
) -> None:
    """Whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / RECIPE_FILE).write_text(session.recipe.model_dump_json(indent=2), encoding="utf-8")
    write_card(partial, session.recipe, read_run(session.log.path))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _print_stage(stage: Stage, plan: list[PartPlan], tokens: int, console: Console) -> None:
    table = Table(title=f"stage {stage.name}: {tokens} visual tokens, {stage.image_size} px, {stage.samples} samples")
    for column in ("part", "trains", "of", "learning rate"):
        table.add_column(column, justify="right" if column != "part" else "left")
    for part in plan:
        rate = f"{part.learning_rate:g}" + (" (LoRA)" if part.lora else "") if part.learning_rate else "frozen"
        table.add_row(part.part, f"{part.trainable:,}", f"{part.total:,}", rate)
    console.print(table)


def _score(
    session: Session, model: SparsightForConditionalGeneration, processor: SparsightProcessor, checkpoint: str
) -> None:
    """Ask the embedded test split, log scores, the shuffled control and examples."""
    recipe, log, console = session.recipe, session.log, session.console
    data = recipe.data if isinstance(recipe.data, SceneData) else SceneData()
    settings = recipe.evaluation
    start = time.perf_counter()
    result, guess = ask_scenes(model, processor, data, settings, recipe.precision, console)
    log.write(
        "eval",
        checkpoint=checkpoint,
        scores=result.scores,
        shuffled=result.shuffled,
        chance=guess,
        items=result.items,
        points=result.points,
        pictures=result.pictures,
        questions=result.questions,
        seconds=time.perf_counter() - start,
    )
    scenes = _test_scenes(data, settings, model.config.image_size)
    for item, answer in _examples(result):
        points = score_answer(item.task, answer, item.truth, scenes.scene(item.picture))
        log.write(
            "example",
            id=f"scenes/{settings.split}/{item.picture}",
            image_png_base64=_png(scenes.image(item.picture)),
            answer=answer,
            correct=answer == item.truth if item.task == "caption" else points >= 0.5,
            **{key: value for key, value in asdict(item).items() if key != "picture"},
        )


def _test_scenes(data: SceneData, settings: Evaluation, side: int) -> ScenesDataset:
    # Not every picture carries every task: four pictures for an item are enough.
    pictures = max(4 * settings.items, 50)
    return ScenesDataset(scene_config(data, side), settings.split, scenes=pictures, seed=data.seed)


def ask_scenes(
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    data: SceneData,
    settings: Evaluation,
    precision: str,
    console: Console,
) -> tuple[Scores, dict[str, float]]:
    """Scores on the embedded scenes, with a bar, and what blind guessing gets."""
    scenes = _test_scenes(data, settings, model.config.image_size)
    with Progress(console=console) as bar, autocast(precision, model.device):
        task = bar.add_task("asking questions", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = evaluate_scenes(model, processor, scenes, settings.items, settings.batch_size, progress=show)
    return result, dict(chance(scenes.config, settings.split))


def evaluate_checkpoint(folder: Path, items: int, split: str, console: Console) -> Scores:
    """Score a saved model on the scenes of its own recipe (the embedded ones if it was trained on other data).

    Raises:
        ValueError: no model in ``folder``, or no such split.
    """
    model, processor = load(folder)
    recipe = _trained_by(folder)
    precision = recipe.precision if recipe is not None else "bf16"
    settings = Evaluation.model_validate({"items": items, "split": split})
    result, guess = ask_scenes(model, processor, _own_scenes(folder), settings, precision, console)
    table = Table(title=f"{folder}: {split} split, scores in %", title_justify="left")
    for column in ("task", "items", "score", "95% interval", "chance", "shuffled pictures"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, found in result.estimates().items():
        interval = f"{percent(found.low)} to {percent(found.high)}"
        controls = (percent(shares.get(task)) for shares in (guess, result.shuffled))
        table.add_row(task, str(result.items.get(task, "")), percent(found.mean), interval, *controls)
    console.print(table)
    return result


def inspect_checkpoint(folder: Path, image: Path | None, out: Path, console: Console) -> Path:
    """Draw a model's windows over a picture, and where each query looks: a PNG for each scale, and one page.

    Args:
        image: a scene of the model's own recipe if not given (of the embedded ones if it was trained on other data).

    Returns:
        The page.

    Raises:
        ValueError: no model in ``folder``, one without queries, or no picture in ``image``.
    """
    model, processor = load(folder)
    name = image.name if image else "scene 0 of the test split"
    picture = load_image(image) if image else ScenesDataset(scene_config(_own_scenes(folder)), "test", 1).image(0)
    pixels = processor.pixels([picture])
    looks = {scale: maps[0].numpy() for scale, maps in model.model.attention_maps(**pixels).items()}
    if "image_grid_thw" in pixels:  # else maps are as large as the picture
        _, rows, columns = pixels["image_grid_thw"][0].tolist()
        looks = {scale: maps[:, :rows, :columns] for scale, maps in looks.items()}
    page = write_inspection(picture, looks, f"{folder}: {name}", out)
    console.print(f"wrote [bold]{page}[/] and {len(looks)} pictures beside it")
    return page


def analyze_checkpoint(
    name: str, data: Path | None, images: Path | None, samples: int, out: Path, console: Console
) -> dict[str, Any]:
    """Measure how layers and visual tokens of a VLM of transformers behave, and suggest settings to start from.

    Args:
        name: a folder, or an id on the hub.
        data: LLaVA JSON or messages; scenes of the model's own recipe, or the embedded ones, if not given.
        images: folder of the data's pictures; the file's own if not given.
        samples: conversations with pictures to look at, from the first one.
        out: gets ``analysis.json`` and ``index.html``.

    Returns:
        What ``analysis.json`` holds.

    Raises:
        ValueError: the model or its processor cannot be loaded or measured, or no sample has a picture.
    """
    if images is not None and data is None:
        raise ValueError(f"--images {images}: expected --data as well, the conversations about these pictures")
    source = open_source(
        ConversationData(path=str(data), images=str(images) if images else None) if data else _own_scenes(Path(name)),
        samples,
        256,
    )
    chosen, without = _with_pictures(source, samples)
    if not chosen:
        raise ValueError(f"{data}: none of its {without} samples has a picture; visual tokens need some")
    model, processor = _load_any(name)

    def inputs() -> Iterator[Any]:
        for sample in chosen:
            yield _inputs(sample, source, processor).to(model.device, dtype=model.dtype)

    with Progress(console=console) as bar:
        measured = measure(model, bar.track(inputs(), total=len(chosen), description="looking at samples"))
    settings = {"model": name, "data": str(data or "scenes"), "images": str(images) if images else None}
    found = {"without_pictures": without, "environment": environment(), "analysis": asdict(measured)}
    record = settings | found | {"suggestion": _suggestion(measured)}
    write_atomic(out / "analysis.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_analysis(record, out / "index.html")
    _print_analysis(record, out, console)
    return record


def _suggestion(measured: Analysis) -> dict[str, Any]:
    advice = suggest(measured)
    return {
        "compressor": advice.compressor.model_dump(mode="json"),
        "skipper": advice.skipper.model_dump(mode="json"),
        "importance": advice.importance,
        "reasons": advice.reasons,
        "code": advice.code,
        "rules": cleandoc(suggest.__doc__ or ""),
    }


def _with_pictures(source: Source, samples: int) -> tuple[list[Sample], int]:
    """The first samples that have pictures, and how many without were passed over on the way."""
    chosen: list[Sample] = []
    for index in range(len(source)):
        if len(chosen) == samples:
            return chosen, index - samples
        chosen += [sample for sample in [source[index]] if sample.images]
    return chosen, len(source) - len(chosen)


def _load_any(name: str) -> tuple[Any, Any]:
    """A VLM of transformers with its attention weights to be seen, in eval mode, on the GPU if there is one, and its
    processor.

    Raises:
        ValueError: there is none of that name, it is of another kind, or it has no processor for pictures.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name}: no model there; expected a folder with config.json")
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="eager")
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} cannot be loaded as a vision-language model of transformers: {reason:.300}") from None
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{name}: expected a processor for pictures and text, found {type(processor).__name__}")
    return model.to(default_device()), processor


def _inputs(sample: Sample, source: Source, processor: Any) -> Any:
    """One conversation as the model's inputs, pictures put in where its messages have places for them."""
    pictures = iter(sample.images)
    messages = []
    for message in sample.messages:
        content = [
            part | {"image": source.picture(next(pictures))} if part["type"] == "image" else part
            for part in message["content"]
        ]
        messages.append(message | {"content": content})
    try:
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    except ValueError as error:  # such as no chat template
        raise ValueError(f"sample '{sample.id}': {error}") from None


def _print_analysis(record: dict[str, Any], out: Path, console: Console) -> None:
    seen, advice = record["analysis"], record["suggestion"]
    console.print(layer_table(record))
    if seen["without_attention"]:
        console.print(Text(f"! {seen['without_attention']}", style="yellow"))
    if record["without_pictures"]:
        console.print(f"samples without a picture, passed over: {record['without_pictures']}")
    console.print(
        f"visual tokens: similarity with neighbours {seen['redundancy']:.3f}, of any two {seen['any_two']:.3f}\n"
    )
    for name, reason in advice["reasons"].items():
        console.print(Text.assemble((name, "bold"), f": {reason}"))
    console.print("\nSettings to start from, by simple rules, no measured optimum:\n")
    console.print(Text(advice["code"], style="bold"), soft_wrap=True)
    console.print(f"\nPage: [bold]{out / 'index.html'}[/], figures: {out / 'analysis.json'}")


def check_data(recipe: Recipe, out: Path, workers: int, console: Console) -> dict[str, Any]:
    """Look at every sample as the stage with most visual tokens would see it; no language model is built.

    Args:
        out: gets ``check.json`` and ``index.html``.
        workers: processes that look at samples.

    Returns:
        What ``check.json`` holds: ``bad`` samples with reasons, those ``too_long`` for the language model, lengths.

    Raises:
        ValueError: the encoder or the tokenizer cannot be loaded, or the data cannot be opened at all.
    """
    recipe = recipe.model_copy(update={"on_bad_sample": "quarantine"})  # bad rows are to be told, all of them
    tokenizer, context = _tokenizer(recipe, recipe.stages[0])
    made = []
    for stage in recipe.stages:
        try:
            processor = build_processor(
                recipe.vision,
                tokenizer,
                stage.bridge,
                image_size=stage.image_size,
                vision_levels=recipe.vision_levels,
                resize=recipe.resize,
            )
        except OSError as error:
            raise _not_loaded(recipe, error) from None
        made.append((processor.num_image_tokens, stage, processor))
    _, stage, processor = max(made, key=lambda each: each[0])
    conversations = sum(each.samples for each in recipe.stages)
    source = open_source(stage_data(recipe, stage), conversations, stage.image_size, strict=False)
    with Progress(console=console) as bar:
        task = bar.add_task("looking at samples", total=len(source))
        data = TrainingSet(source, processor, len(source))
        found = check_rows(data, workers, lambda done: bar.update(task, completed=done))
    name = recipe.data.path if isinstance(recipe.data, ConversationData) else recipe.data.kind
    made_by = {"recipe": recipe.name, "stage": stage.name, "data": name, "environment": environment()}
    record = made_by | found.record(stage.max_length or context)
    record["visual_tokens_per_image"] = processor.num_image_tokens
    write_atomic(out / "check.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    shown = [source[row["row"]] for row in found.rows if row["images"]][:EXAMPLES]
    write_check(record, [_shown(sample, source) for sample in shown], out / "index.html")
    console.print(check_table(record))
    for entry in record["bad"][:EXAMPLES]:
        console.print(Text.assemble(("bad: ", "red"), f"{entry['id']}: {entry['reason']}"), soft_wrap=True)
    if len(record["bad"]) > EXAMPLES:
        console.print(f"and {len(record['bad']) - EXAMPLES} more")
    console.print(f"Page: [bold]{out / 'index.html'}[/], figures: {out / 'check.json'}")
    return record


def _tokenizer(recipe: Recipe, stage: Stage) -> tuple[Any, int | None]:
    """The language model's tokenizer, and how many positions it knows, if it says so."""
    language = recipe.language
    if isinstance(language, ScratchLanguage):
        return scratch_tokenizer(language, _texts(recipe, stage)), language.context
    try:
        folder = language_folder(language)
        context = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
        return AutoTokenizer.from_pretrained(folder), context
    except OSError as error:
        raise _not_loaded(recipe, error) from None


def _shown(sample: Sample, source: Source) -> dict[str, str]:
    picture = source.picture(sample.images[0])
    picture.thumbnail((320, 320))
    parts = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    return {"id": sample.id, "text": " / ".join(parts)[:300], "image": _png(picture)}


def builtin_recipe(name: str) -> Path:
    """A recipe that comes with Sparsight, in a checkout or in an installed package."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"recipe '{name}' is not part of this installation of Sparsight")


def run_comparison(comparison: Comparison, out: Path, console: Console, resume: bool = False) -> dict[str, Any]:
    """Run the recipes one after the other on the same samples, compare, and write the report.

    Args:
        out: gets a folder for each run, ``comparison.json`` and ``report.html``. Runs of an earlier comparison
            in it are replaced, unless ``resume``.

    Returns:
        The comparison, as in ``comparison.json``.
    """
    recipes = comparison.recipes()
    cache = out / "cache"
    if not resume:
        for folder in [*(out / recipe.name for recipe in recipes), cache]:
            shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    for recipe in recipes:
        if resume and (out / recipe.name / "run.jsonl").is_file() and read_run(out / recipe.name).scores:
            console.print(f"run [bold]{recipe.name}[/]: done already")
            continue
        console.rule(f"[bold]{recipe.name}")
        run(recipe, out / recipe.name, console, resume, cache)
    shutil.rmtree(cache, ignore_errors=True)
    console.rule("[bold]what was saved, and what it cost")
    folders = [out / recipe.name for recipe in recipes]
    _print_examples(read_runs(folders), console)
    result = report(folders, out, console)
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all.")
    return result


def _print_examples(runs: list[Run], console: Console) -> None:
    table = Table(title="Examples (pictures in the report)", title_justify="left")
    for column in ("picture", "question", "truth", *(run.name for run in runs)):
        table.add_column(column)
    for rows in zip(*(run.examples for run in runs), strict=True):
        first = rows[0]
        table.add_row(
            *(Text(str(v)) for v in (first["id"], first["question"], first["truth"], *(r["answer"] for r in rows)))
        )
    console.print(table)


def _examples(result: Scores) -> list[tuple[Any, str]]:
    """One example of each task in turn, each about another picture; the same for every run."""
    chosen: list[tuple[Any, str]] = []
    tasks = list(result.items)
    for number in range(EXAMPLES):
        own = [(item, answer) for item, answer in result.answers if item.task == tasks[number % len(tasks)]]
        used = {item.picture for item, _ in chosen}
        chosen += [pair for pair in own if pair[0].picture not in used][:1]
    return chosen


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
