"""Whoever takes a path takes a string."""

import inspect
import typing
from pathlib import Path
from types import UnionType

import pytest

import sparsight
import sparsight.pipeline
import sparsight.reporting
from tiny import make_vlm


def public():
    """(name, function or class) of what `sparsight` exports, and of what its commands call."""
    for room in (sparsight, sparsight.modeling, sparsight.pipeline, sparsight.reporting):
        for name in room.__all__:
            if callable(member := getattr(room, name)):
                yield f"{room.__name__}.{name}", member


def takes_paths_alone(annotation):
    parts = typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return Path in parts and str not in parts


def test_F16_whoever_takes_a_path_takes_a_string():
    strict = []
    for name, member in public():
        try:
            found = typing.get_type_hints(member.__init__ if inspect.isclass(member) else member)
        except NameError:  # names that are imported for types alone
            continue
        strict += [f"{name}({key})" for key, kind in found.items() if key != "return" and takes_paths_alone(kind)]
    assert strict == []


def test_F16_a_checkpoint_is_scaled_by_names(tmp_path):
    for part in make_vlm():
        part.save_pretrained(tmp_path / "a")
    report = sparsight.scale_checkpoint(str(tmp_path / "a"), str(tmp_path / "b"), "1:4,2:4")
    assert report.tokens == (8, 20)
    assert (tmp_path / "b" / "model.safetensors").is_file()
    with pytest.raises(FileExistsError, match="exists already"):
        sparsight.scale_checkpoint(str(tmp_path / "a"), str(tmp_path / "b"))


def test_F16_a_bridge_travels_by_name(tmp_path):
    model, _ = make_vlm()
    sparsight.save_bridge(model, str(tmp_path / "bridge.safetensors"))
    sparsight.load_bridge(model, str(tmp_path / "bridge.safetensors"))


def test_F16_a_model_is_loaded_by_name(tmp_path):
    for part in make_vlm():
        part.save_pretrained(tmp_path)
    model, processor = sparsight.pipeline.files.load(str(tmp_path))
    assert processor.num_image_tokens == model.config.num_image_tokens
