"""Make the notebooks of docs/tutorials from their pages, executed: python scripts/notebooks.py [--run] [PAGE ...]

A notebook holds what its page says, and what its code printed and drew when it last ran; pages of the site show it. A
test holds them against their pages. Where no code has changed, outputs stay, unless ``--run`` is given. To run they
need `pip install nbclient ipykernel`; own-data takes minutes.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
FENCE = re.compile(r"^```(python|bash|yaml)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def cells(page: Path) -> list[tuple[str, str]]:
    """(markdown | code | skipped, text): commands are a cell of Bash, YAML is one that writes the file that the text
    names."""
    parts = FENCE.split(page.read_text(encoding="utf-8"))
    found, said = [("markdown", parts[0])], parts[0]
    for language, code, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if language == "yaml":
            (name,) = re.findall(r"Write this to `([^`]+)`", said)
            code = f"%%writefile {name}\n{code}"
        elif language == "bash":
            code = f"%%bash\n{code}"
        kind = "skipped" if code.startswith("%%bash\npip install") else "code"
        found += [(kind, code), ("markdown", after)]
        said = after
    return [(kind, text.strip()) for kind, text in found if text.strip()]


def made(page: Path) -> dict[str, Any]:
    """The notebook of a page, not yet executed."""
    shown: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(page)):
        cell: dict[str, Any] = {"id": f"{page.stem}-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if kind == "skipped":
            cell["metadata"]["tags"] = ["skip-execution"]
        more = {"cell_type": "markdown"} if kind == "markdown" else {"cell_type": "code", "execution_count": None}
        shown.append(cell | more | ({} if kind == "markdown" else {"outputs": []}))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": shown, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """In an empty folder; a cell that fails ends it."""
    import nbformat
    from nbclient import NotebookClient

    os.environ |= {"NO_COLOR": "1", "COLUMNS": "110", "TERM": "dumb", "TQDM_DISABLE": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSIGHT_CACHE"] = f"{folder}/cache"
        client = NotebookClient(
            nbformat.reads(json.dumps(notebook), 4), timeout=3600, resources={"metadata": {"path": folder}}
        )
        done = json.loads(nbformat.writes(client.execute()).replace(f"{Path(folder).resolve()}/", ""))
    for cell in done["cells"]:
        cell["metadata"].pop("execution", None)  # times of day
        if cell["cell_type"] == "code":
            cell["outputs"] = tidied(cell["outputs"])
    done["metadata"] = notebook["metadata"]
    return done


def tidied(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was printed, whole, without colours, and of each picture the PNG alone; no warnings of libraries."""
    found: list[dict[str, Any]] = []
    printed = "".join(text for each in outputs if each.get("name") == "stdout" for text in each["text"])
    printed = re.sub(r".*(\x1b\[2K|\r(?!\n))", "", printed)  # of progress bars the last state
    if printed := re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed).rstrip():
        found = [{"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)}]
    for each in outputs:
        if image := each.get("data", {}).get("image/png"):
            found.append(each | {"data": {"image/png": small(image)}})
        elif "data" in each and "text/html" not in each["data"]:  # progress bars
            found.append(each)
    return found


def small(image: str) -> str:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.open(BytesIO(base64.b64decode(image))).convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return min(base64.b64encode(buffer.getvalue()).decode(), image.strip(), key=len)


def kept(notebook: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """The notebook with the outputs of that which is there, if its code is the same."""
    old = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []
    pair = [[cell for cell in cells if cell["cell_type"] == "code"] for cells in (notebook["cells"], old)]
    if [cell["source"] for cell in pair[0]] != [cell["source"] for cell in pair[1]]:
        return None
    for new, run in zip(*pair, strict=True):
        new |= {key: run[key] for key in ("outputs", "execution_count")}
    return notebook


def main() -> None:
    again, pages = "--run" in sys.argv, [Path(name) for name in sys.argv[1:] if name != "--run"]
    for page in pages or sorted(FOLDER.glob("*.md")):
        notebook, file = made(page), page.with_suffix(".ipynb")
        done = (None if again else kept(notebook, file)) or executed(notebook)
        file.write_text(json.dumps(done, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
