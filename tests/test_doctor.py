from __future__ import annotations

import importlib.metadata
import io
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from sparsight import assets, doctor
from sparsight.doctor import Check, check_requirement, diagnose, render


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    return {check.name: check for check in diagnose()}


def rendered(checks: list[Check], width: int) -> str:
    stream = io.StringIO()
    render(checks, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_this_machine_has_what_is_required(checks: dict[str, Check]) -> None:
    assert [check for check in checks.values() if check.status == "missing"] == []
    assert checks["torch"].status == "ok"
    assert checks["torch"].found == importlib.metadata.version("torch")
    assert checks["device"].status == "ok"
    assert "threads" in checks["device"].found or "CUDA" in checks["device"].found or "MPS" in checks["device"].found


def test_covers_packages_extras_machine_and_assets(checks: dict[str, Check]) -> None:
    expected = {"Python", "torch", "transformers", "accelerate", "pillow", "peft", "gguf", "trl", "datasets"}
    expected |= {"torchvision", "device", "memory", "disk", "git"}
    expected |= {asset.name for asset in assets.inventory()}
    assert expected <= checks.keys()
    assert "pytest" not in checks


def test_names_are_unique() -> None:
    names = [check.name for check in diagnose()]
    assert len(names) == len(set(names))


def test_every_problem_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine without any package, asset, git, memory or disk."""

    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    gone = [assets.Asset(name="weights", found=None, purpose="tests", command="make assets")]
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    monkeypatch.setattr(assets, "inventory", lambda: gone)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor, "MIN_MEMORY_GB", 1e9)
    monkeypatch.setattr(doctor, "MIN_DISK_GB", 1e9)
    monkeypatch.setattr(doctor, "MIN_PYTHON", (99, 0))
    monkeypatch.setitem(sys.modules, "torch", None)

    checks = {check.name: check for check in diagnose()}

    assert {name for name, check in checks.items() if check.status == "ok"} == {"torchvision"}
    assert all(check.remedy for check in checks.values() if check.status != "ok")
    assert {"torch", "transformers", "Python", "device"} <= {n for n, c in checks.items() if c.status == "missing"}
    assert {"peft", "git", "memory", "disk", "weights"} <= {n for n, c in checks.items() if c.status == "warning"}
    assert checks["peft"].remedy == 'pip install "sparsight[lora]"'
    assert checks["weights"].remedy.startswith("make assets, or set SPARSIGHT_ASSETS (now ")


@pytest.mark.parametrize(
    ("range_", "extra", "status"),
    [(">=2,<3", None, "ok"), (">=3", None, "missing"), (">=3", "lora", "warning"), ("<2", None, "missing")],
)
def test_version_outside_the_range_is_named(
    monkeypatch: pytest.MonkeyPatch, range_: str, extra: str | None, status: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cpu")
    check = check_requirement(Requirement(f"torch{range_}"), extra)
    assert check.status == status
    assert "2.13.0+cpu" in check.found
    assert (check.remedy is None) == (status == "ok")


@pytest.mark.parametrize("width", [20, 60, 120])
def test_render_fits_any_width(width: int) -> None:
    text = rendered(diagnose(), width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_render_shows_remedies_unchanged() -> None:
    """Square brackets are not taken for markup, and `ok` lines have no remedy to show."""
    text = rendered(
        [
            Check("peft", "warning", "not installed", 'pip install "sparsight[lora]"'),
            Check("git", "ok", "2.4"),
        ],
        60,
    )
    assert 'pip install "sparsight[lora]"' in text
    assert "None" not in text


def test_F11_a_transformers_too_old_for_composing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "composing" not in {check.name for check in diagnose()}
    monkeypatch.setattr("sparsight.compat.transformers.__version__", "5.9.0")
    (check,) = [check for check in diagnose() if check.name == "composing"]
    assert check.status == "warning" and "need >=5.10" in check.found
    assert check.remedy == 'pip install "transformers>=5.10,<6"'
