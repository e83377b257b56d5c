"""The folder of a run: its log, its models, and the recipe that trained them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.text import Text
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.aside import moved_aside
from sparsight.assets import emoji_folder
from sparsight.console import Console
from sparsight.devices.precision import default_device, device_name, fast_bf16, precision_on
from sparsight.devices.ranks import from_first, process_state
from sparsight.errors import UserError
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.build import own_image_size
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.folders import complete, loading, model_type, read_json
from sparsight.modeling.quantised import check_packages, save_model
from sparsight.reporting import RunLog, environment, read_run, write_card
from sparsight.safety import MANIFEST, describe, faults, flush, locked, naming_space, write_manifest
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Recipe
from sparsight.training.checkpoints import StopSignals

RECIPE_FILE = "sparsight_recipe.json"
# Keys that change no weight: a run may go on with others.
MAY_CHANGE = ("on_bad_sample", "max_bad", "workers", "report_to", "evaluation")
MAY_CHANGE_IN_STAGES = ("micro_batch_size", "gradient_checkpointing", "checkpoints", "conversation")


@dataclass(frozen=True)
class Session:
    """One sitting of a run, as all its parts see it."""

    recipe: Recipe
    out: Path
    log: RunLog
    console: Console
    resume: bool
    cache_root: Path
    main: bool = True  # of all ranks
    resident: int = 0  # bytes of the process before the run


def settle_precision(recipe: Recipe, out: Path, resume: bool, console: Console) -> Recipe:
    """``auto`` as bf16 or fp32: a resumed run goes on as it began; else the device chooses the faster one."""
    file, device, wanted = out / "run.jsonl", default_device(), recipe.precision
    lines = file.read_bytes().splitlines() if resume and file.is_file() else []
    if wanted == "auto" and len(lines) > 1:  # else it has not begun, see `open_log`
        wanted = _recipe_in(file).get("precision", wanted)
    found = precision_on(device, wanted)
    if recipe.precision != "fp32" and not fast_bf16(device):
        slow = ", and fp32 by far faster" if found == "bf16" else ""
        name = device_name(device).partition(",")[0]
        console.print(f"precision {found}: {name} has no bf16 instructions here{slow}", highlight=False)
    return recipe.model_copy(update={"precision": found})


def settle_image_size(recipe: Recipe) -> Recipe:
    """The recipe with the encoder's own image size in every stage that says none.

    Raises:
        UserError: there is no such encoder.
    """
    if all(stage.image_size for stage in recipe.stages):
        return recipe
    own = own_image_size(recipe.vision)
    stages = [stage.model_copy(update={"image_size": stage.image_size or own}) for stage in recipe.stages]
    return recipe.model_copy(update={"stages": tuple(stages)})


def _recipe_in(log: Path) -> dict[str, Any]:
    """The recipe's values in a log's header, and the defaults of keys that are newer than the log.

    Raises:
        UserError: the log begins with no header.
    """
    line = log.read_bytes().splitlines()[0]
    try:
        values: dict[str, Any] = json.loads(line)["recipe"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{log}, line 1: expected a header with the run's recipe, found {line[:80]!r}") from None
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:  # of a version with other keys, which then differ
        return values


def _decides_weights(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without those that a resumed run may change."""
    stages = [
        {key: value for key, value in stage.items() if key not in MAY_CHANGE_IN_STAGES}
        for stage in values.get("stages", ())
    ]
    return {key: value for key, value in values.items() if key not in MAY_CHANGE} | {"stages": stages}


def holds_run(recipe: Recipe, out: Path) -> bool:
    """Whether a run has begun in ``out``.

    Raises:
        FileExistsError: weights of the recipe's stages lie there, without a log that says how they were trained, or
            something else has the log's name.
    """
    file = out / "run.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    if len(lines) > 1:
        return True
    folders = [out / stage.name for stage in recipe.stages]
    trained = [path for each in folders for path in (each / "model", *each.glob("checkpoints/checkpoint-*"))]
    if held := [str(path) for path in trained if path.exists()]:
        raise FileExistsError(
            f"{out} has {', '.join(held)}, and no whole run.jsonl that says how it was trained: choose another --out, "
            "or --overwrite, which moves the folder aside"
        )
    if lines and not (lines[0].startswith(_HEADER) or _HEADER.startswith(lines[0])):
        raise FileExistsError(f"{file} is no log of a run: choose another --out, or --overwrite, which moves it aside")
    return False


