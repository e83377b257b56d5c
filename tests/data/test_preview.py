"""The contact sheet: all samples have room, whatever their number of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsight import assets
from sparsight.data.preview import contact_sheet
from sparsight.data.sources import ConversationSource, SceneSource
from sparsight.settings.data import ConversationData, SceneData

CUTOUTS = ("emoji", "shapes") if assets.emoji_folder() else ("shapes",)


@pytest.mark.parametrize("cutouts", CUTOUTS)
def test_contact_sheet_has_room_for_all_tiles(cutouts: str) -> None:
    source = SceneSource(SceneData(scenes=5, cutouts=cutouts), 5)
    sheet = contact_sheet(source, n=5, columns=3)
    assert isinstance(sheet, Image.Image) and sheet.width > 3 * 256 and sheet.height > 2 * 256


def test_samples_of_none_one_and_two_images_and_any_shape(tmp_path: Path) -> None:
    for name, size, colour in (("wide", (300, 3), "red"), ("high", (3, 300), "lime"), ("big", (900, 900), "blue")):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    turns = [{"role": "user", "content": "Häuser, 猫 ?"}, {"role": "assistant", "content": "long " * 80}]
    rows = [
        {"messages": turns, "images": [f"{name}.png" for name in names]} for names in ([], ["wide", "high"], ["big"])
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    source = ConversationSource(ConversationData(path=str(tmp_path / "data.json")))
    pixels = np.asarray(contact_sheet(source, n=10, columns=2)).reshape(-1, 3)  # n is more than there are
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).any()
