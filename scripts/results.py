"""Write the tables of README and docs from the newest results in benchmarks/results/. A test checks them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

from sparsight.evaluation.significance import bootstrap, paired_test

START, END = "<!-- results: start -->", "<!-- results: end -->"
ROOT = Path(__file__).parents[1]


def table(name: str, result: dict) -> str:
    """One comparison as Markdown, a column for each run: cost in all, then scores by task in percent."""
    runs, hardware = result["runs"], result["env"]["hardware"]

    def row(label: str, cells: Iterable[str], *more: str) -> str:
        return "| " + " | ".join([label, *cells, *(more or ("", ""))]) + " |"

    def total(key: str, form: str) -> Iterator[str]:
        for number, run in enumerate(runs):
            ratio = f" ({result['ratios'][run['name']]['total'][key]:.2f}x)" if number else ""
            yield format(run[key], form) + ratio

    lines = [
        f"**{name}** ({hardware['cpu']}, {hardware['cores']} cores; one seed; `benchmarks/results/{result['file']}`)",
        "",
        row("", (run["name"] for run in runs), "chance", "shuffled images"),
        "|---" * (len(runs) + 3) + "|",
        row(
            "visual tokens by stage",
            (", ".join(str(stage["visual_tokens"]) for stage in run["stages"]) for run in runs),
        ),
        *([row("training, seconds", total("seconds", ".0f"))] if "seconds_hold" not in result else []),
        row("executed FLOPs", total("executed_flops", ".2e")),
    ]
    for task in runs[0]["scores"]:
        control = " / ".join(f"{100 * run['shuffled'][task]:.0f}" for run in runs)
        scores = (f"{100 * run['scores'][task]:.0f}" for run in runs)
        lines.append(row(task, scores, f"{100 * result['chance'][task]:.0f}", control))
    if "seconds_hold" in result:
        lines += ["", f"No seconds are shown: {result['seconds_hold']}."]
    return "\n".join(lines)


def speed_table(name: str, result: dict, only: tuple[str, ...] = ()) -> str:
    """Training steps as shares of their baseline's, beside executed FLOPs."""
    hardware = result["env"]["hardware"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores" if result["device"] == "cpu" else result["device"]
    lines = [
        f"**{name}**: a training step ({where}; {result['precision']}; median of the rounds and their range; "
        f"`benchmarks/results/{result['file']}`). Reached: FLOPs over time, 1.0 where the clock follows the FLOPs.",
        "",
        "| | seconds | of the baseline's time | of its FLOPs | reached | baseline |",
        "|---|---|---|---|---|---|",
    ]
    for group in (group for group in result["groups"] if not only or group["group"] in only):
        batch = f", batch {group['batch']}" if group["batch"] else ""
        lines.append(f"| **{group['group']}** ({group['trains']}{batch}; {group['rounds']} rounds) | | | | | |")
        for row in group["rows"]:
            if "left_out" in row:
                lines.append(f"| {row['variant']} | left out: {row['left_out']} | | | | |")
                continue
            low, high = row["spread"]
            figures = f"{row['seconds']:.2f} | {row['time_ratio']:.2f} ({low:.2f} to {high:.2f})"
            rest = f"{row['flops_ratio']:.2f} | {row['reached']:.2f} | {row['baseline']}"
            lines.append(f"| {row['variant']} | {figures} | {rest} |")
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
        "| map | layout | tokens | ms an image | time, of the loop's | time, of one global resampler's |",
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


def data_table(name: str, result: dict) -> str:
    """Time per sample of ways to batch, and what the feature cache does to the demo's training."""
    hardware, (cached, plain) = result["env"]["hardware"], result["demo"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores" if result["device"] == "cpu" else result["device"]
    lines = [
        f"**{name}**: SmolLM2-135M, images with captions that people wrote, batches of {result['positions']} "
        f"positions ({where}; {result['precision']}; medians; `benchmarks/results/{result['file']}`)",
        "",
        "| layout | batches | not padding | ms a sample | of the padded one's |",
        "|---|---|---|---|---|",
    ]
    for row in result["packing"]:
        figures = f"{row['filled']:.0%} | {1e3 * row['seconds_per_sample']:.0f} | {row['ratio']:.2f}"
        lines.append(f"| `{row['layout']}` | {row['way']} | {figures} |")
    lines += [
        "",
        f"The demo's pre-training in the same file: {cached['seconds_per_step']:.2f} s a step from the feature cache, "
        f"{plain['seconds_per_step']:.2f} s without; {cached['data_wait']:.1%} and {plain['data_wait']:.1%} of the "
        "time waiting for data.",
    ]
    return "\n".join(lines)


def shards_table(name: str, result: dict) -> str:
    """Tar shards: index, resume, memory."""
    seconds = {key: result[f"{key}_seconds"]["median"] for key in ("indexing", "resume")}
    resident = result["reading"]["resident_MB"]
    return (
        f"**{name}**: {result['samples']:,} samples in {result['shards']} tar shards "
        f"(`benchmarks/results/{result['file']}`): index in {seconds['indexing']:.1f} s, first batch after a resume at "
        f"90% in {seconds['resume']:.2f} s; resident memory {resident[0]:.0f} MB after a thousand samples, read in "
        f"random order, and {resident[-1]:.0f} MB after ten thousand."
    )


def pins_table(name: str, result: dict) -> str:
    """Which versions pip finds together with this package, one trainer or engine at a time."""
    lines = [
        f"What `pip install --dry-run` finds beside this package (commit {result['commit']}, {result['date']}, Python "
        f"{result['python']}; `benchmarks/results/{result['file']}`, made by `scripts/pins.py`)",
        "",
        "| package | its pin | resolves | with transformers | with torch |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        pin = f"`{row['pin']}`" if row.get("pin") else ""
        found = "yes" if row["resolves"] else f"no: {row['reason']}"
        if row.get("left_out"):
            found += f" (without {', '.join(row['left_out'])}, which its own command cannot build here either)"
        cells = (
            f"{row['package']} {row.get('version', '')}",
            pin,
            found,
            row.get("transformers", ""),
            row.get("torch", ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The core rows, and the other ordinary bridge, in words that need no key.
SHOWN = {
    "standard": "*standard*: resampler, 336 tokens",
    "cos 24-24": "24 tokens throughout",
    "cos 24-24 sts": "24 tokens throughout, layer skipper in fine-tuning",
    "cos 32-32": "32 tokens throughout",
    "cos 32-336 settled": "32 tokens, then 336",
    "cos 32-336 settled sts": "32 tokens, then 336, layer skipper in fine-tuning",
    "linear": "LLaVA's MLP, 256 tokens",
}
CORE = tuple(row for row in SHOWN if row != "linear")
# The papers' orderings: what is said, the row that should be ahead, the other one.
ORDERINGS = (
    ("Several scales beat one at as many tokens (32)", "cos 32-32", "single 32-32"),
    ("Several scales beat one at as many tokens (80)", "cos 80-80", "single 80-80"),
    ("Scaling after pre-training gains (32 to 336)", "cos 32-336", "cos 32-32"),
    ("Scaling after pre-training gains (80 to 336)", "cos 80-336", "cos 80-80"),
    ("The same with positions of the scaled layout (ours; 32 to 336)", "cos 32-336 positions", "cos 32-32"),
    ("Positions of the scaled layout in pre-training gain (ours; 32 to 336)", "cos 32-336 positions", "cos 32-336"),
    ("Local scaling beats global scaling (32 to 80, to 96)", "cos 32-80 local", "cos 32-96 global"),
    ("Scales that start from source scales beat fresh ones (32 to 336)", "cos 32-336", "cos 32-336 fresh"),
    ("Coarse to fine beats fine to coarse (32)", "cos 32-32", "fine to coarse 32-32"),
    (
        "A falling share of skipped layers beats a constant one (20% skipped by their chances, both)",
        "skipper falling",
        "skipper constant",
    ),
    (
        "A falling share of skipped layers beats a rising one (20% skipped by their chances against 59%)",
        "skipper falling",
        "skipper rising",
    ),
)


def entries(result: dict, data: str = "scenes", split: int = 1) -> dict[str, list[dict]]:
    """Scored entries by row, a seed each, with the settings that were best on validation. ``split`` 5 is the one in
    which fine-tuning takes half; a row with a shorter fine-tuning says so."""
    tested = [entry for entry in result["rows"] if entry["data"] == data and "test" in entry]
    mine = [entry for entry in tested if (entry["settings"]["late"] > 1) == (split > 1)]
    named: dict[str, list[dict]] = {}
    for entry in sorted(mine, key=lambda entry: entry["seed"]):
        late = entry["settings"]["late"]
        named.setdefault(entry["row"] + (f", {late:g} of fine-tuning" if late < 1 else ""), []).append(entry)
    found = {}
    for row, each in named.items():
        tried = [entry for entry in each if "validation" in entry] or each[:1]
        best = max(tried, key=lambda entry: fmean(entry.get("validation", entry["test"])["scores"].values()))[
            "settings"
        ]
        found[row] = [entry for entry in each if entry["settings"] == best]
    return found


def flops(entry: dict, early: bool = False) -> float:
    """Executed FLOPs of a run, or of its pre-training."""
    late = ("settle", "finetune") if early else ()
    return sum(stage["executed_flops"] for stage in entry["stages"] if stage["name"] not in late)


def seconds(result: dict, entry: dict) -> float | None:
    """What an entry's steps, and encoding its images, take by the clock of its row; None without one."""
    clocked = {row["row"]: row["stages"] for row in result.get("clock", {"rows": []})["rows"]}
    if entry["row"] not in clocked or entry["data"] != "scenes":
        return None
    pairs = zip(entry["stages"], clocked[entry["row"]], strict=True)
    return sum(stage["planned_steps"] * step["seconds"] + step["encoding"] for stage, step in pairs)


def quality_table(
    name: str, result: dict, data: str = "scenes", split: int = 1, names: Mapping[str, str] | None = None
) -> str:
    """Rows of the quality benchmark: cost relative to the standard row (where it did not run, to cos 24-24),
    and scores by task, means over seeds. ``names``: only these rows, and how they are called."""
    rows, hardware = entries(result, data, split), result["env"]["hardware"]
    rows = {row: seeds for row, seeds in rows.items() if names is None or row in names}
    which = data + (", fine-tuning half of *standard*'s time" if split > 1 else "")
    base = next((row for row in ("standard", "cos 24-24") if row in rows), None)
    if base is None:
        return f"**{name}**, {which}: not run yet"
    (first, *_), tasks = rows[base], list(rows[base][0]["test"]["scores"])
    whole = seconds(result, first)
    lines = [
        f"**{name}**, {which}: test scores in percent, means over seeds; cost relative to *{base}*, of pre-training "
        f"alone in brackets ({hardware['cpu']}, {hardware['cores']} cores; `benchmarks/results/{result['file']}`)",
        "",
        "| row | tokens by stage | FLOPs | time | " + " | ".join(tasks) + " | mean | seeds |",
        "|---" * (len(tasks) + 6) + "|",
    ]
    for row, seeds in sorted(rows.items(), key=lambda pair: (pair[0] != base, flops(pair[1][0]))):
        tokens = ", ".join(str(stage["visual_tokens"]) for stage in seeds[0]["stages"])
        cost = f"{flops(seeds[0]) / flops(first):.2f} ({flops(seeds[0], True) / flops(first, True):.2f})"
        mine = seconds(result, seeds[0])
        clock = f"{mine / whole:.2f}" if mine and whole else ""
        means = {task: fmean(entry["test"]["scores"][task] for entry in seeds) for task in tasks}
        total = bootstrap(*grouped(seeds))
        mean = f"{100 * total.mean:.1f} ({100 * total.low:.1f} to {100 * total.high:.1f})"
        fp32 = sum(entry.get("precision") == "fp32" for entry in seeds)
        precision = "" if not fp32 else " (fp32)" if fp32 == len(seeds) else f" ({fp32} of {len(seeds)} in fp32)"
        shown = (names or {}).get(row, row) + precision
        cells = [shown, tokens, cost, clock, *(f"{100 * means[task]:.0f}" for task in tasks), mean, str(len(seeds))]
        lines.append("| " + " | ".join(cells) + " |")
    control = first["test"]["shuffled"]
    cells = [f"*{base}*, shuffled images", "", "", "", *(f"{100 * control[task]:.0f}" for task in tasks), "", "1"]
    return "\n".join([*lines, "| " + " | ".join(cells) + " |"])


def grouped(seeds: list[dict]) -> tuple[list[list[float]], list[int], list[str]]:
    """Points of each seed, and image and task of each point, as `sparsight.evaluation.significance` takes them."""
    points = [[*chain(*entry["test"]["points"].values())] for entry in seeds]
    images = seeds[0]["test"]["images"]
    return points, [*chain(*images.values())], [task for task, own in images.items() for _ in own]


def margins_table(name: str, result: dict) -> str:
    """Each task of the core rows against the standard row, by paired tests over common seeds."""
    rows = entries(result)
    alike = lambda entry: (entry["seed"], entry.get("precision", "bf16"))  # noqa: E731
    standard = {alike(entry): entry for entry in rows.get("standard", [])}
    tasks = list(rows["standard"][0]["test"]["scores"]) if standard else []
    lines = [
        f"Task by task against *standard* (`benchmarks/results/{result['file']}`): difference in points and its 95% "
        "interval over images and seeds; bold where the score is below 99% of *standard*'s.",
        "",
        "| row | " + " | ".join(tasks) + " | seeds |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for row in [row for row in rows if row in CORE and row != "standard"]:
        pairs = [(entry, standard[alike(entry)]) for entry in rows[row] if alike(entry) in standard]
        cells = []
        for task in tasks if pairs else ():
            ours, theirs = ([entry["test"]["points"][task] for entry in side] for side in zip(*pairs, strict=True))
            test = paired_test(ours, theirs, pairs[0][0]["test"]["images"][task])
            cell = f"{100 * test.difference:+.0f} ({100 * test.low:+.0f} to {100 * test.high:+.0f})"
            below = fmean(chain(*ours)) < 0.99 * fmean(chain(*theirs))
            cells.append(f"**{cell}**" if below else cell)
        lines.append("| " + " | ".join([row, *cells, str(len(pairs))]) + " |")
    return "\n".join(lines)


def orderings_table(name: str, result: dict) -> str:
    """The papers' orderings, by paired tests over the seeds that both rows have with the same settings."""
    rows: dict[str, dict[str, dict[int, dict]]] = {}  # row -> settings -> seed -> entry
    for entry in result["rows"]:
        if "test" in entry and entry["data"] == "scenes" and entry["settings"]["late"] == 1:
            settings = str(sorted((key, float(value)) for key, value in entry["settings"].items()))
            settings += entry.get("precision", "bf16")  # which moves a score as far as another seed does
            rows.setdefault(entry["row"], {}).setdefault(settings, {})[entry["seed"]] = entry
    means = [
        [fmean(entry["test"]["scores"].values()) for entry in seeds.values()]
        for tried in rows.values()
        for seeds in tried.values()
    ]
    spread = max((max(each) - min(each) for each in means), default=0.0)
    lines = [
        f"The papers' orderings in `benchmarks/results/{result['file']}`: difference of the mean score in points, 95% "
        "interval over images and seeds, p-value of the paired test. *Reproduced*: the interval is above zero; "
        "*contrary*: below; else *not seen at this scale*. Of one seed, the interval does not hold what another one "
        f"would change: means of a row's seeds lie up to {100 * spread:.1f} points apart.",
        "",
        "| ordering | difference | p | seeds | |",
        "|---|---|---|---|---|",
    ]
    for text, ahead, behind in ORDERINGS:
        both = rows.get(ahead, {}), rows.get(behind, {})
        common = [(each, sorted(set(both[0][each]) & set(both[1][each]))) for each in both[0] if each in both[1]]
        settings, seeds = max(common, key=lambda pair: len(pair[1]), default=("", []))
        if not seeds:
            lines.append(f"| {text} | | | 0 | not run |")
            continue
        ours, theirs = ([side[settings][seed] for seed in seeds] for side in both)
        points, images, tasks = grouped(ours)
        test = paired_test(points, grouped(theirs)[0], images, tasks)
        word = "reproduced" if test.low > 0 else "contrary" if test.high < 0 else "not seen at this scale"
        figures = f"{100 * test.difference:+.1f} ({100 * test.low:+.1f} to {100 * test.high:+.1f})"
        p_value = f"{test.p_value:.3f}" if test.p_value >= 0.001 else "< 0.001"
        lines.append(f"| {text} | {figures} | {p_value} | {len(seeds)} | {word} |")
    return "\n".join(lines)


# Rows of the figure: what they are to a stranger, and where their text stands beside the point (x, y in points).
FIGURE = {
    "standard": ("standard: a resampler of 336 queries,\n336 visual tokens throughout", "right", (-9, 0)),
    "linear": ("LLaVA's MLP on each of 256 patches,\n256 visual tokens throughout", "left", (9, 0)),
    "cos 24-24": ("Chain-of-Sight,\n24 visual tokens throughout", "left", (9, 2)),
    "cos 32-336 settled": ("Chain-of-Sight,\n32 visual tokens, then 336", "left", (9, -14)),
}


def draw(result: dict, file: Path) -> None:
    """Cost of the whole training against the mean score, with its 95% interval: the rows of `FIGURE`. The figure has a
    ground of its own, so that it can be read on a light page and on a dark one."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "sparsight", "font.size": 11, "svg.fonttype": "none"}
    matplotlib.rcParams |= {"figure.constrained_layout.w_pad": 0.15, "figure.constrained_layout.h_pad": 0.15}
    rows = entries(result)
    figure, panel = pyplot.subplots(figsize=(8.6, 4.4), layout="constrained", facecolor="white")
    for row, (text, side, offset) in FIGURE.items():
        seeds, colour = rows[row], "#1f5fa8" if row.startswith("cos") else "#6b6b6b"
        total, cost = bootstrap(*grouped(seeds)), flops(seeds[0]) / flops(rows["standard"][0])
        low, high = 100 * (total.mean - total.low), 100 * (total.high - total.mean)
        style: dict = {"fmt": "o", "color": colour, "markersize": 8, "elinewidth": 1.2, "capsize": 3}
        panel.errorbar(cost, 100 * total.mean, [[low], [high]], **style)
        text += (
            f"\n{100 * total.mean:.0f}% at {cost:.2f} of the cost ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
        )
        place: dict = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center", "linespacing": 1.35}
        panel.annotate(text, (cost, 100 * total.mean), color=colour, **place)
    panel.set(xlim=(0, 1.08), ylim=(76, 98), xlabel="cost: executed FLOPs of the whole training (standard = 1)")
    panel.set_ylabel("mean score of seven tasks, %")
    panel.set(xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[80, 85, 90, 95])
    panel.grid(alpha=0.3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


RENAMED = {'"cos 32-336 places"': '"cos 32-336 positions"', '"pictures"': '"images"'}  # results are written once


def newest(folder: Path) -> dict[str, dict]:
    """The newest result of each name: NAME-DATE.json, DATE as in 2026-11-21 or 2026-11-21T0829."""
    files = {file.name[: file.name.index("-20")]: file for file in sorted(folder.glob("*-????-??-??*.json"))}
    found = {}
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        for old, new in RENAMED.items():
            text = text.replace(old, new)
        found[name] = json.loads(text) | {"file": file.name}
    return found


core = partial(quality_table, names=SHOWN)
methods = partial(speed_table, only=("methods", "idle"))
Show = Callable[[str, dict], str]
# Page -> results whose names begin so, and how they are shown.
PAGES: dict[str, list[tuple[str, Show]]] = {
    "README.md": [("quality", core), ("demo", table), ("scenes-60min", table)],
    "docs/chain-of-sight.md": [("bridge-", bridge_table), ("scaling", scaling_table)],
    "docs/quality.md": [
        ("quality", quality_table),
        ("quality", partial(quality_table, split=5)),
        ("quality", partial(quality_table, data="details")),
        ("quality", partial(quality_table, data="easy-vqa")),
        ("quality", margins_table),
        ("quality", orderings_table),
    ],
    "docs/speed.md": [("speed-", speed_table)],
    "docs/data.md": [("data-", data_table), ("shards", shards_table)],
    "docs/methods/chain-of-sight.md": [("quality", core), ("scenes-60min", table)],
    "docs/methods/compressor.md": [("speed-", methods), ("sparse-scenes", table)],
    "docs/methods/skipper.md": [("speed-", methods), ("sparse-scenes", table)],
    "docs/trainers/README.md": [("pins", pins_table)],
    "docs/tutorials/choosing-a-layout.md": [("quality", quality_table)],
}


def render(page: str, folder: Path = ROOT / "benchmarks/results") -> str:
    """What stands between the marks of a page."""
    results = newest(folder)
    shown = [show(name, r) for start, show in PAGES[page] for name, r in results.items() if name.startswith(start)]
    return "\n\n".join(["## What was measured", *shown] if page == "README.md" else shown)


def main() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        before, rest = text.split(START)
        after = rest.split(END)[1]
        (ROOT / page).write_text(f"{before}{START}\n{render(page)}\n\n{END}{after}", encoding="utf-8")
    draw(newest(ROOT / "benchmarks/results")["quality"], ROOT / "docs/quality.svg")


if __name__ == "__main__":
    main()
