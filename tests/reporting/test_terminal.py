"""Commands on runs and data that come from somebody else: nothing of them commands the terminal (D09)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from synthetic import write_run

from small_runs import recipe_values, save_encoder
from test_console import HOSTILE, SHOWN, unsafe


def said_by(*arguments: object, code: int) -> str:
    """All that a command prints; it is no terminal, so each control character would be one of the data."""
    whole = [sys.executable, "-c", "from sparsight.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8:surrogateescape"}
    done = subprocess.run(whole, capture_output=True, timeout=120, env=environment, check=False)
    said = (done.stdout + done.stderr).decode("utf-8", "surrogateescape")
    assert done.returncode == code, said
    return said


def hostile(folder: Path, name: str, **names: str) -> Path:
    """A run whose name, stage and task are hostile."""
    log = write_run(folder / name, name) / "run.jsonl"
    text = log.read_text()
    for word in (name, "pretrain", "caption"):
        text = text.replace(json.dumps(word), json.dumps(f"{word} {HOSTILE}"))
    log.write_text(text)
    return log.parent


def test_D09_watch_and_compare_show_the_names_of_a_log(tmp_path: Path) -> None:
    runs = [hostile(tmp_path, name) for name in ("standard", "mine")]
    for said in (said_by("watch", runs[0], code=0), said_by("compare", *runs, "--out", tmp_path / "seen", code=0)):
        assert not unsafe(said) and "\\x1b]52" in said


def test_D09_an_error_shows_the_name_of_a_file(tmp_path: Path) -> None:
    for name in (HOSTILE.replace("\r", ""), os.fsdecode(b"caf\xe9")):
        said = said_by("watch", tmp_path / name, code=2)
        assert not unsafe(said) and "there is no run log" in said
    assert "caf\\udce9" in said


def test_D09_data_check_shows_ids_and_files(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    rows = [{"id": HOSTILE, "image": f"{HOSTILE}.png", "conversations": turns}] * 2
    (tmp_path / "data.json").write_text(json.dumps([*rows, {"id": "text", "conversations": turns[1:] * 2}]))
    values = recipe_values(
        save_encoder(tmp_path / "encoder"), data={"kind": "json", "path": str(tmp_path / "data.json")}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"evaluation": {"kind": "none"}}))
    said = said_by("data", "check", tmp_path / "recipe.yaml", "--workers", 0, "--out", tmp_path / "check", code=1)
    assert not unsafe(said) and SHOWN in said
