"""The model card of a trained model: methods and figures by stage."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sparsight.reporting.runlog import Run, StageRun
from sparsight.reporting.tables import decimals, duration, human, percent, table
from sparsight.settings.recipe import Recipe, Stage

_METHODS = ("stage", "bridge", "layout", "visual tokens", "compressor", "skipper", "learning rates")
_FIGURES = ("stage", "samples", "time", "executed FLOPs", "peak memory", "last loss")
_SCORES = ("task", "score", "chance", "shuffled", "items")
_HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # names of ours -> hub ids


def write_card(folder: str | Path, recipe: Recipe, run: Run) -> None:
    """Write ``README.md`` beside a saved model: hub metadata, methods and figures by stage, scores if there are.

    Args:
        run: of its log so far; a stage that it does not know is left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    names = [recipe.vision] + ([] if recipe.pretrained is None else [recipe.pretrained.path])
    ids = [_HUB.get(name, name) for name in names]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[name for name in ids if name.count("/") == 1 and not Path(name).exists()] or None,
        tags=["sparsight"],
    )
    logged = {stage.name: stage for stage in run.stages}
    stages = [(stage, logged[stage.name]) for stage in recipe.stages if stage.name in logged]
    tables = run.scores, run.chance, run.shuffled
    scores = [(task, *(percent(each.get(task)) for each in tables), run.items.get(task)) for task in run.scores]
    card = ModelCard.from_template(
        data,
        template_str=resources.files("sparsight.reporting").joinpath("card.md.j2").read_text(encoding="utf-8"),
        name=recipe.name,
        parts=[Path(name).name for name in names] + ["a language model from scratch"] * (2 - len(names)),
        methods=table("", _METHODS, [_method(stage, done) for stage, done in stages]).in_markdown(),
        figures=table("", _FIGURES, [_figures(done) for _, done in stages]).in_markdown(),
        scores=table("", _SCORES, scores).in_markdown() if scores else "",
    )
    Path(folder, "README.md").write_text(f"{card}\n", encoding="utf-8")


def _method(stage: Stage, done: StageRun) -> list[object]:
    rates = {part: f"{part} {rate:g}" for part, rate in stage.learning_rate.parts().items()}
    if stage.lora is not None:
        rates["language"] += f" (LoRA, rank {stage.lora.rank})"
    methods = _settings(stage.compressor), _settings(stage.skipper)
    return [stage.name, stage.bridge.kind, done.layout or "-", done.visual_tokens, *methods, ", ".join(rates.values())]


def _settings(method: Any) -> str:
    given: Mapping[str, Any] = method.model_dump(mode="json", exclude_defaults=True) if method is not None else {}
    return ", ".join(f"{key} {value}" for key, value in given.items()) or ("defaults" if method is not None else "-")


def _figures(done: StageRun) -> list[object]:
    memory = human(done.highest("memory_bytes"), "B")
    cost = duration(done.seconds), human(done.executed_flops, "FLOP"), memory, decimals(done.curve.final)
    return [done.name, done.samples, *cost]
