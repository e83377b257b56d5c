"""The forecast of `sparsight plan`, as tables and as a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sparsight.cost.forecast import (
    Speed,
    StageCost,
    at_peak,
    forecast,
    standard,
    total_flops,
)
from sparsight.devices.peaks import MFU, known_device
from sparsight.errors import UserError
from sparsight.reporting.page import marker, plot, plots, section, shown_table, write_page
from sparsight.reporting.runlog import read_run
from sparsight.reporting.tables import Table, duration, human, table
from sparsight.settings.recipe import Recipe

HEADINGS = ("stage", "visual tokens", "layers run", "length", "micro-batch", "steps", "FLOPs", "memory")
STANDARD = (
    "The standard recipe: the same samples and stages, with a single-scale resampler of {tokens} tokens (the most that "
    "a stage here has) throughout, every token and every layer in every step."
)
ASSUMED = (
    "Reckoned with {text:g} text tokens a conversation, {supervised:g} of them supervised; images: {images:g} "
    "(stages.{name}.conversation), no padding; FLOPs of matrix products and attention, backward pass included; memory "
    "of AdamW and PyTorch on one device, without the waste of its allocator."
)
Rows = list[list[str]]


def speed_of(
    recipe: Recipe, device: str | None = None, mfu: float | None = None, like: Path | None = None
) -> tuple[Speed | None, str]:
    """How long stages take, on a named device or as a run of this machine went, and the source of that speed.

    Args:
        like: folder of a run, whose executed FLOPs by its seconds are taken.

    Raises:
        UserError: the device is not known, ``mfu`` is no share, both a device and a run are given, or the run logged
            no step.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: expected a share of the peak above 0 and up to 1")
    if like is not None:
        if device is not None or mfu is not None:
            raise UserError(f"--like {like} says how fast the device is: leave out --device and --mfu")
        run = read_run(like)
        seconds, flops = (
            math.fsum(getattr(stage, key) for stage in run.stages) for key in ("seconds", "executed_flops")
        )
        if not seconds or not flops:
            raise UserError(f"--like {like}: expected a run that has trained, found no step in its log")
        return at_peak(flops / seconds, 1.0), f"Time as {run.name} went: {human(flops / seconds, 'FLOP/s')}."
    if device is None:
        return None, "No time: name a --device, or a run of this machine with --like RUN."
    name, peak, _ = known_device(device)
    if recipe.precision == "fp32":
        raise UserError(f"--device {device}: its peak is known for bf16, but precision is {recipe.precision}")
    assumed = f"{mfu or MFU:.0%} of it ({'given' if mfu else 'assumed'})"
    said = f"Time on one {name}: its peak is {human(peak, 'FLOP/s')}, and a run does {assumed}."
    return at_peak(peak, mfu or MFU), said


def memory_of(text: str | None, device: str | None) -> float | None:
    """Bytes of ``80GB``, else of the device.

    Raises:
        UserError: it is no such size.
    """
    if text is None:
        return None if device is None else known_device(device)[2]
    number = text.upper().removesuffix("B").removesuffix("G").strip()
    try:
        size = float(number) * 1e9
    except ValueError:
        size = 0.0
    if size <= 0:
        raise UserError(f"--memory {text}: expected gigabytes, such as 80GB")
    return size


def stage_rows(stages: Sequence[StageCost], speed: Speed | None, limit: float | None) -> Rows:
    """A row for each stage under `headings`."""
    rows = []
    for cost in stages:
        kept, layers, most = cost.mean("tokens"), cost.mean("layers"), cost.shapes[1].layers
        tokens = f"{cost.tokens}" if kept == cost.tokens else f"{cost.tokens}, {kept:.0f} kept"
        count = f"{layers:.1f} of {most}" if layers < most - 1e-9 else f"{most}"
        row = [cost.stage.name, tokens, count, f"{cost.length():.0f}", f"{cost.micro_batch}", f"{cost.steps:,}"]
        row += [human(sum(cost.flops.values())), gigabytes(sum(cost.memory().values()))]
        if limit is not None:
            row.append(str(cost.fits(limit)))
        rows.append(row + ([] if speed is None else [duration(speed(cost))]))
    return rows


