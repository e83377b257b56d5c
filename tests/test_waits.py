"""Tests on a pretended device, in processes of their own: torch starts threads for it, and behind these no process that
is forked can run backward. One by one: python -m pytest tests/sparse/waits_of_attached.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("sparse/waits_of_attached.py", "training/waits_of_training.py")
LONG = [pytest.param(file, "long", marks=pytest.mark.long) for file in FILES]


@pytest.mark.slow
@pytest.mark.parametrize("file, mark", [*((file, "not long") for file in FILES), *LONG])
def test_on_a_pretended_device(file: str, mark: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, str(HERE / file)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent, timeout=400)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
