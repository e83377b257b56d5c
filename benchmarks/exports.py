"""Logits of exported models against the original's, in processes where Sparsight cannot be imported, under several
versions of transformers; all are exported under the one that is installed. The models are small and random.

    python benchmarks/exports.py [--versions 5.10.1 pinned newest] [--write]

Environments are those of scripts/test_matrix.py. `--write` adds a file to benchmarks/results and makes the table of
docs/export.md from it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from modeling.test_export import MORE, SHORT, exports, load_without_sparsight
from sparsight.console import Console
from sparsight.reporting import environment
from test_matrix import environment as matrix_environment

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "export.md"
START, END = "<!-- exports: start -->\n", "<!-- exports: end -->\n"
BASES = {"lora": "peft, on the model's `remote-code` folder", "merged": "then `remote-code`"}


def cell(found: Any, wanted: Any) -> str:
    """What a version makes of a folder: the largest difference of logits, or in short why there is none."""
    if isinstance(found, str):
        return "does not load: " + re.sub(r"\s+", " ", found)[:80]
    _, logits, same = found
    error = (logits - wanted).abs().max().item()
    return ("0" if error == 0 else f"{error:.0e}") + ("" if same else ", other inputs")


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each form and model, a column for each version."""
    versions = result["versions"]
    lines = ["| `--to` | model | class | " + " | ".join(versions) + " |", "|---" * (3 + len(versions)) + "|"]
    for row in sorted(result["rows"], key=lambda row: row["form"], reverse=True):
        found = ["refused" if "this model needs" in row["found"][v] else row["found"][v] for v in versions]
        cells = [f"`{row['form']}`", row["model"], row["class"].removesuffix("ForConditionalGeneration"), *found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(file: Path) -> None:
    """Put a result's table into docs/export.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    made = table(json.loads(file.read_text(encoding="utf-8")))
    text = f"{before}{START}{made}\n\n(`benchmarks/results/{file.name}`)\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Exports, asks each version, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["5.10.1", "pinned", "newest"], help="of transformers")
    parser.add_argument("--write", action="store_true", help="add a result file and make the table of docs/export.md")
    given = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tasks, logits = exports(root, SHORT + MORE)
        rows = {
            (form, name): {"form": form, "model": BASES.get(form, name.replace("_", " ")), "class": "", "found": {}}
            for form, name in tasks
        }
        versions = []
        for wanted in given.versions:
            version, python = matrix_environment(wanted)
            console.print(f"exports: transformers {version}", highlight=False)
            versions.append(version)
            for pair, found in load_without_sparsight(tasks, root / version, python).items():
                rows[pair]["found"][version] = cell(found, logits[pair[1]])
                rows[pair]["class"] = rows[pair]["class"] or ("" if isinstance(found, str) else found[0])
    here = {"date": str(date.today()), "environment": environment(), "versions": versions, "rows": [*rows.values()]}
    console.print(table(here), markup=False, highlight=False, soft_wrap=True)
    if given.write:
        file = ROOT / "benchmarks" / "results" / f"exports-{here['date']}.json"
        file.write_text(json.dumps(here, indent=1) + "\n", encoding="utf-8")
        write_page(file)


if __name__ == "__main__":
    main()