def move_aside(out: Path, resume: bool, console: Console) -> None:
    """``--overwrite``: the folder, if there is one, gets another name, which is told.

    Raises:
        UserError: ``resume`` is on too; or a process works in the folder, and would write on in it.
        OSError: it cannot be renamed.
    """
    if resume:
        raise UserError("--resume goes on with the run that --overwrite moves aside; give one of them")
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(f"--overwrite would move {out.resolve()}, which this command works in; start it elsewhere")
    if out.exists():
        out = Path(os.path.abspath(out))  # so that it has a name
        with locked(out):  # by nobody else
            pass
        console.print(Text(f"{out} is now {moved_aside(out, f'{out.name}-old')}"), soft_wrap=True)


_HEADER = b'{"type": "header"'  # how `RunLog` begins a log


def open_log(recipe: Recipe, out: Path, resume: bool) -> RunLog:
    """A new run's log, or that of the run which goes on.

    Raises:
        FileExistsError: ``out`` holds a run, and ``resume`` is off; or as `holds_run` says.
        UserError: that run's recipe differs in more than `MAY_CHANGE` and `MAY_CHANGE_IN_STAGES`.
    """
    file = out / "run.jsonl"
    values = recipe.model_dump(mode="json")
    if not holds_run(recipe, out):  # no more than a header: it failed before its first stage, by a wrong name perhaps
        file.unlink(missing_ok=True)
        for stage in recipe.stages:  # of data that may have changed since
            (out / stage.name / "checkpoints" / "sizes.npy").unlink(missing_ok=True)
    else:
        if not resume:
            raise FileExistsError(
                f"{out} holds a run already; go on with --resume, choose another --out, or --overwrite, which moves it "
                "aside"
            )
        before, now = _decides_weights(_recipe_in(file)), _decides_weights(values)
        changed = sorted(key for key in now if before.get(key) != now[key])
        if changed:
            free = ", ".join(MAY_CHANGE + MAY_CHANGE_IN_STAGES)
            raise UserError(
                f"{out} was run with another recipe; these keys differ: {changed}. A resumed run may only change {free}"
            )
        log = RunLog(file, append=True)
        if values != read_run(file).header.get("recipe"):
            log.write("recipe", recipe=values)
        return log
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


