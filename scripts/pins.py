"""Ask pip whether this package installs beside the newest trainers and serving engines, with the pins that these have.

Nothing is installed: ``pip install --dry-run``, one package at a time, under the Python that runs this script. Some of
the packages want Python 3.12: ``PYTHON3.12 scripts/pins.py``. The answers go to a new file of benchmarks/results, which
``python scripts/results.py`` shows in docs/trainers/README.md.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("trl", "axolotl", "ms-swift", "nemo-automodel", "unsloth", "llamafactory"),
    *("lmms-engine", "veomni", "verl", "megatron-bridge", "vllm", "sglang"),
)


def dry_run(*wanted: str) -> tuple[list[dict[str, Any]], str]:
    """What pip would install, as its report says; and why it would not, "" if it would."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        options = ["--dry-run", "--ignore-installed", "--quiet", "--disable-pip-version-check", "--report", str(file)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *wanted], capture_output=True, text=True
        )
        if done.returncode == 0:
            return [each["metadata"] for each in json.loads(file.read_text())["install"]], ""
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "conflict" in line.lower()]
    return [], (errors or ["pip failed without a word"])[-1].replace("ERROR: ", "")


def row(package: str, ours: str) -> dict[str, Any]:
    """Whether a package's newest version and ours can be had together; if a package that it needs cannot be built here,
    whether all the others can."""
    found, reason = dry_run(package, "--no-deps")
    if not found:
        return {"package": package, "resolves": False, "reason": reason}
    (alone,) = found
    result: dict[str, Any] = {"package": package, "version": alone["version"]}
    pins = [each.partition(";")[0].strip() for each in alone.get("requires_dist", []) if "extra ==" not in each]
    result["pin"] = next((each for each in pins if re.match(r"transformers\b", each)), "")
    wanted = [f"{package}=={alone['version']}"]
    left_out: list[str] = []
    while True:
        found, reason = dry_run(ours, *wanted)
        if not (broken := re.search(r"Failed to build '([^']+)'", reason)) or broken[1] in left_out:
            break
        left_out.append(broken[1])
        names = tuple(left_out)
        wanted = [each for each in alone["requires_dist"] if "extra ==" not in each and not each.startswith(names)]
    versions = {each["name"].lower(): each["version"] for each in found}
    return result | {
        "resolves": bool(found),
        "transformers": versions.get("transformers", ""),
        "torch": versions.get("torch", ""),
        "left_out": left_out,
        "reason": reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), help="names, with a version if wanted")
    packages, rows = parser.parse_args().packages, []
    for number, package in enumerate(packages, 1):
        rows.append(row(package, str(ROOT)))
        print(f"{number} of {len(packages)}: {rows[-1]}", flush=True)
    if packages != list(PACKAGES):
        return
    now = datetime.now(UTC)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    file = ROOT / f"benchmarks/results/pins-{now:%Y-%m-%dT%H%M}.json"
    result = {"commit": commit.strip(), "date": f"{now:%Y-%m-%d}", "python": platform.python_version(), "rows": rows}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
