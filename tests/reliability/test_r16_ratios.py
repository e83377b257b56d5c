"""R16: extreme aspect ratios, in every way of resizing; and what each way does, beside the encoders' own processors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from small_runs import save_encoder
from sparsight.modeling.build import build_processor, set_image_size
from sparsight.modeling.processing import SparsightProcessor, resize_mode
from sparsight.modeling.scaling import scale_tokens
from tiny import ask, make_language, make_vlm

SIDE = 64
SIZES = [(1, 1), (1, 227), (227, 1), (2270, 10), (10, 2270), (3, 3), (640, 3), (1, 20_000), (20_000, 1), (99, 100)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(image_processor: Any, resize: str | None = None, side: int = SIDE) -> SparsightProcessor:
    set_image_size(image_processor, side, resize)
    tokenizer = make_language()[1]
    return SparsightProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


@pytest.mark.parametrize("cls", [CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil])
@pytest.mark.parametrize("resize", ["square", "pad", "crop"])
@pytest.mark.parametrize("side", [SIDE, 336])
def test_extreme_ratios_give_squares_without_a_warning(cls: Any, resize: str, side: int) -> None:
    own = processor(cls(), resize, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in SIZES:
            pixels = own.pixels([noise(*size)])["pixel_values"]
            assert pixels.shape == (1, 3, side, side) and torch.isfinite(pixels).all()
        assert ask(own, noise(227, 1), "What?")["pixel_values"].shape == (1, 3, side, side)  # and as users call it


def test_extreme_ratios_in_native_resolution() -> None:
    own = processor(Qwen2VLImageProcessorPil())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in SIZES:
            batch = own.pixels([noise(*size)])
            assert batch["image_grid_thw"].prod() == len(batch["pixel_values"]) == own.patches(*size)


def test_crop_is_what_clips_own_processor_does() -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    for size in [size for size in SIZES if max(size) < 20_000]:
        image = noise(*size)
        assert torch.equal(
            processor(CLIPImageProcessorPil(), "crop").pixels([image])["pixel_values"],
            clip([image], return_tensors="pt")["pixel_values"],
        )


def test_square_is_what_siglips_own_processor_does() -> None:
    siglip = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    for size in SIZES:
        image = noise(*size)
        for resize in (None, "square"):
            assert torch.equal(
                processor(SiglipImageProcessorPil(), resize).pixels([image])["pixel_values"],
                siglip([image], return_tensors="pt")["pixel_values"],
            )


@pytest.mark.parametrize("cls", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_pad_keeps_the_shape_and_fills_with_the_mean(cls: Any) -> None:
    image = noise(200, 100)
    pixels = processor(cls(), "pad").pixels([image])["pixel_values"][0]
    small = cls(size={"height": SIDE // 2, "width": SIDE}, do_center_crop=False)
    assert torch.equal(pixels[:, : SIDE // 2], small([image], return_tensors="pt")["pixel_values"][0])
    assert (pixels[:, SIDE // 2 :] == 0).all()  # normalised: the mean colour
    standing = processor(cls(), "pad").pixels([noise(100, 200)])["pixel_values"][0]
    assert (standing[:, :, SIDE // 2 :] == 0).all() and (standing[:, :, : SIDE // 2] != 0).any()


def test_crop_of_a_image_too_thin_to_enlarge_takes_its_middle() -> None:
    image = Image.new("RGB", (20_000, 1), "red")
    image.paste((0, 0, 255), (9_990, 0, 10_010, 1))
    pixels = processor(ViTImageProcessorPil(), "crop").pixels([image])["pixel_values"][0]
    assert (pixels[2] > 0.99).all() and (pixels[0] < -0.99).all()


@pytest.mark.parametrize("resize", ["pad", "crop", "square"])
def test_the_way_travels_with_the_processor(tmp_path: Path, resize: str) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    language, tokenizer = make_language()
    model, own = make_vlm(vision=str(encoder), language=language, tokenizer=tokenizer, resize=resize, image_size=SIDE)
    own.save_pretrained(tmp_path / "saved")
    back = SparsightProcessor.from_pretrained(tmp_path / "saved")
    plain = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    image = noise(90, 40)
    expected = own.pixels([image])["pixel_values"]
    assert torch.equal(back.pixels([image])["pixel_values"], expected)
    assert torch.equal(plain([image], return_tensors="pt")["pixel_values"], expected)
    scale_tokens(model, own, image_size=2 * SIDE)
    assert resize_mode(own.image_processor) == resize
    assert own.pixels([image])["pixel_values"].shape[2:] == (2 * SIDE, 2 * SIDE)


def test_the_processor_alone_is_the_one_that_build_makes(tmp_path: Path) -> None:
    encoder = str(save_encoder(tmp_path / "encoder"))
    language, tokenizer = make_language()
    built = make_vlm(vision=encoder, language=language, tokenizer=tokenizer, resize="pad")[1]
    bridge = {"kind": "chain_of_sight", "layout": "1:4,2:1", "width": 32, "heads": 2}
    alone = build_processor(encoder, make_language()[1], bridge, resize="pad")
    assert alone.to_dict() == built.to_dict()
    assert alone.image_processor.to_dict() == built.image_processor.to_dict()


def test_what_an_encoder_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="resize: keep: CLIP.* squares alone: use square, pad or crop"):
        set_image_size(CLIPImageProcessorPil(), SIDE, "keep")
    with pytest.raises(ValueError, match="resize: pad: Qwen2VL.* images of any shape: use keep"):
        set_image_size(Qwen2VLImageProcessorPil(), SIDE, "pad")
    with pytest.raises(ValueError, match="resize: .*: ConvNext"):
        set_image_size(ConvNextImageProcessorPil(), SIDE, "pad")
