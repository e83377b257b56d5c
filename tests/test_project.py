"""Promises of the package as a whole."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import sparsight
from sparsight.compat import ATTACHING

ROOT = Path(__file__).parent.parent
LIGHT = (
    "sparsight",
    "sparsight.layouts",
    "sparsight.schedules",
    "sparsight.settings.load",
    "sparsight.cost",
    "sparsight.cli",
)
HEAVY = {"torch", "transformers", "accelerate", "peft", "trl", "datasets", "plotly"}
ALWAYS_INSTALLED = {
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
    "pytest",
}


def imported_packages(module: str) -> set[str]:
    """Top-level packages that `import module` loads in a new interpreter."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("module", [name for name in LIGHT if importlib.util.find_spec(name)])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    packages = imported_packages(module)
    assert "sparsight" in packages
    assert packages & HEAVY == set()


def test_public_names_resolve() -> None:
    assert sparsight.__all__
    missing = [name for name in sparsight.__all__ if getattr(sparsight, name, None) is None]
    assert missing == []


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(sparsight, "no_such_name")


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name.lower(): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def test_installed_versions_are_the_pinned_ones() -> None:
    """What passes here is what constraints.txt says is tested. Local parts such as +cpu do not count."""
    different = {}
    for name, pinned in constraints().items():
        try:
            installed = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name in ALWAYS_INSTALLED:
                different[name] = (str(pinned), "not installed")
            continue
        if installed.public != str(pinned):
            different[name] = (str(pinned), str(installed))
    assert different == {}


@pytest.mark.xdist_group("alone")
def test_groups_of_tests_hold(request: pytest.FixtureRequest) -> None:
    """Two processes of pytest would else start the same ranks twice, and nothing would tell."""
    assert request.node.nodeid.endswith("@alone") == getattr(request.config.option, "loadgroup", False)


def test_attach_says_the_range_that_is_declared() -> None:
    assert f'"transformers{ATTACHING}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_pins_lie_within_the_declared_ranges() -> None:
    pins = constraints()
    declared = [Requirement(line) for line in importlib.metadata.requires("sparsight") or []]
    assert declared
    unpinned = [requirement.name for requirement in declared if requirement.name.lower() not in pins]
    outside = [str(r) for r in declared if r.name.lower() in pins and pins[r.name.lower()] not in r.specifier]
    assert (unpinned, outside) == ([], [])
