"""What scaling costs a trained model at once: its loss before and after, against a fresh bridge of the same layout.

    python benchmarks/scaling.py runs/demo/sparsight/pretrain/model cos-144:256 cos-336-from-32:256 cos-528-from-32:512

Each target is a layout and an image size. The loss is that of validation conversations (scenes of the model's own
recipe, all its tasks), before any training step; then the model is trained on for a few steps from each start.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from common import write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.sources import SceneSource
from sparsight.modeling.scaling import scale_tokens
from sparsight.pipeline import RECIPE_FILE, autocast, load
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Recipe


def losses(
    model: Any, processor: Any, data: SceneData, items: int, steps: int, batch: int, rate: float
) -> dict[str, Any]:
    """Mean validation loss a label, and the training loss of some steps from there."""
    collate = Collator(processor.tokenizer.pad_token_id)

    def batches(split: str, count: int) -> Any:
        source = SceneSource(data, count, split, model.config.image_size)
        encoded = TrainingSet(source, processor, count)
        for start in range(0, count, batch):
            yield collate([encoded[index] for index in range(start, min(start + batch, count))])

    total, labels = 0.0, 0
    with torch.no_grad(), autocast("auto", model.device):
        for inputs in batches("validation", items):
            count = int((inputs["labels"][:, 1:] != -100).sum())
            total += float(model.eval()(**inputs, loss_only=True).loss) * count
            labels += count
    course = []
    trained = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for inputs in batches("train", steps * batch):
        with autocast("auto", model.device):
            loss = model.train()(**inputs, loss_only=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        course.append(loss.item())
    return {"validation_loss": total / labels, "training_loss": course}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("targets", nargs="+", help="LAYOUT:SIDE, such as cos-336-from-32:256")
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console()
    recipe = Recipe.model_validate_json((options.checkpoint / RECIPE_FILE).read_text(encoding="utf-8"))
    if not isinstance(recipe.data, SceneData):
        raise SystemExit(f"{options.checkpoint} was not trained on scenes")
    cost = options.items, options.steps, options.batch, options.rate
    rows = []
    for target in track(["as it is", *options.targets], "scaling", console=console):
        for start in ("scaled", "fresh bridge"):
            model, processor = load(options.checkpoint)
            for parameter in model.model.vision_tower.parameters():
                parameter.requires_grad_(False)
            if target != "as it is":
                layout, side = target.rsplit(":", 1)
                scale_tokens(model, processor, layout, int(side))
            if start == "fresh bridge":
                torch.manual_seed(0)
                model.model.multi_modal_projector = copy.deepcopy(model.model.multi_modal_projector)
                model.model.multi_modal_projector.reset_parameters()
            row = {"target": target, "start": start, "tokens": model.config.num_image_tokens}
            rows.append(row | losses(model, processor, recipe.data, *cost))
    table = Table(title="loss at once, and after a few steps", title_justify="left")
    for column in ("bridge", "start", "tokens", "validation loss", f"training loss, step {options.steps}"):
        table.add_column(column)
    for row in rows:
        values = f"{row['validation_loss']:.3f}", f"{row['training_loss'][-1]:.3f}"
        table.add_row(row["target"], row["start"], str(row["tokens"]), *values)
    console.print(table)
    result = {"rows": rows, "recipe": recipe.model_dump(mode="json")}
    result["config"] = {key: str(value) for key, value in vars(options).items()}
    write_result("scaling", result, options.out, console)


if __name__ == "__main__":
    main()
