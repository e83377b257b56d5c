"""The wheel is complete: what a user of `pip install` gets runs without a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from sparsight import __version__, assets
from sparsight.settings.load import load_recipe
from tiny import make_image

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("wheel")
SMALL = "language={hidden: 64, layers: 2, heads: 2, intermediate: 128, vocabulary: 400}"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel in it; torch and all else is that of this one, but no Sparsight."""
    made, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(made), str(ROOT))
    (wheel,) = made.glob("*.whl")
    venv.create(target)
    # A folder named in a .pth file is searched; its own .pth files, one of which names the checkout, are not read.
    (packages,) = target.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip("--python", str(target / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))
    return target


def ran(installed: Path, folder: Path, *command: str) -> str:
    """What a command of the environment prints in `folder`, where it must succeed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("SPARSIGHT_ASSETS", "PYTHONPATH")}
    program = str(installed / "bin" / command[0])
    result = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


def test_the_wheel_is_what_runs_and_its_version_is_the_packages(installed: Path, tmp_path: Path) -> None:
    """One place says it: ``__version__``. All modules are in it, and no file of the checkout is reached."""
    asked = "import importlib.metadata as m, sparsight; print(sparsight.__file__, m.version('sparsight'))"
    file, version = ran(installed, tmp_path, "python", "-c", asked).split()
    assert Path(file).is_relative_to(installed) and version == __version__
    assert ran(installed, tmp_path, "sparsight", "--version").split()[-1] == __version__
    modules = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.suffix not in ("", ".pyc")}
    assert len(modules) > 100 and not [path for path in modules if not (Path(file).parents[1] / path).is_file()]


@pytest.mark.slow
@pytest.mark.skipif(assets.efficientnet_lite0_weights() is None, reason="needs `make assets`")
def test_F12_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """It failed: "recipe 'demo.yaml' is not part of this installation"."""
    said = ran(installed, tmp_path, "sparsight", "demo", "--short")
    assert "scores mean nothing" in said
    assert (tmp_path / "runs/demo-short/report.html").is_file() and not (tmp_path / "runs/demo").exists()


@pytest.mark.slow
@pytest.mark.skipif(assets.efficientnet_lite0_weights() is None, reason="needs `make assets`")
def test_F12_a_preset_trains_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """`--preset` needs presets.yaml, and the recipe is the built-in one, by the name that README prints."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(10):
        make_image(number).save(tmp_path / f"images/{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Noise {number}."}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    few = [f"stages.{name}.{key}=4" for name in ("pretrain", "finetune") for key in ("samples", "batch_size")]
    given = ["data.path=llava.json", "data.images=images", SMALL, *few, "workers=0"]
    ran(installed, tmp_path, "sparsight", "train", "recipes/own-data.yaml", "--preset", "few-tokens", *given)
    assert (tmp_path / "runs/own-data/finetune/model/config.json").is_file()


def test_F12_a_recipe_that_is_not_there_says_where_the_built_in_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own file comes first; a bare name, which may be a mistake, trains nothing else in its place."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/own-data.yaml").name == "own-data"
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*own-data\.yaml; .* recipes/own-data\.yaml and lie in"):
        load_recipe("own-data.yaml")
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*; .* recipes/NAME\.yaml and lie in"):
        load_recipe("recipes/mine.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/own-data.yaml").write_text("name: my own", encoding="utf-8")
    with pytest.raises(ValueError, match="name"):
        load_recipe("recipes/own-data.yaml")
