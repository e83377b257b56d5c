"""The shape of the code: lines by room, functions over 60 lines, and more than 7 parameters that may be positional.

python scripts/shape.py    prints the table; exit code 1 if a limit is passed
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "sparsight"
LINES, PARAMETERS = 60, 7


def faults(file: Path) -> list[str]:
    """Functions of a file that are too long, or take too much by position."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name, arguments = f"{file.relative_to(SOURCE)}:{node.lineno} {node.name}", node.args
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > LINES:
            found.append(f"{name}: {lines} lines, expected at most {LINES}")
        positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args) if each.arg not in ("self", "cls")]
        if len(positional) > PARAMETERS and not any("command" in ast.dump(each) for each in node.decorator_list):
            found.append(f"{name}: {len(positional)} parameters that may be positional, expected at most {PARAMETERS}")
    return found


def main() -> int:
    rooms: Counter[str] = Counter()
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        room = file.relative_to(SOURCE).parts[0]
        rooms["(root)" if room.endswith(".py") else room] += len(file.read_text(encoding="utf-8").splitlines())
        found += faults(file)
    for room, lines in sorted(rooms.items()):
        print(f"{room:12} {lines:6,}")
    print(f"{'in all':12} {sum(rooms.values()):6,}")
    print("\n".join(found) or f"no function over {LINES} lines, none with over {PARAMETERS} positional parameters")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
