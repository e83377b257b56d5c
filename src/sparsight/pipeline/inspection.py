"""`sparsight inspect`: a model's windows, and where its queries look."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sparsight.data.images import load_image
from sparsight.data.sources import scene_config
from sparsight.errors import UserError
from sparsight.modeling.configuration import SparsightConfig
from sparsight.modeling.folders import model_type
from sparsight.pipeline.files import load, own_scenes
from sparsight.reporting import write_inspection
from sparsight.scenes.questions import ScenesDataset


def inspect_checkpoint(folder: str | Path, image: str | Path | None, out: str | Path, console: Console) -> Path:
    """Draw a model's windows over an image, and where each query looks: a PNG for each scale, and one page.

    Args:
        image: a scene of the model's own recipe if not given (of the embedded ones if it was trained on other data).

    Returns:
        The page.

    Raises:
        UserError: no model in ``folder``, one without queries, or no image in ``image``.
    """
    if (kind := model_type(Path(folder))) not in (None, SparsightConfig.model_type):
        raise UserError(
            f"{folder}: inspect draws where a bridge's queries look; it needs a model of Sparsight with a bridge of "
            f"kind resampler or chain_of_sight, found one of type '{kind}'. `sparsight analyze` looks into any "
            "vision-language model"
        )
    model, processor = load(folder)
    name = Path(image).name if image else "scene 0 of the test split"
    shown = load_image(image) if image else ScenesDataset(scene_config(own_scenes(folder)), "test", 1).image(0)
    pixels = processor.pixels([shown])
    looks = {scale: maps[0].numpy() for scale, maps in model.model.attention_maps(**pixels).items()}
    if "image_grid_thw" in pixels:  # else maps are as large as the image
        _, rows, columns = pixels["image_grid_thw"][0].tolist()
        looks = {scale: maps[:, :rows, :columns] for scale, maps in looks.items()}
    page = write_inspection(shown, looks, f"{folder}: {name}", out)
    console.print(f"wrote [bold]{page}[/] and {len(looks)} images beside it")
    return page
