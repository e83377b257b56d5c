"""Lay out the pages of the documentation site, as plain Markdown: python scripts/site_pages.py FOLDER

Files of docs/ read well where they lie; on the site they get more. README and the files beside it become pages, links
into the repository lead to pages, every public name has its whole docstring, tutorials show what their notebooks
printed and drew. `make docs` then builds FOLDER by mkdocs.yml.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsight import _PUBLIC

ROOT = Path(__file__).parents[1]
# A file of the repository -> its page.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "LICENSE": "project/license.md",
    "LOG.md": "project/log.md",
    "SECURITY.md": "project/security.md",
}
LONG = ("project/changelog.md", "project/log.md")  # they have every word: last in a search
RECIPES = "project/recipes.md"
# Modules beside the public names that pages of docs/ name.
MODULES = {
    "reference/evaluation.md": ("Evaluation", ("evaluation.ask", "evaluation.metrics", "evaluation.significance")),
    "reference/more.md": (
        "Analysis, loops of your own, checkpoints",
        ("sparse.analysis", "integrations.loop", "schedules", "training.checkpoints", "safety"),
    ),
}
FENCE = re.compile(r"^```(?:python|bash|yaml)\n.*?^```\n", re.DOTALL | re.MULTILINE)


def write(target: Path) -> None:
    """All pages, in a folder that is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    texts = {f"docs/{path.relative_to(ROOT / 'docs').as_posix()}": path for path in (ROOT / "docs").rglob("*.md")}
    texts |= {source: ROOT / source for source in PAGES}
    for source, path in texts.items():
        page = page_of(source)
        text = path.read_text(encoding="utf-8")
        if source == "LICENSE":
            text = f"# License\n\n```text\n{text.rstrip()}\n```\n"
        if page in LONG:
            text = f"---\nsearch: {{boost: 0.2}}\n---\n{text}"
        if page == "api.md":
            text = whole_docstrings(text)
        if (notebook := path.with_suffix(".ipynb")).is_file():
            text = with_outputs(text, notebook)
            for name, image in pictures(notebook):
                (target / page).with_name(name).write_bytes(image)
        put(target / page, re.sub(r"(\]\()([^)#:\s]+)(#[^)\s]*)?\)", partial(mended, source=source), text))
    for page, text in {RECIPES: recipes(), **{page: modules(page) for page in MODULES}}.items():
        put(target / page, text)


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def page_of(source: str) -> str:
    return PAGES.get(source) or source.removeprefix("docs/")


def mended(link: re.Match[str], source: str) -> str:
    """A link to a file of the repository, as one to its page; mkdocs tells where there is none."""
    target, anchor = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2])), link[3] or ""
    if target.startswith("recipes/"):
        target, anchor = RECIPES, "#" + posixpath.basename(target).replace(".", "")
    return f"{link[1]}{posixpath.relpath(page_of(target), posixpath.dirname(page_of(source)) or '.')}{anchor})"


def recipes() -> str:
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    shown = [f"## {each.name}\n\n```yaml\n{each.read_text(encoding='utf-8').strip()}\n```\n" for each in files]
    return "\n".join(["# Recipes that come with it\n", *shown])


def modules(page: str) -> str:
    title, names = MODULES[page]
    shown = [
        f"## sparsight.{name}\n\n::: sparsight.{name}\n    options: {{show_root_heading: false}}\n" for name in names
    ]
    return "\n".join([f"# {title}\n", *shown])


def whole_docstrings(text: str) -> str:
    """docs/api.md with all that each docstring says, in place of its first sentence."""
    names = sorted(_PUBLIC, key=str.lower)
    return "\n".join([text.split("\n### ")[0], *(f"::: {_PUBLIC[name]}.{name}\n" for name in names)])


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def pictures(notebook: Path) -> Iterator[tuple[str, bytes]]:
    """What was drawn, and the names of files for it."""
    for number, cell in enumerate(code_cells(notebook)):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                yield f"{notebook.stem}-{number}.png", base64.b64decode(output["data"]["image/png"])


def with_outputs(text: str, notebook: Path) -> str:
    """A tutorial with what its notebook printed and drew below each block of code."""
    cells = iter(enumerate(code_cells(notebook)))

    def shown(block: re.Match[str]) -> str:
        number, cell = next(cells)
        return "\n".join([block[0], *(result(each, f"{notebook.stem}-{number}.png") for each in cell["outputs"])])

    title, rest = text.split("\n", 1)
    return f"{title}\n\n*An executed notebook: [{notebook.name}]({notebook.name}).*\n{FENCE.sub(shown, rest)}"


def result(output: dict[str, Any], picture: str) -> str:
    if "image/png" in output.get("data", {}):
        inner = f"![{output['metadata'].get('alt', 'what the code above draws')}]({picture})"
    else:
        inner = "".join(output["text"] if "text" in output else output["data"]["text/plain"]).rstrip()
        inner = f"```text\n{inner}\n```"
    return f'<div class="output" markdown>\n\n{inner}\n\n</div>\n'


if __name__ == "__main__":
    write(Path(sys.argv[1]))
