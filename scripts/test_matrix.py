"""Run attach's tests on many versions of transformers: environments that share torch, results, and a table of them.

    python scripts/test_matrix.py [--only oldest newest 5.12.1 ...] [--write]

An environment for each version under .matrix/ sees the packages of this one, and installs what must differ. `--write`
adds a file to benchmarks/results and makes the table of docs/versions.md from it.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree as ET
from datetime import datetime
from pathlib import Path

from packaging.specifiers import SpecifierSet

from sparsight.compat import COMPOSING

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
START, END = "<!-- versions: start -->", "<!-- versions: end -->"
# The first that `attach` takes, then those that trainers and engines pin.
NAMED = {"oldest": "5.0.0", "pinned": "", "newest": "newest"}
VERSIONS = ["oldest", "5.4.0", "5.9.0", "5.10.1", "5.12.1", "5.16.1", "5.18.0", "5.20.1", "pinned", "newest"]
TESTS = {  # a table for each
    "attach": ["tests/sparse/test_attach.py", "tests/sparse/test_handle.py", "tests/sparse/test_gather.py"],
    "compose": [  # where COMPOSING holds
        "tests/modeling/test_modeling.py",
        "tests/modeling/test_processing.py",
        "tests/test_pipeline.py::test_a_run_leaves_a_log_and_a_model_of_every_stage",
    ],
}


def environment(wanted: str) -> tuple[str, Path]:
    """The version of transformers that an environment has, and its Python; made if it is not there."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    NAMED["pinned"] = re.findall(r"^transformers==(.*)$", pins, re.M)[0]
    version = NAMED.get(wanted, wanted)
    folder = ROOT / ".matrix" / version
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=True)
        site = next(folder.glob("lib/python*/site-packages"))
        shared = sysconfig.get_path("purelib")
        (site / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    (folder / "torch.txt").write_text("".join(re.findall(r"^torch==.*\n", pins, re.M)))
    newest = version == "newest"
    what = ["--upgrade", "transformers"] if newest else [f"transformers=={version}"]
    pip = [sys.executable, "-m", "pip", "-qqq", "--disable-pip-version-check", "--python", str(python), "install"]
    # pip sees what both hold, and changes what does not fit together.
    subprocess.run([*pip, "-c", str(folder / "torch.txt"), *what, "peft", "trl", "accelerate"], check=True)
    ask = "import transformers; print(transformers.__version__)"
    found = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True)
    return found.stdout.split()[-1], python


def tried(python: Path, tests: list[str]) -> dict[str, dict[str, str]]:
    """Each test's outcome, "" or the reason, by family; a test of none stands under "other"."""
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}"]
    subprocess.run([str(python), "-m", "pytest", *tests, *options], cwd=ROOT, check=False)
    if not report.exists():
        return {"other": {"collection": "failed: pytest ended before any test"}}
    families = (ROOT / "tests/sparse/families.py").read_text(encoding="utf-8").partition("CONFIGS:")[2]
    names = [*re.findall(r'^    "(.*?)":', families.partition("\n}")[0], re.M), "sparsight"]
    found: dict[str, dict[str, str]] = {}
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "")
        family = max((n for n in names if n in name), key=len, default="other")
        why = ""
        for bad in case:
            if bad.tag in ("failure", "error", "skipped"):
                why = ("" if bad.tag == "skipped" else "failed: ") + str(bad.get("message")).splitlines()[0]
        found.setdefault(family, {})[name] = why
    return found


def cell(outcomes: dict[str, str]) -> str:
    """What a family's tests say in a word or a sentence."""
    reasons = {why for why in outcomes.values() if why}
    if failed := sorted(why for why in reasons if why.startswith("failed")):
        return failed[0]
    passed = sum(not why for why in outcomes.values())
    return f"works ({passed})" if passed else min(reasons)


def table(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """Markdown: a row for each family, a column for each version; reasons stand below, once each."""
    families = list(dict.fromkeys(family for found in results.values() for family in found))
    notes: list[str] = []
    lines = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for family in families:
        cells = []
        for version, found in results.items():
            text = cell(found[family]) if family in found else "not tried"
            if not text.startswith(("works", "not tried")):
                text = re.sub(re.escape(f"transformers {version} is installed, but "), "", text)
                notes += [] if text in notes else [text]
                text = f"no ({notes.index(text) + 1})"
            cells.append(text)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    told = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, *([""] if told else []), *told])


def write(result: dict) -> None:
    """Put the tables of a result between the page's markers."""
    made = []
    for name, results in result["tests"].items():
        head = f"**{name}**: tests passed by version of transformers ({result['date'][:10]}, torch {result['torch']}, "
        made.append(f"{head}Python {result['python']}; `benchmarks/results/{result['file']}`)\n\n{table(results)}")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n" + "\n\n".join(made) + f"\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
    """Returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=VERSIONS, help="versions, or oldest, pinned, newest")
    parser.add_argument("--write", action="store_true", help="add a result file and make the table of docs/versions.md")
    given = parser.parse_args()
    tests: dict[str, dict] = {name: {} for name in TESTS}
    for wanted in given.only:
        version, python = environment(wanted)
        for name, paths in TESTS.items():
            if name == "compose" and not SpecifierSet(COMPOSING).contains(version):
                continue
            print(f"test-matrix: {name} with transformers {version} ({wanted})", flush=True)
            tests[name][version] = tried(python, paths)
    for results in tests.values():
        print(table(results))
    if given.write:
        import torch

        now = datetime.now().strftime("%Y-%m-%dT%H%M")
        result: dict = {"file": f"versions-{now}.json", "date": now, "torch": torch.__version__.partition("+")[0]}
        result |= {"python": ".".join(map(str, sys.version_info[:2])), "tests": tests}
        (ROOT / "benchmarks" / "results" / result["file"]).write_text(json.dumps(result, indent=1) + "\n")
        write(result)
    each = [
        why for results in tests.values() for found in results.values() for o in found.values() for why in o.values()
    ]
    return int(any(why.startswith("failed") for why in each) or not each)


if __name__ == "__main__":
    sys.exit(main())
