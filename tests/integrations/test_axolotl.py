"""Axolotl's plug-in; the trainer itself is tried by hand, docs/trainers/README.md says how."""

from __future__ import annotations

import importlib.util

import pytest
from pydantic import ValidationError

from sparsight.errors import UserError
from sparsight.integrations.axolotl import SparsightArgs, SparsightPlugin


def test_the_plugin_names_its_schema_and_makes_the_callback():
    assert SparsightPlugin().get_input_args() == "sparsight.integrations.axolotl.SparsightArgs"
    args = SparsightArgs(sparsight={"compressor": {"keep": 0.5}, "skipper": {"alpha": 0.2}}).model_dump()
    (callback,) = SparsightPlugin().add_callbacks_pre_trainer({"micro_batch_size": 1, **args}, None)
    settings = callback.settings()
    assert (settings["compressor"]["keep"], settings["skipper"]["alpha"]) == (0.5, 0.2)


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "sparsight\n  Field required"),
        ({"sparsight": {"compressor": {"kep": 1}}}, "unknown key 'kep' in CompressorConfig; did you mean 'keep'"),
        ({"sparsight": {"compressor": {"keep": 2}}}, "sparsight: compressor.keep: "),
        ({"sparsight": {}}, "nothing to attach"),
    ],
)
def test_the_schema_names_what_is_wrong(given, said):
    with pytest.raises(ValidationError, match=said):
        SparsightArgs(**given)


@pytest.mark.parametrize("key, value, fine", [("sample_packing", True, False), ("context_parallel_size", 2, 1)])
def test_packed_and_split_sequences_are_refused(key, value, fine):
    plugin, methods = SparsightPlugin(), {"compressor": {"keep": 0.5}}
    with pytest.raises(UserError, match=f"sparsight.compressor cannot work with {key}: {value} "):
        plugin.add_callbacks_pre_trainer({"sparsight": methods, key: value}, None)
    for cfg in ({"sparsight": methods, key: fine}, {"sparsight": {"skipper": {}}, key: value}):
        assert plugin.add_callbacks_pre_trainer(cfg, None)


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="Axolotl is not installed")
def test_axolotl_takes_the_class_for_a_plugin():
    from axolotl.integrations.base import BasePlugin, load_plugin

    assert isinstance(load_plugin("sparsight.integrations.axolotl.SparsightPlugin"), BasePlugin)
