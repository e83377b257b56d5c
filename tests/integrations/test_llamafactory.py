"""LLaMA-Factory's launcher; the trainer itself is tried by hand, docs/trainers/README.md says how."""

from __future__ import annotations

import importlib.util

import pytest

from sparsight.errors import UserError
from sparsight.integrations.llamafactory import take_callback

GIVEN = {"stage": "sft", "sparsight": {"compressor": {"keep": 0.5}}}


def test_the_trainer_gets_the_rest_of_the_file():
    rest, callback = take_callback(GIVEN | {"packing": False})
    assert rest == {"stage": "sft", "packing": False} and callback.settings()["compressor"]["keep"] == 0.5


@pytest.mark.parametrize(
    "given, said",
    [
        (["--stage", "sft"], "expected a YAML or JSON file"),
        ({"stage": "sft"}, "no key 'sparsight'"),
        (GIVEN | {"sparsight": {"compressor": {"kep": 1}}}, "unknown key 'kep'"),
        (GIVEN | {"stage": "ppo"}, "stage: ppo cannot be trained"),
        (GIVEN | {"neat_packing": True}, "cannot work with neat_packing: True "),
        (GIVEN | {"use_mca": "true"}, "cannot work with use_mca: true "),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        take_callback(given)


def test_the_second_trainer_is_refused(monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    with pytest.raises(UserError, match="USE_V1: .* takes no callbacks"):
        take_callback(GIVEN)


@pytest.mark.skipif(importlib.util.find_spec("llamafactory") is not None, reason="LLaMA-Factory is installed")
def test_without_the_trainer_the_command_says_what_to_install(fresh):
    done = fresh.run("import forked; forked.module()", "sparsight.integrations.llamafactory", "x.yaml")
    assert done.returncode == 1 and "pip install llamafactory" in done.stderr.splitlines()[-1]
