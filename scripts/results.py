"""Write the tables of README and docs from the newest results in benchmarks/results/. A test checks them."""

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


def bridge_table(name: str, result: dict) -> str:
    """The bridge's time as ratios, beside the ratios of executed FLOPs."""
    where = result["device"]
    if where == "cpu":
        where = f"{result['env']['hardware']['cpu']}, {result['env']['hardware']['cores']} cores"
    lines = [
        f"**{name}** ({where}; {result['precision']}; median of {result['rounds']}; "
        f"`benchmarks/results/{result['file']}`)",
        "",
        "| map | layout | tokens | ms a picture | time, of the loop's | time, of one global resampler's |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = (f"{row[f'time_vs_{other}']:.2f} ({row[f'flops_vs_{other}']:.2f})" for other in ("loop", "global"))
        cells = f"{row['map']}x{row['map']}", f"`{row['layout']}`", row["tokens"]
        milliseconds = 1000 * row["seconds"]["ours"] / row["batch"]
        lines.append("| " + " | ".join(map(str, (*cells, f"{milliseconds:.0f}", *ratios))) + " |")
    return "\n".join(lines)


def scaling_table(name: str, result: dict) -> str:
    """A trained model's loss right after scaling, against a fresh bridge of the same layout."""
    steps = len(result["rows"][0]["training_loss"])
    lines = [
        f"**{name}**: validation loss at once, and training loss after {steps} steps, of a model pre-trained with "
        f"{result['rows'][0]['tokens']} tokens (`benchmarks/results/{result['file']}`; one seed)",
        "",
        "| layout and side in pixels | tokens | scaled | fresh bridge |",
        "|---|---|---|---|",
    ]
    pairs = zip(result["rows"][::2], result["rows"][1::2], strict=True)
    for pair in pairs:
        cells = (f"{row['validation_loss']:.2f}, {row['training_loss'][-1]:.2f}" for row in pair)
        lines.append(f"| {pair[0]['target']} | {pair[0]['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def newest(folder: Path) -> dict[str, dict]:
    """The newest result of each name: NAME-DATE.json, DATE as in 2026-11-21 or 2026-11-21T0829."""
    files = {file.name[: file.name.index("-20")]: file for file in sorted(folder.glob("*-????-??-??*.json"))}
    return {name: json.loads(file.read_text(encoding="utf-8")) | {"file": file.name} for name, file in files.items()}


def render(page: str, folder: Path = ROOT / "benchmarks/results") -> str:
    """What stands between the marks of a page."""
    results = newest(folder)
    if page == "README.md":
        parts = [table(name, result) for name, result in results.items() if "ratios" in result]
        return "\n\n".join(["## What was measured", *parts])
    parts = [bridge_table(name, result) for name, result in results.items() if name.startswith("bridge-")]
    return "\n\n".join(parts + [scaling_table(name, result) for name, result in results.items() if name == "scaling"])


PAGES = ("README.md", "docs/chain-of-sight.md")


def main() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        before, rest = text.split(START)
        after = rest.split(END)[1]
        (ROOT / page).write_text(f"{before}{START}\n{render(page)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
