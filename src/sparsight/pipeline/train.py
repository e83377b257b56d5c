"""A whole run: recipe -> stages -> checkpoints -> scores, through files, so that any part can be run again."""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from rich.text import Text
from transformers import PreTrainedConfig

from sparsight.console import Console
from sparsight.cost import Trains
from sparsight.data.chat import stop_tokens
from sparsight.data.collate import TrainingSet
from sparsight.data.sources import Source, open_source
from sparsight.devices.engines import WHY_REFUSED, deepspeed_config, engine, make_whole
from sparsight.devices.flops import recomputes
from sparsight.devices.precision import default_device
from sparsight.devices.ranks import process_state, several_ranks
from sparsight.errors import UserError
from sparsight.evaluation.questions import held_out_questions
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.build import build, language_folder
from sparsight.modeling.encoders import count_flops
from sparsight.modeling.quantised import check_installed, quantised_language
from sparsight.modeling.scaling import scale_tokens, scaled_processor
from sparsight.modeling.scratch import scratch_language
from sparsight.pipeline.evaluate import DuringTraining, score_run
from sparsight.pipeline.features import Encoding, cached_features
from sparsight.pipeline.files import (
    Session,
    finished,
    load,
    move_aside,
    open_log,
    save,
    settle_image_size,
    settle_precision,
)
from sparsight.reporting import RunLog, write_card
from sparsight.reporting.runlog import step_seconds
from sparsight.reporting.tables import human
from sparsight.scenes.questions import ALL_TASKS
from sparsight.settings.load import load_recipe
from sparsight.settings.recipe import Recipe, ScratchLanguage, Stage
from sparsight.training.checkpoints import held
from sparsight.training.counter import StepCounter, resident_now
from sparsight.training.quarantine import Quarantine
from sparsight.training.stages import add_lora, merge_lora, select_trainable
from sparsight.training.trainer import plan_stage, train_stage, training_arguments

FIRST = 32  # samples of a later stage that are looked at where all are of about one size
WAITING = 0.1  # share of the time waiting for data, above which there is something to mend


