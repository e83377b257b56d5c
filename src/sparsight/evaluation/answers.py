"""Answers on the disk, a line each as they come, so that an evaluation which was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections import UserDict
from contextlib import suppress
from pathlib import Path


class AnswerFile(UserDict[int, str]):
    """Answers by the question's number; what is set is in the file at once.

    Args:
        key: of all that decides the answers. Lines of other keys stay in the file, and are passed over.
    """

    def __init__(self, path: str | Path, key: str) -> None:
        super().__init__()
        self.path, self.key = Path(path), key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):  # empty, or cut by the kill
                found = json.loads(line)
                if found["key"] == key:
                    self.data[found["number"]] = found["answer"]

    def __setitem__(self, number: int, answer: str) -> None:
        if self.data.get(number) != answer:
            self.data[number] = answer
            with self.path.open("a", encoding="utf-8") as file:  # a new line first: the last one may be cut
                file.write("\n" + json.dumps({"key": self.key, "number": number, "answer": answer}))
