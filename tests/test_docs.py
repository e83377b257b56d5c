"""The docs are true: snippets run, the schema is current, recipes load."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from sparsight import assets
from sparsight.config import Recipe, load_comparison, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_schema_is_current() -> None:
    written = json.loads((ROOT / "docs/recipe.schema.json").read_text(encoding="utf-8"))
    assert written == Recipe.model_json_schema(), "run: python scripts/export_schema.py"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    if "runs:" in path.read_text(encoding="utf-8"):
        assert len(load_comparison(path).recipes()) >= 2
    else:
        assert load_recipe(path).stages


@pytest.mark.parametrize("key", sorted(Recipe.model_fields))
def test_every_recipe_key_is_documented(key: str) -> None:
    assert f"`{key}`" in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    assets.efficientnet_lite0_weights() is None or assets.smollm2_folder() is None, reason="needs `make assets`"
)
def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIGHT_ASSETS", str(assets.assets_dir().resolve()))
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 2
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert (tmp_path / "my-vlm" / "processor_config.json").is_file()


def test_readme_shows_the_results_files() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import readme_results

    shown = (ROOT / "README.md").read_text(encoding="utf-8").split(readme_results.START)[1]
    written = shown.split(readme_results.END)[0].strip()
    wanted = readme_results.render(ROOT / "benchmarks/results").strip()
    assert written == wanted, "run: python scripts/readme_results.py"
