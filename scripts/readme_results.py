"""Write the README's table from the newest result of each comparison in benchmarks/results/. A test checks it."""

import json
from pathlib import Path

START, END = "<!-- results: start -->", "<!-- results: end -->"
ROOT = Path(__file__).parents[1]


def table(name: str, result: dict) -> str:
    """One comparison as Markdown: cost in all, then scores by task in percent."""
    base, ours = result["runs"]
    total = result["ratios"][ours["name"]]["total"]
    hardware = result["env"]["hardware"]
    lines = [
        f"**{name}** ({hardware['cpu']}, {hardware['cores']} cores; one seed; `benchmarks/results/{result['file']}`)",
        "",
        f"| | {base['name']} | {ours['name']} | chance | shuffled pictures |",
        "|---|---|---|---|---|",
        "| visual tokens by stage | "
        + " | ".join(", ".join(str(stage["visual_tokens"]) for stage in run["stages"]) for run in (base, ours))
        + " | | |",
        f"| training, seconds | {base['seconds']:.0f} | {ours['seconds']:.0f} ({total['seconds']:.2f}x) | | |",
        f"| executed FLOPs | {base['executed_flops']:.2e} | {ours['executed_flops']:.2e} "
        f"({total['executed_flops']:.2f}x) | | |",
    ]
    for task, score in base["scores"].items():
        cells = (score, ours["scores"][task], result["chance"][task])
        control = " / ".join(f"{100 * run['shuffled'][task]:.0f}" for run in (base, ours))
        lines.append(f"| {task} | " + " | ".join(f"{100 * cell:.0f}" for cell in cells) + f" | {control} |")
    return "\n".join(lines)


def render(folder: Path) -> str:
    """The README's section: the newest file of each comparison, by name."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.glob("*-????-??-??*.json")):
        newest[file.name[: file.name.index("-20")]] = file
    parts = ["## What was measured", ""]
    for name, file in newest.items():
        result = json.loads(file.read_text(encoding="utf-8")) | {"file": file.name}
        if "ratios" in result:
            parts += [table(name, result), ""]
    return "\n".join(parts)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    section = render(ROOT / "benchmarks/results")
    readme.write_text(f"{before}{START}\n{section}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
