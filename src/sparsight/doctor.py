"""What is installed here, what is missing, and how to mend it.

The version ranges are read from the metadata of the installed package: only `pyproject.toml` states them.
What the library cannot run without is "missing" when absent; what only some commands need is a "warning".
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsight.devices.peaks import cpu_bf16
from sparsight.errors import UserError
from sparsight.safety import MANIFEST, faults

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

Status = Literal["ok", "warning", "missing", "damaged"]

MIN_PYTHON = (3, 11)
MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 5.0
# Extras that only developers of Sparsight itself need are not reported.
HIDDEN_EXTRAS = frozenset({"dev"})


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. `remedy` is a command or a sentence, None only where status is "ok"."""

    name: str
    status: Status
    found: str
    remedy: str | None = None


def diagnose() -> list[Check]:
    """Look at Python, packages, the device, memory, disk and assets. Downloads and changes nothing."""
    machine = [*_composing(), _torchvision(), _device(), _memory(), _disk(Path.cwd()), _git()]
    return [_python(), *_packages(), *machine, *_assets()]


def examine(folder: Path) -> list[Check]:
    """Whether the files of a saved model, a checkpoint, or of all of them in a run, are as they were saved.

    Raises:
        UserError: no folder there with anything that was saved.
    """
    # A model's or a checkpoint's folder has one of the first two, whatever is missing.
    marks = (MANIFEST, "config.json", "trainer_state.json")
    saved = sorted({path.parent for mark in marks for path in folder.rglob(mark)})
    if not saved:
        raise UserError(f"{folder}: expected the folder of a model, of a checkpoint or of a run, found nothing saved")
    checks = []
    for each in saved:
        if not (each / MANIFEST).exists():
            text = "no manifest: cut short while it was written, or written without one, so its files cannot be checked"
            checks.append(Check(str(each), "warning", text, "Get it anew, or look at what it says when it is loaded."))
            continue
        remedy = "Get this file anew; in a run, --resume goes on from the last whole checkpoint."
        wrong = [Check(str(each / name), "damaged", text, remedy) for name, text in faults(each).items()]
        checks += wrong or [Check(str(each), "ok", "all files are as they were saved")]
    return checks


def render(checks: list[Check], console: Console) -> None:
    """Print the checks as a table, and below it the remedies, each on a line of its own to be copied."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "missing": "bold red", "damaged": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    for check in checks:
        # Text, not str: "sparsight[lora]" would be read as markup.
        table.add_row(Text(check.status, style=styles[check.status]), Text(check.name), Text(check.found))
    console.print(table)
    for check in checks:
        if check.status != "ok":
            console.print()
            console.print(Text(f"{check.name}: {check.found}", style=styles[check.status]))
            console.print(Text(f"  {check.remedy}"))


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] >= MIN_PYTHON:
        return Check("Python", "ok", found)
    return Check("Python", "missing", found, f"Install Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer.")


def _packages() -> Iterator[Check]:
    """One check for each dependency, then for each extra, in the order of `pyproject.toml`."""
    try:
        lines = importlib.metadata.requires("sparsight") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("sparsight", "missing", "not installed, only on the path", "pip install -e .")
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield check_requirement(requirement, extra=None)
            continue
        extras = importlib.metadata.metadata("sparsight").get_all("Provides-Extra") or []
        for extra in extras:
            if extra not in HIDDEN_EXTRAS and marker.evaluate({"extra": extra}):
                yield check_requirement(requirement, extra)


def check_requirement(requirement: Requirement, extra: str | None) -> Check:
    """Compare the installed version with the range; outside an extra, what does not fit is "missing"."""
    name, wanted = requirement.name, str(requirement.specifier)
    failed: Status = "warning" if extra else "missing"
    remedy = f'pip install "sparsight[{extra}]"' if extra else f'pip install "{name}{wanted}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, failed, "not installed" + (f" (optional: {extra})" if extra else ""), remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, failed, f"{version}, but {wanted} is needed", remedy)
    return Check(name, "ok", version)


def _composing() -> Iterator[Check]:
    """One line where transformers is new enough for attach, which `_packages` checks, but not for composed models."""
    try:
        from sparsight.compat import COMPOSING, check_composing

        check_composing()
    except ModuleNotFoundError:  # `_packages` says so
        return
    except ImportError:
        found = importlib.metadata.version("transformers")
        text = f"transformers {found} runs attach alone; composing and training by recipes need {COMPOSING}"
        yield Check("composing", "warning", text, f'pip install "transformers{COMPOSING}"')


def _torchvision() -> Check:
    try:
        return Check("torchvision", "ok", f"{importlib.metadata.version('torchvision')} (not needed)")
    except importlib.metadata.PackageNotFoundError:
        return Check("torchvision", "ok", "not installed (not needed)")


def _device() -> Check:
    """The device that training would run on, and whether it is fast in bfloat16."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        return Check("device", "missing", f"torch cannot be imported: {error}", "pip install --force-reinstall torch")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{d.name} ({_gb(d.total_memory):.0f} GB)" for d in devices)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        return Check("device", "ok", f"CUDA {torch.version.cuda}: {names}, {bf16}")
    if torch.backends.mps.is_available():
        return Check("device", "ok", "Apple GPU (MPS)")
    fast = " and ".join(cpu_bf16())
    bf16 = f"{fast}: bfloat16 is fast" if fast else "no bfloat16 instructions: float32 is faster"
    return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads, {bf16}")


def _memory() -> Check:
    try:
        import psutil
    except ImportError:
        return Check("memory", "warning", "unknown without psutil", 'pip install "psutil"')
    memory = psutil.virtual_memory()
    free, total = _gb(memory.available), _gb(memory.total)
    found = f"{free:.1f} of {total:.1f} GB available"
    if free >= MIN_MEMORY_GB:
        return Check("memory", "ok", found)
    return Check("memory", "warning", found, f"Close other programs: training needs about {MIN_MEMORY_GB:.0f} GB.")


def _disk(folder: Path) -> Check:
    free = _gb(shutil.disk_usage(folder).free)
    found = f"{free:.1f} GB free in {folder}"
    if free >= MIN_DISK_GB:
        return Check("disk", "ok", found)
    remedy = f"Free {MIN_DISK_GB:.0f} GB, or work in another folder: checkpoints are large."
    return Check("disk", "warning", found, remedy)


def _git() -> Check:
    path = shutil.which("git")
    if path is None:
        return Check("git", "warning", "not found", "Install git: run logs then record the commit they were made from.")
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return Check("git", "ok", answer.stdout.strip() or path)


def _assets() -> Iterator[Check]:
    """Real weights and data on this computer; all optional, as users bring their own."""
    from sparsight.assets import assets_dir, inventory

    for asset in inventory():
        if asset.found is None:
            made = f", or set SPARSIGHT_ASSETS (now {assets_dir()})" if asset.command.startswith("make") else ""
            yield Check(asset.name, "warning", f"not found ({asset.purpose})", asset.command + made)
        else:
            yield Check(asset.name, "ok", _short(asset.found))


def _short(path: Path) -> str:
    """The path, relative to the current folder where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _gb(size: float) -> float:
    """Bytes as GB of 2**30 bytes."""
    return size / 2**30
