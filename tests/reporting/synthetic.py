"""Two runs that look like real ones: logs written by the writer, with figures made from a seed."""

import base64
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sparsight.reporting import RunLog

TASKS = {
    "caption": 0.0,
    "existence": 0.5,
    "count": 0.2,
    "naming": 0.1,
    "position": 0.25,
    "text": 0.0,
    "grounding": 0.05,
}
STANDARD = dict(zip(TASKS, (0.712, 0.93, 0.735, 0.88, 0.69, 0.61, 0.55), strict=True))
OURS = dict(zip(TASKS, (0.708, 0.945, 0.705, 0.885, 0.70, 0.56, 0.56), strict=True))
ENVIRONMENT = {
    "time": "2026-11-21T08:00:00+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"cpu": "Test CPU", "cores": 8, "threads": 8, "memory_bytes": 2**35, "gpus": []},
    "platform": "Linux",
}
QUESTIONS = [
    ("count", "How many red circles are there?", "3", "3", "2"),
    ("naming", "What is the shape at the bottom right?", "blue square", "Blue square.", "blue square"),
    ("text", "Which word is written on the sign?", "HARBOR", "HARBOR", "HARBUR"),
    ("position", "Is the triangle left or right of the star?", "left", "right", "left"),
    ("existence", "Is there a green circle?", "yes", "yes", "yes"),
    ("caption", "Describe the image.", "Three red circles above a blue square on a pale ground.",
     "Three red circles and a blue square.", "Two red circles and a blue square."),
    ("grounding", "Where is the yellow star?", "top left", "top left", "top left"),
    ("count", "How many shapes are there in all?", "7", "6", "7"),
]  # fmt: skip


def make_image(seed: int) -> str:
    """A small image of shapes, as base64 of its PNG."""
    draw_from = random.Random(seed)
    image = Image.new("RGB", (160, 120), (244, 240, 230))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, size = draw_from.randint(0, 130), draw_from.randint(0, 90), draw_from.randint(14, 34)
        colour = draw_from.choice([(214, 69, 65), (52, 106, 191), (62, 142, 90), (240, 186, 66)])
        shape = draw_from.choice([pen.ellipse, pen.rectangle])
        shape((x, y, x + size, y + size), fill=colour)
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_run(folder: Path, name: str, steps: int = 60, **header: Any) -> Path:
    """Write `run.jsonl` of a run; "standard" is slow and sees many tokens, any other is quick."""
    standard = name == "standard"
    rng = random.Random(name)
    layouts = {"pretrain": ("16:1", 256), "finetune": ("16:1", 256)}
    if not standard:
        layouts = {"pretrain": ("1:16,4:1", 32), "finetune": ("1:16,4:4,16:1", 336)}
    fields = {"version": 1, "run": name, "environment": ENVIRONMENT, "samples_hash": "5f1e"}
    with RunLog(folder / "run.jsonl") as log:
        recipe = {"seed": 0, "stages": [{"name": stage} for stage in layouts], "evaluation": {"kind": "scenes"}}
        log.write("header", **(fields | {"recipe": recipe} | header))
        for stage, (layout, tokens) in layouts.items():
            shape = {"layout": layout, "visual_tokens": tokens, "image_size": 256}
            sizes = {"samples": 16 * steps, "steps": steps, "trainable_parameters": 10, "total_parameters": 90}
            bridge = "mlp" if standard else "chain_of_sight"
            log.write("stage", stage=stage, bridge=bridge, trains={"bridge": 10}, **shape, **sizes)
            records = list(make_steps(rng, stage, tokens, steps, standard))
            for record in records:
                log.write("step", **record)
            seconds = sum(sum(record["seconds"].values()) for record in records) + 2
            flops = sum(record["flops"] for record in records)
            log.write("stage_end", stage=stage, seconds=seconds, executed_flops=flops, samples=16 * steps)
        control = {task: chance + 0.07 + rng.uniform(0, 0.1) for task, chance in TASKS.items()}
        scores = {"scores": STANDARD if standard else OURS, "shuffled": control, "chance": TASKS}
        log.write("eval", checkpoint="finetune", items=dict.fromkeys(TASKS, 400), seconds=12.0, **scores)
        for index, (task, question, truth, theirs, ours) in enumerate(QUESTIONS):
            texts = {"id": f"scenes/{index}", "task": task, "question": question, "truth": truth}
            log.write("example", **texts, answer=theirs if standard else ours, image_png_base64=make_image(index))
    return folder


def write_points(
    folder: Path, better: float = 0.0, items: int = 60, grades: dict[str, Any] | None = None, **questions: str
) -> Path:
    """Add each item's points to a run's log: of images that all tasks share, some easy and some hard for any run."""
    rng = random.Random(str(better))
    hard = [random.Random(number).random() for number in range(items)]
    points = {task: [float(0.3 * rng.random() + 0.7 * (1 - each) + better > 0.5) for each in hard] for task in TASKS}
    with RunLog(folder / "run.jsonl", append=True) as log:
        log.write(
            "eval",
            checkpoint="finetune",
            scores={task: sum(own) / items for task, own in points.items()},
            items=dict.fromkeys(TASKS, items),
            points=points,
            images={task: list(range(items)) for task in TASKS},
            questions=dict.fromkeys(TASKS, "a1b2") | questions,
            **({} if grades is None else {"grades": dict.fromkeys(TASKS, grades)}),
        )
    return folder


def make_steps(rng: random.Random, stage: str, tokens: int, steps: int, standard: bool) -> Iterator[dict[str, Any]]:
    """Step records whose cost grows with the tokens and whose loss falls."""
    start, end = (4.3, 0.9) if stage == "pretrain" else (2.2, 0.7)
    cost = (tokens + 90) / 346 * (1 if standard or stage == "pretrain" else 0.6)
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-3 * step / steps) + rng.gauss(0, 0.09)
        yield {
            "stage": stage,
            "step": step,
            "loss": loss,
            "learning_rate": 4e-4,
            "samples": 16,
            "text_tokens": 1500,
            "visual_tokens": 16 * tokens,
            "padding_tokens": 100,
            "layers_run": 6,
            "layers": 6,
            "seconds": {"data": 0.02, "compute": 1.1 * cost * rng.uniform(0.95, 1.1), "optimizer": 0.05},
            "flops": 4.1e12 * cost,
            "memory_bytes": 10**9 + step,
        }
