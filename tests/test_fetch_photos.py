"""`make photos`: the script that unpacks photographs, on packages built here; only the mirror is a stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from photos import make_photos

SCRIPT = Path(__file__).parents[1] / "scripts" / "fetch_photos.py"
PLACES = {"tuxpaint-stamps-default": "tuxpaint/stamps", "endless-sky-data": "games/endless-sky/images/land"}
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two packages, and an `apt-get` that takes them from there and notes its calls."""
    mirror, photos = tmp_path_factory.mktemp("mirror"), make_photos(tmp_path_factory.mktemp("photos"))
    for package, place in PLACES.items():
        root = mirror / "roots" / package
        shutil.copytree(photos / ("land" if "sky" in package else "stamps"), root / "usr/share" / place)
        (root / "usr/share" / place / "not_wanted.ogg").touch()
        (root / "usr/share/doc" / package).mkdir(parents=True)
        (root / "usr/share/doc" / package / "copyright").write_text(f"licence of {package}")
        (root / "DEBIAN").mkdir()
        control = f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: tests\nDescription: tests\n"
        (root / "DEBIAN" / "control").write_text(control)
        build(root)
    apt = mirror / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f"#!/bin/sh\necho $3 >>{mirror}/calls\ncp {mirror}/roots/$3_1_all.deb .\n")
    apt.chmod(0o755)
    return mirror


def build(root: Path) -> None:
    subprocess.run(["dpkg-deb", "-Znone", "-b", root, f"{root}_1_all.deb"], check=True, capture_output=True)


def fetch(folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    """The folder is named from where one stands, as `make photos` names it."""
    command, there = [sys.executable, str(SCRIPT), folder.name], folder.parent
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=there, env=os.environ | {"PATH": path}
    )


@needs_dpkg
def test_keeps_what_scenes_show_and_the_licences(mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "stamps").mkdir(parents=True)  # what an older Sparsight left is replaced
    path = f"{mirror / 'bin'}:{os.environ['PATH']}"
    done = fetch(tmp_path / "photos", path)
    assert done.returncode == 0 and "photographs are in" in done.stdout, done
    made = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    listed = make_photos(tmp_path / "wanted" / "photos")
    wanted = {str(file.relative_to(tmp_path / "wanted")) for file in listed.rglob("*") if file.is_file()}
    licences = {f"photos/{package}.copyright" for package in PLACES}
    assert made == wanted | licences | {"photos/packages.txt"}
    calls = (mirror / "calls").read_text()
    assert fetch(tmp_path / "photos", path).returncode == 0
    assert (mirror / "calls").read_text() == calls, "what is there is not fetched again"


@needs_dpkg
def test_nothing_is_half_there(mirror: Path, tmp_path: Path) -> None:
    """The first package unpacks, the second lacks a file, or cannot be downloaded."""
    path = f"{mirror / 'bin'}:{os.environ['PATH']}"
    root = mirror / "roots" / "endless-sky-data"
    file = root / "usr/share" / PLACES["endless-sky-data"] / "sky3.jpg"
    kept = file.read_bytes()
    file.unlink()
    build(root)
    done = fetch(tmp_path / "photos", path)
    assert done.returncode == 1 and "lacks 1 of 206 files, such as sky3.jpg" in done.stderr
    Path(f"{root}_1_all.deb").unlink()
    done = fetch(tmp_path / "photos", path)
    assert done.returncode == 1 and "apt-get -qq download endless-sky-data failed" in done.stderr
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(kept)
    build(root)


def test_a_machine_without_apt_is_told(tmp_path: Path) -> None:
    done = fetch(tmp_path / "photos", str(tmp_path))
    assert done.returncode == 1 and "apt-get is not installed here" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
