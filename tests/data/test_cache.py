"""The feature cache: what is read back is what the encoder gives, and half a cache is none."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
import torch

from sparsight.data.cache import build_cache, cache_name

KEYS = [f"{number}.png" for number in range(7)]


class Encoder:
    """Two levels that depend on the picture; counts what it was asked."""

    def __init__(self) -> None:
        self.pictures: list[Hashable] = []

    def encode(self, part: Sequence[Hashable]) -> list[torch.Tensor]:
        self.pictures += part
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
    cache = build_cache(tmp_path / "c", KEYS, encoder.encode, done.append, batch_size=3)
    assert encoder.pictures == KEYS and done == [3, 6, 7]
    wanted = ["5.png", "0.png", "5.png"]
    levels = cache.read(wanted)
    assert [level.dtype for level in levels] == [torch.bfloat16] * 2
    assert all(torch.equal(found, right) for found, right in zip(levels, expected(wanted), strict=True))
    levels[0].zero_()  # a copy: nobody can spoil the cache
    assert torch.equal(cache.read(wanted)[0], expected(wanted)[0])


def test_a_complete_cache_is_used_as_it_is(tmp_path: Path, encoder: Encoder) -> None:
    build_cache(tmp_path / "c", KEYS, encoder.encode)
    again = Encoder()
    cache = build_cache(tmp_path / "c", KEYS, again.encode)
    assert again.pictures == []
    assert torch.equal(cache.read(["3.png"])[1], expected(["3.png"])[1])


def test_a_cache_that_was_cut_short_is_made_anew(tmp_path: Path, encoder: Encoder) -> None:
    def dies(part: Sequence[Hashable]) -> list[torch.Tensor]:
        if "4.png" in part:
            raise KeyboardInterrupt
        return [level * 0 - 1 for level in encoder.encode(part)]

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", KEYS, dies, batch_size=2)
    assert (tmp_path / "c" / "level0.bin").is_file() and not (tmp_path / "c" / "cache.json").exists()
    again = Encoder()
    cache = build_cache(tmp_path / "c", KEYS, again.encode, batch_size=2)
    assert again.pictures == KEYS
    assert all(torch.equal(a, b) for a, b in zip(cache.read(KEYS), expected(KEYS), strict=True))


def test_a_missing_cache_json_means_incomplete(tmp_path: Path, encoder: Encoder) -> None:
    build_cache(tmp_path / "c", KEYS, encoder.encode)
    (tmp_path / "c" / "cache.json").unlink()
    (tmp_path / "c" / "level1.bin").write_bytes(b"short")
    cache = build_cache(tmp_path / "c", KEYS, encoder.encode)
    assert encoder.pictures == KEYS * 2
    assert torch.equal(cache.read(KEYS)[1], expected(KEYS)[1])


def test_maps_of_several_sizes_are_refused(tmp_path: Path) -> None:
    def encode(part: Sequence[Hashable]) -> list[torch.Tensor]:
        return [torch.zeros(1, 2 + ("1.png" in part), 2, 3)]

    with pytest.raises(ValueError, match=r"picture '1.png' has a feature map \(3, 2, 3\), others \(2, 2, 3\)"):
        build_cache(tmp_path / "c", KEYS[:2], encode, batch_size=1)
    assert not (tmp_path / "c" / "cache.json").exists()


def test_no_gradient_is_kept(tmp_path: Path) -> None:
    weight = torch.ones(1, requires_grad=True)
    seen: list[bool] = []

    def encode(part: Sequence[Hashable]) -> list[torch.Tensor]:
        seen.append((torch.ones(len(part), 1, 1, 1) * weight).requires_grad)
        return [torch.zeros(len(part), 1, 1, 1)]

    build_cache(tmp_path / "c", KEYS[:1], encode)
    assert seen == [False]


def test_names_differ_with_what_they_are_made_of() -> None:
    assert cache_name("a") == cache_name("a") != cache_name("b")
    assert Path(cache_name("a/../b")).name == cache_name("a/../b")