def run(
    recipe: Recipe,
    out: str | Path,
    console: Console,
    resume: bool = False,
    cache_root: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Train a recipe's stages one after the other, then score the result.

    Args:
        out: the run's folder: ``run.jsonl``, a folder for each stage, ``model`` at the end.
        resume: go on where the run in ``out`` stopped.
        cache_root: where cached features lie; ``out/cache`` if not given.
        overwrite: move what is in ``out`` aside, and say where.

    Returns:
        The folder of the final model.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is off.
        UserError: ``resume`` with a recipe that differs from the run's, an engine that shards weights, or as
            `check_inputs` says, or a process that works in ``out``; nothing has been trained then.
    """
    out, recipe = Path(out), settle_image_size(recipe)
    done = finished(recipe, out, console) if resume else []
    sources = check_inputs(recipe, done)
    main = process_state().is_main_process  # it alone writes and tells
    check_engine(recipe)
    console = console if main else Console(quiet=True)
    if overwrite and main:
        move_aside(out, resume, console)
    with held(out):
        recipe = settle_precision(recipe, out, resume, console)
        log = open_log(recipe, out, resume) if main else RunLog(Path(os.devnull), append=True)
        session = Session(recipe, out, log, console, resume, Path(cache_root or out / "cache"), main, resident_now())
        with session.log:
            return _run_stages(session, sources, done)


def _run_stages(session: Session, sources: dict[str, Source], done: Collection[str]) -> Path:
    """Train the stages that are not done, score the last one's model, and return its folder."""
    recipe, out, console, main = session.recipe, session.out, session.console, session.main
    model = processor = None
    for stage in recipe.stages:
        process_state().wait_for_everyone()
        saved = out / stage.name / "model"
        if stage.name in done:
            console.print(f"stage [bold]{stage.name}[/]: done already")
            model, processor = load(saved)
        else:
            model, processor = enter_stage(recipe, stage, model, processor, console)
            if len(sources) == len(recipe.stages) - len(done):  # the first that is trained in this sitting
                _check_stages(session, sources, model, processor)
            _run_stage(session, stage, model, processor, sources.pop(stage.name))
            model, processor = _hand_on(session, model, processor, saved)
    if (layout := recipe.stages[-1].position_layout) is not None:
        text = f"position_layout in the last stage: scale the model to '{layout}' before it is used"
        console.print(text, style="yellow", markup=False)
    assert model is not None and processor is not None
    final = out / recipe.stages[-1].name / "model"
    if main and (recipe.evaluation.kind == "scenes" or recipe.evaluation.held_out):
        score_run(session, model, processor, str(final))
        write_card(final, recipe, session.log.run())  # now with scores
    return final


def _hand_on(
    session: Session, model: SparsightForConditionalGeneration, processor: SparsightProcessor, folder: Path
) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """Save a stage's model. Under an engine that shards, what is left of it does not train on: it is loaded anew."""
    if session.main:
        save(model, processor, session, folder)
    if engine() == "ddp":
        return model, processor
    make_whole(model, keep=False)  # no two of them in memory
    gc.collect()
    process_state().wait_for_everyone()
    return load(folder)


def check_engine(recipe: Recipe) -> None:
    """Raises UserError if the engine that the launcher chose cannot do what the recipe asks; says why."""
    found, why = engine(), ""
    fsdp = found == "fsdp2"
    if found == "ddp":
        told = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()  # as accelerate does for several
        if told and process_state().num_processes == 1:
            why = "it starts one process alone on CPUs without MPI: use torchrun, or --engine ddp --ranks N"
    elif found in WHY_REFUSED:
        why = WHY_REFUSED[found]
    elif found not in ("fsdp2", "zero1", "zero2", "zero3"):
        why = "models are trained with DDP, FSDP version 2 (fsdp_version: 2), and DeepSpeed's ZeRO-1 to ZeRO-3"
    elif not several_ranks() or (fsdp and process_state().distributed_type == DistributedType.MULTI_CPU):
        why = "accelerate shards over ranks on GPUs alone, started by `accelerate launch`; on CPUs use torchrun (DDP)"
    elif fsdp and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true"):
        why = "it would leave out buffers (of batch norms): set fsdp_cpu_ram_efficient_loading: false"
    elif recipe.quantization != "none":
        why = "bitsandbytes' packed weights cannot be gathered: set language.quantization: none, or use torchrun (DDP)"
    elif not fsdp and any(deepspeed_config().get(each, {}).get("enabled") is True for each in ("bf16", "fp16")):
        why = "its configuration sets bf16 or fp16: leave both out, the recipe says the precision"
    elif not fsdp and any(stage.optimizer == "muon" for stage in recipe.stages):
        why = "Muon needs whole matrices, and it updates flat shards: use fsdp2, or adamw"
    elif found in ("fsdp2", "zero3") and recipe.evaluation.every is not None:
        why = "evaluation.every asks on one rank, which has but shards of the weights: leave it out, or use zero2"
    elif found == "zero3" and any(stage.skipper and stage.skipper.tokens == "all" for stage in recipe.stages):
        why = "the norm that clips counts skipped layers' old gradients: use fsdp2, zero2, or skipper.tokens: visual"
    if why:
        raise UserError(f"{found} was asked for by the launcher, but {why}")


def check_inputs(recipe: Recipe, done: Collection[str] = ()) -> dict[str, Source]:
    """Open all data that a recipe trains on and asks, so that no mistake in them is told hours later.

    Args:
        done: names of stages that are trained already.

    Returns:
        The source of each other stage, by its name.

    Raises:
        UserError: a package that is not installed, scores of the same name, or data that are not there or not as
            expected, as far as that can be told without decoding images.
    """
    if missing := [name for name in recipe.report_to if importlib.util.find_spec(name) is None]:
        raise UserError(f"report_to: {missing} cannot be imported; pip install {' '.join(missing)}, or take it out")
    if recipe.quantization != "none":
        check_installed("bitsandbytes", "quant", f"language.quantization: {recipe.quantization}")
    for stage in recipe.stages:
        if stage.lora is not None:
            check_installed("peft", "lora", f"stage '{stage.name}': lora")
    if recipe.evaluation.kind == "scenes" and (twice := set(ALL_TASKS) & set(recipe.evaluation.held_out)):
        raise UserError(f"evaluation.held_out: {sorted(twice)} are tasks of scenes, which are asked too; rename them")
    for name, settings in recipe.evaluation.held_out.items():
        try:
            held_out_questions(name, settings, recipe.stages[-1].side)
        except ValueError as error:
            raise UserError(f"evaluation.held_out.{name}: {error}") from None
    sources = {}
    for stage in recipe.stages:
        if stage.name not in done:
            length, strict = recipe.samples_before(stage) + stage.samples, recipe.on_bad_sample == "error"
            sources[stage.name] = open_source(recipe.data_of(stage), length, stage.side, strict=strict)
    return sources


def _check_stages(
    session: Session,
    sources: Mapping[str, Source],
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
) -> None:
    """Raises UserError, before the first stage trains, for a fault that a later one would meet."""
    recipe, language = session.recipe, model.config.text_config
    for stage in recipe.stages:
        max_length(stage, language)
        if stage.skipper is not None:
            try:
                stage.skipper.probabilities(language.num_hidden_layers, 0.0)
            except ValueError as error:
                raise UserError(f"stage '{stage.name}': {error}") from None
    for stage in [each for each in recipe.stages if each.name in sources][1:]:  # the first is about to see its own
        try:
            scaled = scaled_processor(model, processor, stage.bridge, stage.image_size)
            data = _training_set(recipe, stage, scaled, language, sources[stage.name])
            plan_stage(data, stage, recipe.seed, session.out / stage.name / "checkpoints", session.console)
            for index in range(0 if data.replaces else min(FIRST, len(data))):  # where sizes were not measured
                data.encode((data.offset + index) % len(data.source), text_alone=True)
        except ValueError as error:
            text = str(error)  # some say the stage themselves
            raise UserError(text if text.startswith("stage ") else f"stage '{stage.name}': {text}") from None


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
        if report.parts or report.image_size[0] != report.image_size[1]:
            console.print(Text(str(report)))
        return model, processor
    torch.manual_seed(recipe.seed)
    language: Any = recipe.language
    tokenizer = None
    if isinstance(language, ScratchLanguage):
        language, tokenizer = scratch_language(language, texts(recipe, stage))
    elif recipe.pretrained is not None:
        language = recipe.pretrained.path
    packed, layers = recipe.quantization != "none", recipe.language_layers
    if packed:
        language = language_folder(language), recipe.quantization, recipe.precision, layers
        (language, tokenizer), layers = quantised_language(*language), None
    model, processor = build(
        recipe.vision,
        language,
        stage.bridge,
        tokenizer=tokenizer,
        image_size=stage.image_size,
        vision_levels=recipe.vision_levels,
        language_layers=layers,
        resize=recipe.resize,
    )
    # Weights that were stored in 16 bits: none in an fp32 run, and bf16's autocast does not take fp16 beside it.
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dtype == torch.float16 or (recipe.precision == "fp32" and tensor.dtype == torch.bfloat16):
            tensor.data = tensor.data.float()
    if packed:
        model.to(default_device())  # bitsandbytes packs where it computes, and the Trainer moves no such model
    stops = stop_tokens(processor.tokenizer, model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = stops  # so that `generate` ends where training did
    return model, processor


def max_length(stage: Stage, language: PreTrainedConfig) -> int | None:
    """Tokens that a sample may have: the stage's, or the language model's context; None if that has no end.

    Raises:
        UserError: the stage allows more than the context.
    """
    context = getattr(language, "max_position_embeddings", None)
    if stage.max_length is None or context is None or stage.max_length <= context:
        return stage.max_length or context
    raise UserError(
        f"stage '{stage.name}': max_length {stage.max_length} is more than the language model's context of {context}"
    )


def texts(recipe: Recipe, stage: Stage) -> list[str]:
    """Texts that train the tokenizer of a language model from scratch; bad samples are passed over here."""
    texts = []
    for data in recipe.all_data():
        source = open_source(data, 3000, stage.side, strict=recipe.on_bad_sample == "error")
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
    model: SparsightForConditionalGeneration,
    processor: SparsightProcessor,
    source: Source,
) -> None:
    recipe, log, console = session.recipe, session.log, session.console
    lora = add_lora(model, stage.lora, recipe.seed, recipe.keeps_adapters(stage))
    plan = select_trainable(model, stage)
    config = model.config
    _print_stage(stage, plan, config.num_image_tokens, console)
    data = _training_set(recipe, stage, processor, config.text_config, source)
    folder = session.out / stage.name / "checkpoints"
    steps = plan_stage(data, stage, recipe.seed, folder, console)
    _log_stage(session.log, stage, config.num_image_tokens, len(steps), plan)
    if stage.gradient_checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    elif recomputes(model):
        model.gradient_checkpointing_disable()
    encoder_flops = count_flops(model.model.vision_tower, stage.side, config.vision_levels)
    encoding = Encoding(0.0, 0.0)
    if stage.cache_features:
        data.cache, encoding = cached_features(session, stage, model, processor, data.source, encoder_flops)
    options: dict[str, Any] = {"log": log, "console": console, "resume": session.resume}
    if recipe.evaluation.every is not None and session.main:
        options["scorer"] = DuringTraining(session, stage, model, processor)
    start = time.perf_counter()
    counter = StepCounter(model, Trains.of(stage), encoder_flops, recipe.precision, session.resident)
    quarantine = None
    if data.replaces:
        same = [each.name for each in recipe.of_the_same_data(stage)]
        file = session.out / "quarantine.jsonl"
        quarantine = Quarantine(file, recipe.max_bad, stage.name, same, len(source), session.main)
    arguments = training_arguments(recipe, stage, len(steps), folder)
    began = train_stage(model, processor, data, steps, stage, arguments, counter, quarantine=quarantine, **options)
    seconds = time.perf_counter() - start - (options["scorer"].seconds if "scorer" in options else 0.0)
    if engine() != "ddp":
        make_whole(model, session.main)
    merge_lora(lora)
    if not session.main:
        return
    logged = next(logged for logged in log.run().stages if logged.name == stage.name)
    done, waiting = logged.steps, logged.data_wait or 0.0
    # A resumed stage includes the steps before its checkpoint.
    seconds += sum(step_seconds(step) for step in done if step["step"] <= began)
    if waiting > WAITING:
        advice = "" if stage.cache_features else ", or set cache_features for a frozen encoder"
        console.print(f"{waiting:.1%} of the time waiting for data: raise workers{advice}", style="yellow")
    log.write(
        "stage_end",
        stage=stage.name,
        seconds=seconds + encoding.seconds,
        executed_flops=sum(step["flops"] for step in done) + encoding.flops,
        encoding_seconds=encoding.seconds,
        samples=stage.samples,
        data_wait=waiting,
    )


def _log_stage(log: RunLog, stage: Stage, tokens: int, steps: int, plan: Mapping[str, tuple[int, int]]) -> None:
    log.write(
        "stage",
        stage=stage.name,
        bridge=stage.bridge.kind,
        layout=str(stage.bridge.scales) if hasattr(stage.bridge, "scales") else "",
        visual_tokens=tokens,
        image_size=stage.image_size,
        samples=stage.samples,
        steps=steps,
        trainable_parameters=sum(trained for trained, _ in plan.values()),
        total_parameters=sum(total for _, total in plan.values()),
        trains={part: trained for part, (trained, _) in plan.items() if trained},
    )


def _training_set(
    recipe: Recipe, stage: Stage, processor: SparsightProcessor, language: PreTrainedConfig, source: Source
) -> TrainingSet:
    """A stage's data, behind the conversations that earlier stages have had of the same."""
    return TrainingSet(
        source,
        processor,
        stage.samples,
        offset=recipe.samples_before(stage),
        max_length=max_length(stage, language),
        drop_too_long=stage.on_too_long == "drop_sample",
        replace_bad=recipe.on_bad_sample == "quarantine",
        seed=recipe.seed,
    )


def _print_stage(stage: Stage, plan: Mapping[str, tuple[int, int]], tokens: int, console: Console) -> None:
    """The stage and its trainable parts, in a line."""
    trains = [
        f"{part} ({'LoRA, ' if part == 'language' and stage.lora else ''}{human(plan[part][0])} at {rate:g})"
        for part, rate in stage.learning_rate.parts().items()
    ]
    head = f"{tokens} visual tokens, {stage.image_size} px, {stage.samples:,} samples"
    console.print(Text(f"stage {stage.name}: {head}; trains {', '.join(trains)}"), soft_wrap=True)


def train(recipe: Recipe | str | Path | Mapping[str, Any], output_dir: str | Path, resume: bool = False) -> Path:
    """Run a recipe from Python, as ``sparsight train`` does.

    Args:
        recipe: a recipe, the path of its YAML, or its keys and values.
        output_dir: the run's folder.
        resume: go on where the run in ``output_dir`` stopped.

    Returns:
        The folder of the trained model.

    Raises:
        UserError: a mistake in the recipe or its data; nothing has been trained then.
        FileExistsError: ``output_dir`` holds a run and ``resume`` is off.
    """
    if isinstance(recipe, Mapping):
        recipe = Recipe.read(recipe, "recipe")
    return run(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), output_dir, Console(), resume)
