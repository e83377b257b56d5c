"""The model card of a trained model: what was done by stage, and the figures of the run's log."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sparsight.reporting.runlog import Run, StageRun
from sparsight.reporting.tables import decimals, duration, human, percent
from sparsight.settings.recipe import Recipe, Stage

_HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # names of ours -> hub ids


def write_card(folder: str | Path, recipe: Recipe, run: Run) -> None:
    """Write ``README.md`` beside a saved model: hub metadata, methods and figures by stage, scores if there are.

    Args:
        run: what the log says so far; a stage that it does not know is left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    names = [name for name in (recipe.vision, recipe.language) if isinstance(name, str)]
    ids = [_HUB.get(name, name) for name in names]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[name for name in ids if name.count("/") == 1 and not Path(name).exists()] or None,
        tags=["sparsight"],
    )
    logged = {stage.name: stage for stage in run.stages}
    stages = [(stage, logged[stage.name]) for stage in recipe.stages if stage.name in logged]
    card = ModelCard.from_template(
        data,
        template_str=resources.files("sparsight.reporting").joinpath("card.md.j2").read_text(encoding="utf-8"),
        name=recipe.name,
        parts=[Path(name).name for name in names] + ["a language model from scratch"] * (2 - len(names)),
        methods=[_method(stage, done) for stage, done in stages],
        figures=[_figures(done) for _, done in stages],
        scores=[
            (
                task,
                *(percent(table.get(task)) for table in (run.scores, run.chance, run.shuffled)),
                run.items.get(task),
            )
            for task in run.scores
        ],
    )
    Path(folder, "README.md").write_text(f"{card}\n", encoding="utf-8")


def _method(stage: Stage, done: StageRun) -> list[str]:
    """Cells: stage, bridge, layout, visual tokens, compressor, skipper, what trains."""
    rates = {part: f"{part} {rate:g}" for part, rate in stage.learning_rate.parts().items()}
    if stage.lora is not None:
        rates["language"] += f" (LoRA, rank {stage.lora.rank})"
    cells = [stage.name, stage.bridge.kind, done.layout or "-", done.visual_tokens, _settings(stage.compressor)]
    return [_cell(cell) for cell in (*cells, _settings(stage.skipper), ", ".join(rates.values()))]


def _settings(method: Any) -> str:
    given: Mapping[str, Any] = method.model_dump(mode="json", exclude_defaults=True) if method is not None else {}
    return ", ".join(f"{key} {value}" for key, value in given.items()) or ("defaults" if method is not None else "-")


def _figures(done: StageRun) -> list[str]:
    """Cells: stage, samples, time, executed FLOPs, peak memory, last loss."""
    memory = human(done.highest("memory_bytes"), "B")
    cost = duration(done.seconds), human(done.executed_flops, "FLOP"), memory, decimals(done.curve.final)
    return [_cell(cell) for cell in (done.name, done.samples, *cost)]


def _cell(value: object) -> str:
    """Text that ends no cell of a table, and begins no tag."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
