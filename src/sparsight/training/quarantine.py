"""Bad samples of a run: each is counted once, written down, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from sparsight.errors import UserError

FEW = 5  # so many bad samples stop no run, however small their share


class Quarantine:
    """The samples of a run that others stand in for, in ``quarantine.jsonl``: stage, step, row, id and reason, a line
    each.

    Args:
        most: share of the samples seen above which bad ones stop the run; those dropped for their length do not count.
        writes: whether this process writes; one of all ranks does.
    """

    def __init__(self, file: Path, most: float, writes: bool = True) -> None:
        self.file, self.most, self.writes = file, most, writes

    def begin(self, stage: str, step: int, seen: int, rows: int, same: Collection[str]) -> None:
        """Enter a stage, or come back to it: what its later steps found will be found again.

        Args:
            step: the step that it goes on from.
            seen: samples of these data that the run has learnt from before.
            rows: different samples that there are.
            same: names of the stages that have these data.
        """
        self.stage, self.seen, self.rows = stage, seen, rows
        lines = self.file.read_text(encoding="utf-8").split("\n")[:-1] if self.file.is_file() else []
        found = [json.loads(line) for line in lines]  # a line that was cut short is the last one: found again, too
        known = [entry for entry in found if entry["stage"] != stage or entry["step"] <= step]
        self.found = {(entry["row"], entry["id"]): entry for entry in known if entry["stage"] in {stage, *same}}
        if lines and self.writes:
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(map(_line, known)), encoding="utf-8")
            partial.replace(self.file)

    def add(self, entries: Iterable[dict[str, Any]], step: int, samples: int) -> None:
        """Take what was replaced in a step of so many samples.

        Raises:
            UserError: more than ``most`` of the samples of these data seen in the run were bad, and more than `FEW`.
        """
        self.seen += samples
        new = {(entry["row"], entry["id"]): {"stage": self.stage, "step": step} | entry for entry in entries}
        new = {key: entry for key, entry in new.items() if key not in self.found}
        self.found |= new
        if new and self.writes:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.writelines(map(_line, new.values()))
        bad = [entry for entry in self.found.values() if not entry["dropped"]]
        seen = min(self.seen + len(self.found), self.rows)  # in place of each found one another was looked at
        if new and len(bad) > max(FEW, self.most * seen):
            raise UserError(
                f"stage '{self.stage}', step {step}: {len(bad)} of {seen} samples seen are bad, and max_bad is "
                f"{self.most:g}; the last one: id {bad[-1]['id']}: {bad[-1]['reason']}. All are in {self.file}. "
                "`sparsight data check` finds them beforehand; or raise max_bad"
            )


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
