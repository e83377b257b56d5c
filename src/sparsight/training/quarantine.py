"""Bad samples of a run: each is counted once, written down, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsight.config import Recipe, Stage

FEW = 5  # so many bad samples stop no run, however small their share


class Quarantine:
    """The bad samples of a run, in ``quarantine.jsonl``: stage, step, row, id and reason, a line each.

    Args:
        file: an earlier stage's lines in it stay. Kept in memory alone if not given.
        stage: the stage that trains.
        began: the step that it goes on from; what later steps of it found will be found again.
        rows: different samples that there are.
        writes: whether this process writes; one of all ranks does.
    """

    def __init__(
        self, file: Path | None, recipe: Recipe, stage: Stage, began: int, rows: int, writes: bool = True
    ) -> None:
        self.file, self.stage, self.most, self.rows, self.writes = file, stage, recipe.max_bad, rows, writes
        self.earlier = sum(each.samples for each in recipe.stages[: recipe.stages.index(stage)])
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file is not None and file.is_file() else []
        found = [json.loads(line) for line in lines]  # a line that was cut short is the last one: found again, too
        known = [entry for entry in found if entry["stage"] != stage.name or entry["step"] <= began]
        self.bad = {(entry["row"], entry["id"]): entry for entry in known}
        if file is not None and file.is_file() and writes:
            partial = file.with_suffix(".partial")
            partial.write_text("".join(map(_line, known)), encoding="utf-8")
            partial.replace(file)

    def add(self, entries: Iterable[dict[str, Any]], step: int) -> None:
        """Take the bad samples of a step.

        Raises:
            ValueError: more than ``max_bad`` of the samples seen in the run were bad, and more than `FEW`.
        """
        seen = min(self.earlier + step * self.stage.batch_size, self.rows)
        new = {(entry["row"], entry["id"]): {"stage": self.stage.name, "step": step} | entry for entry in entries}
        new = {key: entry for key, entry in new.items() if key not in self.bad}
        self.bad |= new
        if new and self.file is not None and self.writes:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.writelines(map(_line, new.values()))
        if new and len(self.bad) > max(FEW, self.most * seen):
            last = next(reversed(self.bad.values()))
            raise ValueError(
                f"stage '{self.stage.name}', step {step}: {len(self.bad)} of {seen} samples seen are bad, and max_bad "
                f"is {self.most:g}; the last one: id {last['id']}: {last['reason']}. All are in {self.file}. "
                "`sparsight data check` finds them beforehand; or raise max_bad"
            )


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
