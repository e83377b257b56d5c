"""The wheel is complete: what a user of `pip install` gets runs without a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsight import assets
from sparsight.settings.load import load_recipe
from tiny import make_image

ROOT = Path(__file__).parents[1]
SMALL = "language={hidden: 64, layers: 2, heads: 2, intermediate: 128, vocabulary: 400}"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds and nothing else, to stand first on the path."""
    made, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(made), str(ROOT))
    (wheel,) = made.glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def sparsight(installed: Path, folder: Path, *arguments: str) -> str:
    """What `sparsight ARGUMENTS` of the wheel prints in `folder`, where it must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "SPARSIGHT_ASSETS"}
    environment |= {"PYTHONPATH": str(installed), "COLUMNS": "200"}
    code = (
        # An editable install has put the checkout's folder there.
        "import sys;"
        f"sys.path = [p for p in sys.path if p.endswith('site-packages') or not p.startswith({str(ROOT)!r})];"
        "import sparsight; from sparsight.cli import main;"
        f"assert sparsight.__file__.startswith({str(installed)!r}), sparsight.__file__;"
        "main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(assets.efficientnet_lite0_weights() is None, reason="needs `make assets`")
def test_F12_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """It failed: "recipe 'demo.yaml' is not part of this installation"."""
    said = sparsight(installed, tmp_path, "demo", "--short")
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
    sparsight(installed, tmp_path, "train", "recipes/own-data.yaml", "--preset", "few-tokens", *given)
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
