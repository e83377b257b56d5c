"""Write docs/recipe.schema.json, the JSON Schema of recipes for editors. A test checks that it is current."""

import json
from pathlib import Path

from sparsight.settings.recipe import Recipe

Path("docs/recipe.schema.json").write_text(json.dumps(Recipe.model_json_schema(), indent=2) + "\n", encoding="utf-8")