def headings(speed: Speed | None, limit: float | None) -> list[str]:
    return [*HEADINGS, *([] if limit is None else ["micro-batch that fits"]), *([] if speed is None else ["time"])]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def notes(recipe: Recipe, stages: Sequence[StageCost], speed: Speed | None) -> list[str]:
    """Sentences below the table: the ratio to the standard recipe (the headline), that recipe, and the largest part."""
    plain, now = forecast(standard(recipe)), total_flops(list(stages))
    ratio = now / total_flops(plain)
    line = f"{human(now, 'FLOP')} in all: {ratio:.2f}x of the standard recipe's"
    if speed is not None:
        seconds, full = (sum(map(speed, costs)) for costs in (stages, plain))
        line += f"; {duration(seconds)}: {seconds / full:.2f}x of its time"
    shares = Counter({(cost.stage.name, part): f / now for cost in stages for part, f in cost.flops.items()})
    (stage, part), share = shares.most_common(1)[0]
    lines = [f"{line}.", STANDARD.format(tokens=plain[0].tokens)]
    lines.append(f"{share:.0%} of the FLOPs are {part.replace('_', ' ')} in stage {stage}.")
    conversations = {cost.stage.conversation: cost.stage.name for cost in stages}
    lines += [ASSUMED.format(name=name, **c.model_dump()) for c, name in conversations.items()]
    return lines


def part_rows(stages: Sequence[StageCost]) -> Rows:
    """Parameters that train of all, FLOPs and bytes, a row for each part; after its name a column for each stage."""
    rows = [
        [f"parameters: {part}", *(f"{human(c.parts.trains[part])} of {human(c.parts.total[part])}" for c in stages)]
        for part in stages[0].parts.total
    ]
    rows += [
        [part.replace("_", " "), *(human(cost.flops[part], "FLOP") for cost in stages)] for part in stages[0].flops
    ]
    memories = [cost.memory() for cost in stages]
    return rows + [[f"memory: {part}", *(gigabytes(memory[part]) for memory in memories)] for part in memories[0]]


def print_plan(recipe: Recipe, speed: Speed | None, limit: float | None, console: Console) -> list[StageCost]:
    """Tables and notes of one recipe.

    Raises:
        UserError: a stage does not fit into ``limit`` bytes; the message names the largest part and remedies.
    """
    stages = forecast(recipe)
    console.print(_plan_table(recipe.name, stages, speed, limit))
    for line in notes(recipe, stages, speed):
        console.print(Text(line))
    for cost in stages if limit is not None else ():
        check_fits(cost, limit)  # type: ignore[arg-type]
    return stages


def _plan_table(title: str, stages: Sequence[StageCost], speed: Speed | None, limit: float | None) -> Table:
    """A column for each stage: its figures, and below them those of its parts."""
    (_, *names), *figures = zip(headings(speed, limit), *stage_rows(stages, speed, limit), strict=True)
    return table(title, ["", *names], [*figures, *part_rows(stages)])


def check_fits(cost: StageCost, limit: float) -> None:
    """Raises UserError if a stage's step needs more than ``limit`` bytes."""
    memory = cost.memory()
    if (size := sum(memory.values())) <= limit:
        return
    part = max(memory, key=memory.__getitem__)
    fits = cost.fits(limit)
    advice = f"A micro-batch of {fits} fits" if fits else "Not even one of 1 fits"
    raise UserError(
        f"stage '{cost.stage.name}' needs {gigabytes(size)} at a micro-batch of {cost.micro_batch}, but there are "
        f"{gigabytes(limit)}: the largest part is {part} ({gigabytes(memory[part])}). {advice}; less is needed with "
        "gradient_checkpointing, lora, or a smaller model"
    )


def write_plan(path: Path, recipe: Recipe, speed: Speed | None, limit: float | None) -> None:
    """One recipe as a self-contained page."""
    stages = forecast(recipe)
    bars = [
        _bar(part.replace("_", " "), [c.stage.name for c in stages], [c.flops[part] for c in stages], number)
        for number, part in enumerate(stages[0].flops)
    ]
    lead, *lines = notes(recipe, stages, speed)
    up = {"title": {"text": "FLOPs"}, "tickformat": "~s", "fixedrange": True}
    figure = plot("flops", bars, {"type": "category", "fixedrange": True}, up, 400, barmode="stack")
    flops, figures = plots(("FLOPs by stage and part", figure)), shown_table(_plan_table("", stages, speed, limit))
    sections = [
        section("", "", flops, figures),
        *(section("How to read it" if not n else "", text) for n, text in enumerate(lines)),
    ]
    write_page(path, "forecast of cost", (recipe.name, "cost of training"), lead, sections)


def _bar(name: str, x: list[str], y: list[float], index: int) -> dict[str, Any]:
    shown = {"name": name, "marker": marker(index), "hovertemplate": "%{x}: %{y:.3s}FLOP"}
    return {"type": "bar", "x": x, "y": y} | shown
