"""The feature cache: what is read back is what the encoder gives, and half a cache is none."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
import torch

from sparsight.data.cache import build_cache, image_rows, remove_caches

KEYS = [f"{number}.png" for number in range(7)]
ROWS = {key: row for row, key in enumerate(KEYS)}


class Encoder:
    """Two levels that depend on the image; counts what it was asked."""

    def __init__(self) -> None:
        self.images: list[Hashable] = []

    def encode(self, part: Sequence[Hashable]) -> list[torch.Tensor]:
        self.images += part
        number = torch.tensor([float(str(key).removesuffix(".png")) for key in part])[:, None, None, None]
        return [number + torch.linspace(0, 1, 2 * 2 * width).view(2, 2, width) for width in (3, 5)]


def expected(keys: Sequence[str]) -> list[torch.Tensor]:
    encoder = Encoder()
    return [level.to(torch.bfloat16) for level in encoder.encode(keys)]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_readback_is_the_encoders_output_in_bf16(tmp_path: Path, encoder: Encoder) -> None:
    done: list[int] = []
    cache = build_cache(tmp_path / "c", ROWS, encoder.encode, done.append, batch_size=3)
    assert encoder.images == KEYS and done == [3, 6, 7]
    wanted = ["5.png", "0.png", "5.png"]
    levels = cache.read(wanted)
    assert [level.dtype for level in levels] == [torch.bfloat16] * 2
    assert all(torch.equal(found, right) for found, right in zip(levels, expected(wanted), strict=True))
    levels[0].zero_()  # a copy: nobody can spoil the cache
    assert torch.equal(cache.read(wanted)[0], expected(wanted)[0])


def test_a_complete_cache_is_used_as_it_is(tmp_path: Path, encoder: Encoder) -> None:
    build_cache(tmp_path / "c", ROWS, encoder.encode)
    again = Encoder()
    cache = build_cache(tmp_path / "c", ROWS, again.encode)
    assert again.images == []
    assert torch.equal(cache.read(["3.png"])[1], expected(["3.png"])[1])


@pytest.mark.parametrize("file, content", [("cache.json", "{"), ("cache.json", "{}"), ("level1.bin", "x")])
def test_F05_a_damaged_cache_is_moved_aside_and_made_anew(
    tmp_path: Path, encoder: Encoder, file: str, content: str
) -> None:
    build_cache(tmp_path / "c", ROWS, encoder.encode)
    (tmp_path / "c" / file).write_text(content)
    said: list[str] = []
    cache = build_cache(tmp_path / "c", ROWS, encoder.encode, tell=said.append)
    assert torch.equal(cache.read(["3.png"])[1], expected(["3.png"])[1])
    assert (tmp_path / "damaged-c" / file).read_text() == content
    assert len(said) == 1 and f"{tmp_path / 'c'}: damaged: " in said[0] and str(tmp_path / "damaged-c") in said[0]


@pytest.mark.parametrize("level, at", [(0, 40), (1, 70)])
def test_D12_blocks_that_a_disk_lost_are_noticed(tmp_path: Path, encoder: Encoder, level: int, at: int) -> None:
    """In the image that is read, in either level; the next one to ask encodes anew, and nothing is deleted."""
    cache = build_cache(tmp_path / "c", ROWS, encoder.encode)
    file = tmp_path / "c" / f"level{level}.bin"
    content = bytearray(file.read_bytes())
    content[at : at + 8] = bytes(8)
    file.write_bytes(content)
    cache = build_cache(tmp_path / "c", ROWS, encoder.encode)
    cache.read(["0.png"])
    image = KEYS[at // (len(content) // len(KEYS))]
    with pytest.raises(ValueError, match=f"damaged: image '{image}' is not as it was written"):
        cache.read(KEYS)
    assert (tmp_path / "damaged-c" / file.name).read_bytes() == content
    again = build_cache(tmp_path / "c", ROWS, encoder.encode)
    assert all(torch.equal(a, b) for a, b in zip(again.read(KEYS), expected(KEYS), strict=True))


def test_D12_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path, encoder: Encoder) -> None:
    """A memory map would be killed by SIGBUS."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")

    def encode(part: Sequence[Hashable]) -> list[torch.Tensor]:
        (folder,) = tmp_path.glob("c.*.partial")
        for number in range(2):
            (folder / f"level{number}.bin").unlink(missing_ok=True)
            (folder / f"level{number}.bin").symlink_to("/dev/full")
        return encoder.encode(part)

    with pytest.raises(OSError, match="No space left"):
        build_cache(tmp_path / "c", ROWS, encode)
    assert not list(tmp_path.iterdir())


