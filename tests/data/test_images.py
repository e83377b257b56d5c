"""Images from files: the right pixels, or a ValueError that names the file. Never another exception (R15)."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import sparsight
from sparsight.data.images import FORMATS, load_image, size_of_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def two_halves(left: tuple, right: tuple, mode: str = "RGB") -> Image.Image:
    """40 x 20, each half of one colour."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def colours(image: Image.Image) -> list[tuple]:
    assert image.mode == "RGB"
    return [image.getpixel((5, 5)), image.getpixel((image.width - 5, image.height - 5))]


def near(found: list[tuple], expected: list[tuple], within: int = 3) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= within)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "tiff", "jpg"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    two_halves(RED, BLUE).save(file, **({"lossless": True} if suffix == "webp" else {}))
    assert near(colours(load_image(file)), [RED, BLUE], within=8 if suffix == "jpg" else 0)


def test_sizes_come_from_the_header_alone(tmp_path: Path) -> None:
    for name in ("png", "bmp", "gif", "webp", "tiff", "jpg"):
        two_halves(RED, BLUE).save(tmp_path / f"a.{name}")
        assert size_of_image(tmp_path / f"a.{name}") == size_of_image((tmp_path / f"a.{name}").read_bytes()) == (40, 20)
    Image.effect_noise((200, 100), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1000])
    assert size_of_image(tmp_path / "cut.jpg") == (200, 100)
    with pytest.raises(ValueError, match="a.png: there is no such file"):
        size_of_image(tmp_path / "sub" / "a.png")
    with pytest.raises(ValueError, match="some.png: cannot be read as an image: empty"):
        size_of_image(b"", "some.png")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    two_halves((255, 0, 0, 255), (0, 0, 0, 0), "RGBA").save(tmp_path / "a.png")
    two_halves((0, 0, 255, 128), (0, 0, 0, 0), "RGBA").save(tmp_path / "half.png")
    two_halves((7, 255), (0, 0), "LA").save(tmp_path / "grey.png")
    assert colours(load_image(tmp_path / "a.png")) == [RED, WHITE]
    assert near(colours(load_image(tmp_path / "half.png")), [(127, 127, 255), WHITE])
    assert colours(load_image(tmp_path / "grey.png")) == [(7, 7, 7), WHITE]


def test_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = two_halves(RED, BLUE).quantize(4)
    blue = image.getpixel((30, 10))
    image.save(tmp_path / "a.png", transparency=blue)
    image.save(tmp_path / "a.gif", transparency=blue)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P"
    assert colours(load_image(tmp_path / "a.png")) == [RED, WHITE]
    assert colours(load_image(tmp_path / "a.gif")) == [RED, WHITE]


def test_cmyk(tmp_path: Path) -> None:
    two_halves(RED, BLUE).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.mode == "CMYK"
    assert near(colours(load_image(tmp_path / "a.jpg")), [RED, BLUE], within=8)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    found = np.asarray(load_image(tmp_path / f"a.{suffix}"))
    assert (found == np.arange(256)[None, :, None]).all()


def test_pixels_of_32_bits_are_refused(tmp_path: Path) -> None:
    """Whoever saved them knows what is white; guessing gives a black or a white image."""
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(ValueError, match=f"{name}.*32-bit"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("orientation, size, first", [(1, (40, 20), RED), (3, (40, 20), BLUE), (6, (20, 40), RED)])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, size: tuple, first: tuple) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_halves(RED, BLUE).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.size == size
    assert colours(image)[0] == first


def test_the_first_image_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 20), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert colours(load_image(tmp_path / "a.gif"))[0] == RED


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    two_halves(RED, BLUE).save(tmp_path / "a.jpg", format="PNG")
    two_halves(RED, BLUE).save(tmp_path / "noname", format="PNG")
    for name in ("a.jpg", "noname"):
        assert colours(load_image(tmp_path / name)) == [RED, BLUE]


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of Ghostscript's name that tells, by this file, that it was run."""
    (tmp_path / "bin").mkdir()
    program, told = tmp_path / "bin" / "gs", tmp_path / "told"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo run >> "{told}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once in a process
    return told


def eps(file: Path) -> Path:
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 20\n%%EndComments\nshowpage\n%%EOF\n")
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind, most", [("RGB", 4), ("L", 5), ("RGBA", 16)])
def test_D12_a_large_image_takes_as_many_bytes_as_documented(tmp_path: Path, kind: str, most: int) -> None:
    """At its peak; 149 megapixels took 12 a pixel, three times as many."""
    pixels = 16_000_000
    Image.new(kind, (4000, pixels // 4000)).save(tmp_path / "a.png", compress_level=1)
    script = "import sys; from sparsight.data.images import load_image\n"
    script += (
        "high = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
    )
    script += "before = high(); load_image(sys.argv[1]); print(high() - before)"
    command = [sys.executable, "-c", script, str(tmp_path / "a.png")]
    found = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found < (most + 0.5) * pixels, found / pixels


def test_D10_no_program_is_run_on_an_image(tmp_path: Path, ghostscript: Path) -> None:
    file = eps(tmp_path / "a.png")
    with Image.open(file) as opened, suppress(Exception):
        opened.load()
    assert ghostscript.exists()  # so Pillow does when it is not told what to open
    ghostscript.unlink()
    with Image.open(file) as opened:
        for source in (file, str(file), file.read_bytes(), opened):
            with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image: .*no format that is known"):
                load_image(source, "a.png")
    for stored in (file, file.read_bytes()):
        with pytest.raises(ValueError, match="no format that is known"):
            size_of_image(stored)
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", ["PDF", "PCX", "SGI", "IM", "XBM", "MSP", "DDS"])
def test_D10_formats_that_are_not_listed_are_refused(tmp_path: Path, kind: str) -> None:
    Image.new("1" if kind in ("XBM", "MSP") else "RGB", (40, 20)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(ValueError, match="no format that is known"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", FORMATS)
def test_D10_formats_that_are_listed_are_opened(tmp_path: Path, kind: str) -> None:
    two_halves(RED, BLUE).resize((64, 32)).save(tmp_path / "a", format=kind)
    image = load_image(tmp_path / "a")
    assert image.width == 2 * image.height or kind == "ICO"
    with Image.open(tmp_path / "a") as opened:
        assert load_image(opened).tobytes() == image.tobytes()


def test_D10_images_with_several_in_one_file_are_opened(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 20), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO" and near(colours(load_image(opened)), [RED, RED])
    assert near(colours(load_image(tmp_path / "a.jpg")), [RED, RED])


def test_D10_every_image_is_opened_with_a_list_of_formats() -> None:
    found = []
    for file in Path(sparsight.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("Image.open", "PIL.Image.open"):
                found.append((file.name, any(keyword.arg == "formats" for keyword in call.keywords)))
    assert found and all(listed for _, listed in found), found


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == RED


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "folder.jpg").mkdir()
    for name, why in (
        ("empty.jpg", "cannot"),
        ("page.jpg", "cannot"),
        ("folder.jpg", "cannot"),
        ("gone.jpg", "no such"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{why}"):
            load_image(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_halves(RED, BLUE).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(ValueError, match="bomb.png"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_broken_file_is_refused_wherever_it_is_broken(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(stream, kind)
    whole, file = stream.getvalue(), tmp_path / "broken.jpg"
    for length in range(1, len(whole) - 20, 29):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="broken.jpg"):
            load_image(file)
    for _ in range(60):  # with wrong bytes in it, a file may still be an image; it may not raise anything else
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        with suppress(ValueError):
            assert load_image(file).mode == "RGB"
