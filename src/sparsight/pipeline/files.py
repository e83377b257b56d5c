"""What a run keeps in its folder: its log, its models, and the recipe that trained them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.assets import emoji_folder
from sparsight.config import Recipe, SceneData, readable
from sparsight.counting import default_device, device_name, fast_bf16, precision_on
from sparsight.modeling import SparsightForConditionalGeneration, SparsightProcessor
from sparsight.modeling.build import own_image_size
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.folders import loading, model_type, read_json
from sparsight.reporting import RunLog, environment, read_run, write_card

RECIPE_FILE = "sparsight_recipe.json"
# How samples are read, dealt out and told of, not what is learnt from them: a run may go on with others.
MAY_CHANGE = ("on_bad_sample", "max_bad", "workers", "report_to")
MAY_CHANGE_IN_STAGES = ("micro_batch_size", "gradient_checkpointing")


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


def settle_precision(recipe: Recipe, out: Path, resume: bool, console: Console) -> Recipe:
    """``auto`` as bf16 or fp32: what a resumed run began in, also on another device, else what this one is fast in."""
    file, device, wanted = out / "run.jsonl", default_device(), recipe.precision
    lines = file.read_bytes().splitlines() if resume and file.is_file() else []
    if wanted == "auto" and len(lines) > 1:  # else it has not begun, see `open_log`
        wanted = json.loads(lines[0]).get("recipe", {}).get("precision", wanted)
    found = precision_on(device, wanted)
    if recipe.precision != "fp32" and not fast_bf16(device):
        slow = ", and fp32 by far faster" if found == "bf16" else ""
        name = device_name(device).partition(",")[0]
        console.print(f"precision {found}: {name} has no bf16 instructions here{slow}", highlight=False)
    return recipe.model_copy(update={"precision": found})


def settle_image_size(recipe: Recipe) -> Recipe:
    """The recipe with the encoder's own image size in every stage that says none.

    Raises:
        ValueError: there is no such encoder.
    """
    if all(stage.image_size for stage in recipe.stages):
        return recipe
    own = own_image_size(recipe.vision)
    stages = [stage.model_copy(update={"image_size": stage.image_size or own}) for stage in recipe.stages]
    return recipe.model_copy(update={"stages": tuple(stages)})


def _what_is_learnt(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without those that a resumed run may change."""
    stages = [
        {key: value for key, value in stage.items() if key not in MAY_CHANGE_IN_STAGES}
        for stage in values.get("stages", ())
    ]
    return {key: value for key, value in values.items() if key not in MAY_CHANGE} | {"stages": stages}


def open_log(recipe: Recipe, out: Path, resume: bool) -> RunLog:
    """A new run's log, or that of the run which goes on.

    Raises:
        FileExistsError: ``out`` holds a run, and ``resume`` is off.
        ValueError: that run's recipe differs in more than `MAY_CHANGE` and `MAY_CHANGE_IN_STAGES`.
    """
    file = out / "run.jsonl"
    values = recipe.model_dump(mode="json")
    lines = file.read_bytes().splitlines() if file.is_file() else []
    if len(lines) < 2:  # no more than a header: it failed before its first stage, by a wrong name perhaps
        file.unlink(missing_ok=True)
        for sizes in out.glob("*/checkpoints/sizes.npy"):  # of what may have been changed since
            sizes.unlink()
    else:
        if not resume:
            raise FileExistsError(f"{out} holds a run already; go on with --resume, or choose another --out")
        header = json.loads(lines[0])
        before, now = _what_is_learnt(header.get("recipe", {})), _what_is_learnt(values)
        changed = sorted(key for key in now if before.get(key) != now[key])
        if changed:
            free = ", ".join(MAY_CHANGE + MAY_CHANGE_IN_STAGES)
            raise ValueError(
                f"{out} was run with another recipe; these keys differ: {changed}. A resumed run may only change {free}"
            )
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
    """Whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / RECIPE_FILE).write_text(with_cutouts(session.recipe).model_dump_json(indent=2), encoding="utf-8")
    write_card(partial, session.recipe, read_run(session.log.path))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(folder: Path) -> tuple[SparsightForConditionalGeneration, SparsightProcessor]:
    """A saved model, each weight as wide as it was saved, and its processor.

    Raises:
        ValueError: the folder holds no Sparsight model, or a damaged file.
    """
    if (kind := model_type(folder)) != SparsightConfig.model_type:
        found = "no model there; expected a folder with config.json" if kind is None else f"a model of type '{kind}'"
        raise ValueError(f"{folder}: {found}. Expected one that sparsight.build or `sparsight train` has made")
    # transformers gives all weights one dtype; here a frozen part may be in bf16, beside a trained one in fp32.
    with loading("model", str(folder)):
        model = SparsightForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        processor = SparsightProcessor.from_pretrained(folder, trust_remote_code=False)
    narrow = _in_bf16(folder)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in narrow:
            tensor.data = tensor.data.bfloat16()
    return model, processor


def load_any(name: str, **options: Any) -> tuple[Any, Any]:
    """A VLM of transformers in eval mode, on the GPU if there is one, and its processor; ``options`` go to its
    ``from_pretrained``.

    Raises:
        ValueError: there is none of that name, it is of another kind, or it has no processor for images.
    """
    if Path(name).is_dir() and model_type(Path(name)) is None:
        raise ValueError(f"{name}: no model there; expected a folder with config.json")
    with loading("vision-language model", name):
        model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False, **options)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{name}: expected a processor for images and text, found {type(processor).__name__}")
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


def trained_by(folder: Path) -> Recipe | None:
    """The recipe that lies beside a model; ValueError if it is damaged."""
    file = folder / RECIPE_FILE
    if not file.is_file():
        return None
    try:
        return Recipe.model_validate(read_json(file))
    except ValidationError as error:
        raise ValueError(f"{file}: {readable(error)}") from None


def own_scenes(folder: Path) -> SceneData:
    recipe = trained_by(folder)
    return (recipe.scenes() if recipe is not None else None) or SceneData()