def samples_hash(recipe: Recipe) -> str:
    """Equal for runs that see the same samples in the same order."""
    seen = {
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "stages": [
            (stage.samples, stage.batch_size, stage.batch_tokens, stage.tasks, stage.data and stage.data.model_dump())
            for stage in recipe.stages
        ],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def save(
    model: SparsightForConditionalGeneration, processor: SparsightProcessor, session: Session, folder: Path
) -> None:
    """Whole or not at all, with a manifest; a signal waits until it is done.

    Raises:
        UserError: the disk is full.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # ours, which a kill cut short
    with (
        naming_space(folder, model.get_memory_footprint, "The stage's checkpoints are whole"),
        StopSignals(),
    ):
        save_model(model, partial)
        processor.save_pretrained(partial)
        (partial / RECIPE_FILE).write_text(with_cutouts(session.recipe).model_dump_json(indent=2), encoding="utf-8")
        write_card(partial, session.recipe, session.log.run())
        write_manifest(partial)
        partial.rename(folder)  # an error if something is there: `holds_run` has found nothing
        flush(folder.parent)


def finished(recipe: Recipe, out: Path, console: Console) -> list[str]:
    """Names of the stages whose models lie in ``out``. On the first rank, damaged ones are named and moved aside: the
    stage goes on from its last checkpoint."""
    for folder in [out / stage.name / "model" for stage in recipe.stages] if process_state().is_main_process else []:
        if (folder / MANIFEST).exists() and (wrong := faults(folder)):
            new = moved_aside(folder, "damaged-model")
            text = f"{folder} is damaged ({describe(wrong)}); it is now {new}, and its stage is trained again"
            console.print(Text(text, style="yellow"), soft_wrap=True)
    return from_first([stage.name for stage in recipe.stages if (out / stage.name / "model").is_dir()])


def load(folder: str | Path) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """A saved model, each weight as wide as it was saved, and its processor.

    Raises:
        UserError: the folder holds no Sparsight model, or a damaged file.
    """
    folder = Path(folder)
    if (kind := model_type(folder)) != SparsightConfig.model_type:
        found = "no model there; expected a folder with config.json" if kind is None else f"a model of type '{kind}'"
        raise UserError(f"{folder}: {found}. Expected one that sparsight.build or `sparsight train` has made")
    if lacks := {"vision_config", "text_config"} - read_json(folder / "config.json").keys():
        raise UserError(f"{folder / 'config.json'} lacks {sorted(lacks)}: it is damaged. Get it anew")
    check_packages(folder)
    if (folder / RECIPE_FILE).is_file() and not (folder / MANIFEST).exists():
        warnings.warn(f"{folder} has no {MANIFEST}: its files could not be checked", stacklevel=2)
    # transformers gives all weights one dtype; here a frozen part may be in bf16, beside a trained one in fp32.
    with loading("model", str(folder)):
        model = complete(SparsightForConditionalGeneration, folder, dtype=torch.float32)
        processor = SparsightProcessor.from_pretrained(folder, trust_remote_code=False)
    narrow = _in_bf16(folder)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name.replace(".base_layer", "") in narrow:
            tensor.data = tensor.data.bfloat16()
    return model, processor


def load_either(name: str | Path) -> tuple[Any, Any]:
    """A model of ours on the default device, or else any of transformers (`load`, `load_any`)."""
    if not Path(name).is_dir() or model_type(Path(name)) not in (None, SparsightConfig.model_type):
        return load_any(str(name))
    model, processor = load(name)
    return model.to(default_device()), processor


def load_any(name: str, **options: Any) -> tuple[Any, Any]:
    """A VLM of transformers in eval mode, on the GPU if there is one, and its processor; ``options`` go to its
    ``from_pretrained``.

    Raises:
        UserError: there is none of that name, it is of another kind, or it has no processor for images.
    """
    if Path(name).is_dir() and model_type(Path(name)) is None:
        raise UserError(f"{name}: no model there; expected a folder with config.json")
    with loading("vision-language model", name):
        model = complete(AutoModelForImageTextToText, name, trust_remote_code=False, **options)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{name}: expected a processor for images and text, found {type(processor).__name__}")
    return model.to(default_device()), processor


def _in_bf16(folder: Path) -> set[str]:
    """Names of the weights that were saved in bf16."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name for name in tensors.keys() if tensors.get_slice(name).get_dtype() == "BF16"}  # noqa: SIM118
    return found


def with_cutouts(recipe: Recipe) -> Recipe:
    """The recipe with the cut-outs that its scenes had, so that a model is asked about these wherever it is asked."""
    found = "emoji" if emoji_folder() else "shapes"

    def settled(value: Any) -> Any:
        if isinstance(value, dict):
            named = {"cutouts": found} if (value.get("kind"), value.get("cutouts")) == ("scenes", "auto") else {}
            return {key: settled(item) for key, item in value.items()} | named
        return [settled(item) for item in value] if isinstance(value, list) else value

    return Recipe.model_validate(settled(recipe.model_dump(mode="json")))


def trained_by(folder: str | Path) -> Recipe | None:
    """The recipe that lies beside a model; ValueError if it is damaged."""
    file = Path(folder) / RECIPE_FILE
    if not file.is_file():
        return None
    return Recipe.read(read_json(file), file)


def own_scenes(folder: str | Path) -> SceneData:
    recipe = trained_by(folder)
    return (recipe.scenes() if recipe is not None else None) or SceneData()
