"""Mixtures: shares by weight after any number of samples, and each part's own in order."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shards import samples, write_tar
from sparsight.data.mixture import Quotas
from sparsight.data.sources import open_source
from sparsight.settings.data import MixtureData


@given(
    weights=st.lists(st.integers(1, 60), min_size=1, max_size=7), n=st.integers(0, 2000), more=st.integers(0, 10**12)
)
def test_every_part_has_had_its_share_within_one_after_any_number(weights: list[int], n: int, more: int) -> None:
    quotas = Quotas(weights)
    had = [0] * len(weights)
    for index in range(min(n, 2 * quotas.period)):
        part, rank = quotas.turn(index)
        assert rank == had[part]  # each part's own in order, none left out
        had[part] += 1
        assert quotas.counts(index + 1) == had
        assert all(
            abs(count - Fraction((index + 1) * weight, sum(weights))) < 1
            for count, weight in zip(had, weights, strict=True)
        )
    part, rank = quotas.turn(more)  # anywhere, at once
    assert quotas.counts(more)[part] == rank and sum(quotas.counts(more)) == more


def test_weights_are_what_is_written() -> None:
    assert Quotas([0.1, 0.2, 0.7]).shares == [1, 2, 7]
    assert Quotas([3, 1.5]).shares == [2, 1]
    with pytest.raises(ValueError) as caught:
        Quotas([665298, 558127])
    assert str(caught.value) == (
        "weights [665298, 558127]: in whole numbers they add up to 1,223,425, expected at most 100,000; round them"
    )


def mixture(folder: Path, *weights: float) -> MixtureData:
    """Four rows of JSON, shards with six, and scenes with three images."""
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    (folder / "a.json").write_text(json.dumps([{"id": f"r{i}", "conversations": turns} for i in range(4)]))
    write_tar(folder / "a.tar", samples(0, 6))
    parts = [
        {"kind": "json", "path": str(folder / "a.json")},
        {"kind": "shards", "path": str(folder)},
        {"kind": "scenes", "scenes": 3, "cutouts": "shapes"},
    ]
    named = [{"data": part, "weight": weight} for part, weight in zip(parts, weights, strict=True)]
    named[0]["name"] = "talk"
    return MixtureData.model_validate({"parts": named})


def test_parts_run_in_order_and_start_again(tmp_path: Path) -> None:
    source = open_source(mixture(tmp_path, 3, 2, 1), 24, 64)
    ids = [source[index].id for index in range(24)]
    assert len(source) == 24
    assert Counter(name.split("/")[0] for name in ids) == {"talk": 12, "1": 8, "2": 4}
    assert [name for name in ids if name[0] == "t"] == [f"talk/r{i % 4}" for i in range(12)]
    assert [name for name in ids if name[0] == "1"] == [f"1/{i % 6:06d}" for i in range(8)]
    assert [name for name in ids if name[0] == "2"] == [f"2/scenes/train/{i}" for i in range(4)]


def test_images_are_those_of_the_parts(tmp_path: Path) -> None:
    source = open_source(mixture(tmp_path, 1, 1, 1), 12, 64)
    sizes = {source[i].id[0]: source.image(source[i].images[0]).size for i in range(12) if source[i].images}
    assert sizes == {source[i].id[0]: source.size(source[i].images[0]) for i in range(12) if source[i].images}
    assert sizes == {"1": (8, 8), "2": (64, 64)}
    used = {key for i in range(12) for key in source[i].images}
    assert used <= source.fingerprints().keys() and len(source.fingerprints()) == 6 + 3


def test_a_part_without_samples_is_an_error(tmp_path: Path) -> None:
    data = mixture(tmp_path, 1, 1, 1)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a.json: no samples in it"):
        open_source(data, 10, 64)


def test_weights_and_parts_that_make_no_sense(tmp_path: Path) -> None:
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="weight"):
            mixture(tmp_path, weight, 1, 1)
    with pytest.raises(ValidationError, match="at least 1 item"):
        MixtureData(parts=())