def test_D12_a_cache_is_on_the_disk(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(os.fstat(number).st_ino), fsync(number)))
    build_cache(tmp_path / "c", ROWS, encoder.encode)
    assert {file.stat().st_ino for file in (tmp_path / "c").iterdir()} <= set(seen)


def test_F05_what_is_no_cache_is_not_removed(tmp_path: Path, encoder: Encoder) -> None:
    build_cache(tmp_path / "caches" / ("0" * 16), ROWS, encoder.encode)
    mine = [tmp_path / "caches" / name / "cache.json" for name in ("own", "1" * 16)]
    for file in (*mine, mine[1].with_name("notes.txt")):
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    remove_caches(tmp_path / "caches")
    assert sorted(path.name for path in (tmp_path / "caches").iterdir()) == ["1" * 16, "own"]
    build_cache(tmp_path / "other" / ("0" * 16), ROWS, encoder.encode)
    remove_caches(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_cache_that_was_cut_short_is_made_anew(tmp_path: Path, encoder: Encoder) -> None:
    def dies(part: Sequence[Hashable]) -> list[torch.Tensor]:
        if "4.png" in part:
            raise KeyboardInterrupt
        return [level * 0 - 1 for level in encoder.encode(part)]

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", ROWS, dies, batch_size=2)
    assert not list(tmp_path.iterdir())
    again = Encoder()
    cache = build_cache(tmp_path / "c", ROWS, again.encode, batch_size=2)
    assert again.images == KEYS
    assert all(torch.equal(a, b) for a, b in zip(cache.read(KEYS), expected(KEYS), strict=True))


def test_processes_that_build_at_once_both_read_the_whole(tmp_path: Path, encoder: Encoder) -> None:
    """The second one begins and ends while the first one encodes."""

    def slow(part: Sequence[Hashable]) -> list[torch.Tensor]:
        if "6.png" in part:
            build_cache(tmp_path / "c", ROWS, encoder.encode)
        return encoder.encode(part)

    cache = build_cache(tmp_path / "c", ROWS, slow, batch_size=2)
    assert encoder.images == KEYS[:6] + KEYS + KEYS[6:]
    assert all(torch.equal(a, b) for a, b in zip(cache.read(KEYS), expected(KEYS), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_same_image_under_two_names_is_encoded_once(tmp_path: Path, encoder: Encoder) -> None:
    same = {"0.png": "a", "1.png": "b", "2.png": "a"}
    rows, name = image_rows(same)
    assert rows == {"0.png": 0, "1.png": 1, "2.png": 0}
    cache = build_cache(tmp_path / "c", rows, encoder.encode)
    assert encoder.images == ["0.png", "1.png"]
    assert torch.equal(cache.read(["2.png"])[0], expected(["0.png"])[0])
    assert name == image_rows({"x": "a", "y": "b"})[1]
    assert name != image_rows({"x": "a", "y": "c"})[1]


def test_maps_of_several_sizes_are_refused(tmp_path: Path) -> None:
    def encode(part: Sequence[Hashable]) -> list[torch.Tensor]:
        return [torch.zeros(1, 2 + ("1.png" in part), 2, 3)]

    with pytest.raises(ValueError, match=r"image '1.png' has a feature map \(3, 2, 3\), others \(2, 2, 3\)"):
        build_cache(tmp_path / "c", {"0.png": 0, "1.png": 1}, encode, batch_size=1)
    assert not list(tmp_path.iterdir())


def test_no_gradient_is_kept(tmp_path: Path) -> None:
    weight = torch.ones(1, requires_grad=True)
    seen: list[bool] = []

    def encode(part: Sequence[Hashable]) -> list[torch.Tensor]:
        seen.append((torch.ones(len(part), 1, 1, 1) * weight).requires_grad)
        return [torch.zeros(len(part), 1, 1, 1)]

    build_cache(tmp_path / "c", {"0.png": 0}, encode)
    assert seen == [False]
