"""Bad samples of a run: each is counted once, written down, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.errors import UserError

FEW = 5  # so many bad samples stop no run, however small their share


@dataclass
class Quarantine:
    """A stage's bad samples, which others stand in for: stage, step, row, id and reason, a line each in ``file``.

    Args:
        most: share of the samples seen above which bad ones stop the run; those dropped for their length do not count.
        same: names of the stages that have the same data, this one included.
        rows: different samples of these data.
        writes: whether this process writes; one of all ranks does.
    """

    file: Path
    most: float
    stage: str
    same: Sequence[str]
    rows: int
    writes: bool = True

    def begin(self, step: int, seen: int) -> None:
        """Go on from a step, up to which the run has seen so many samples of these data: what later steps of the stage
        had found will be found again."""
        self.seen = seen
        lines = self.file.read_text(encoding="utf-8").split("\n")[:-1] if self.file.is_file() else []
        found = [json.loads(line) for line in lines]  # a line that was cut short is the last one: found again, too
        known = [entry for entry in found if entry["stage"] != self.stage or entry["step"] <= step]
        self.found = {(entry["row"], entry["id"]): entry for entry in known if entry["stage"] in self.same}
        if lines and self.writes:
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in known), encoding="utf-8")
            partial.replace(self.file)

    def add(self, entries: Iterable[dict[str, Any]], step: int, samples: int) -> None:
        """Take the samples that were replaced in a step of so many samples.

        Raises:
            UserError: more than ``most`` of the samples of these data seen in the run were bad, and more than `FEW`.
        """
        self.seen += samples
        new = {(each["row"], each["id"]): {"stage": self.stage, "step": step} | each for each in entries}
        new = {key: entry for key, entry in new.items() if key not in self.found}
        self.found |= new
        if new and self.writes:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(entry) + "\n" for entry in new.values())
        bad = [entry for entry in self.found.values() if not entry["dropped"]]
        seen = min(self.seen + len(self.found), self.rows)  # in place of each found one another was looked at
        if new and len(bad) > max(FEW, self.most * seen):
            raise UserError(
                f"stage '{self.stage}', step {step}: {len(bad)} of {seen} samples seen are bad, and max_bad is "
                f"{self.most:g}; the last one: id {bad[-1]['id']}: {bad[-1]['reason']}. All are in {self.file}. "
                "`sparsight data check` finds them beforehand; or raise max_bad"
            )
