"""Write the tables of README and docs from the newest results in benchmarks/results/. A test checks them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sparsight.evaluation.significance import Graded, PairedTest, bootstrap, by_grade, paired_test

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


def evaluate_table(name: str, result: dict) -> str:
    """Times of an evaluation, way by way."""
    hardware = result["env"]["hardware"]
    where = f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    lines = [
        f"**{name}**: a model of the demo on its scenes, fp32, medians of {result['rounds']} rounds ({where}; "
        f"`benchmarks/results/{result['file']}`)",
        "",
        "| way | against | time | answers alike |",
        "|---|---|---|---|",
    ]
    for way, row in result["rows"].items():
        lines.append(f"| {way} | {row['against']} | {row['ratio']:.2f} | {row['same']} of {row['of']} |")
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


def ranks_table(name: str, result: dict) -> str:
    """Weak and strong scaling over this machine's ranks, by the clock."""
    loads = [row["load_before"] for row in result["rows"]]
    where = f"{result['env']['hardware']['cpu']}, {result['cores']} cores; medians of {result['steps']} steps"
    lines = [
        f"**Measured** ({where}; load of the machine before the runs {min(loads):.1f} to {max(loads):.1f}; "
        f"`benchmarks/results/{result['file']}`)",
        "",
        "| | ranks | samples a step | seconds | CPU seconds of the first rank | all-reduce alone, seconds | speed-up | "
        "cores allow |",
        "|---" * 8 + "|",
    ]
    for row in result["rows"]:
        cells = (row["kind"], row["ranks"], row["batch"], f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}")
        rest = (f"{row['all_reduce_seconds']:.3f}", f"{row['speedup']:.2f}", row["at_most"])
        lines.append("| " + " | ".join(map(str, (*cells, *rest))) + " |")
    return "\n".join(lines)


def cluster_table(name: str, result: dict, kind: str) -> str:
    """Computed steps by engine and number of GPUs."""
    rows = [row for row in result["scaling"] if row["kind"] == kind]
    each = "16 samples on each GPU" if kind == "weak" else "1,024 samples over all GPUs"
    lines = [
        f"**Computed, {kind} scaling**: {each} ({result['machine']['name']}; `benchmarks/results/{result['file']}`)",
        "",
        "| engine | GPUs | seconds a step | computing | communication that nothing hides | waiting | optimizer | "
        "GB a GPU | efficiency | breaks |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        parts = (f"{row[key] / row['seconds']:.0%}" for key in ("compute", "communication", "waiting", "optimizer"))
        cells = (row["engine"], f"{row['gpus']:,}", f"{row['seconds']:.2f}", *parts, f"{row['gigabytes']:.0f}")
        lines.append("| " + " | ".join((*cells, f"{row['efficiency']:.2f}", row["breaks"])) + " |")
    return "\n".join(lines)


def waiting_table(name: str, result: dict) -> str:
    """Work of the rank that has most over the mean, as samples are dealt out."""
    lines = [
        f"**Computed, unequal samples**: work of the rank that has most, over the mean "
        f"(`benchmarks/results/{result['file']}`)",
        "",
        "| GPUs | samples on each | as `plan_steps` deals them out | at random |",
        "|---|---|---|---|",
    ]
    for row in result["waiting"]:
        lines.append(f"| {row['gpus']:,} | {row['samples_per_gpu']} | {row['planned']:.2f} | {row['at_random']:.2f} |")
    return "\n".join(lines)


def published_table(name: str, result: dict) -> str:
    """What papers say beside what is computed; within 15%, or not."""
    lines = [
        f"**Published figures**, and the same computed (`benchmarks/results/{result['file']}`)",
        "",
        "| | published | computed | off by | within 15% | how |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["published"]:
        word = "yes" if abs(row["off"]) <= 0.15 else "no"
        figures = f"{row['published']:.3g} | {row['computed']:.3g} | {row['off']:+.0%} | {word}"
        lines.append(f"| {row['what']} | {figures} | {row['how']} |")
    return "\n".join(lines)


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


@dataclass(frozen=True)
class Figure:
    """Cost against score. ``rows``: what they are to a stranger, and where their text stands beside the point (x, y in
    points); ``axes``: as matplotlib takes them."""

    data: str
    tasks: str
    rows: dict[str, tuple[str, str, tuple[int, int]]]
    axes: dict[str, Any]


FIGURE = Figure(
    "scenes",
    "seven",
    {
        "resampler-336": ("A resampler of 336 queries,\n336 visual tokens throughout", "right", (-9, 0)),
        "mlp-256": ("LLaVA's MLP on each of 256 patches,\n256 visual tokens throughout", "left", (9, -14)),
        "cos 24-24": ("Chain-of-Sight,\n24 visual tokens throughout", "left", (9, 32)),
        "cos 24-24, longer": ("Chain-of-Sight, 24 visual tokens,\ntwice the pre-training", "left", (9, 8)),
        "cos 32-336 settled": ("Chain-of-Sight,\n32 visual tokens, then 336", "left", (9, -26)),
    },
    {"xlim": (0, 1.72), "ylim": (76, 99.5), "xticks": [0, 0.5, 1, 1.5], "yticks": [80, 85, 90, 95]},
)

PRETRAINED = Figure(
    "smollm2",
    "ten",
    {
        "mlp-256": ("LLaVA's MLP on each of 256 patches,\n256 visual tokens throughout", "left", (9, 0)),
        "mlp-256 + compressor": ("The same, a quarter of its tokens\nin alignment", "right", (-9, 4)),
        "mlp-256 + both": (
            "The same with the Sparse Training Scheme:\ncompressor, then layer skipper",
            "left",
            (9, 0),
        ),
        "mlp-256 + both, visual": ("That scheme, and text goes\nthrough skipped layers (ours)", "left", (9, 0)),
        "cos 32-32": ("Chain-of-Sight,\n32 visual tokens throughout", "left", (-70, -36)),
    },
    {"xlim": (0, 1.6), "ylim": (30, 72), "xticks": [0, 0.25, 0.5, 0.75, 1], "yticks": [30, 40, 50, 60, 70]},
)

BASELINES = ("mlp-256", "resampler-336")  # the ordinary bridges; all ratios are to the better one
# The core rows, in words that need no key.
SHOWN = {
    "mlp-256": "LLaVA's MLP, 256 tokens",
    "resampler-336": "resampler, 336 tokens",
    "cos 24-24": "24 tokens throughout",
    "cos 24-24, longer": "24 tokens throughout, twice the pre-training",
    "cos 24-24 sts": "24 tokens throughout, layer skipper in fine-tuning",
    "cos 32-32": "32 tokens throughout",
    "cos 32-336 settled": "32 tokens, then 336",
    "cos 32-336 settled sts": "32 tokens, then 336, layer skipper in fine-tuning",
    "mlp-256 + compressor": "LLaVA's MLP, a quarter of its tokens in alignment",
    "mlp-256 + both": "LLaVA's MLP and the Sparse Training Scheme",
    "mlp-256 + both, visual": "LLaVA's MLP and the scheme with text through skipped layers (ours)",
}
# What the short table shows of each kind of data: its title, and rows beside the baseline.
SHORT = {
    "scenes": ("Drawings; a small language model from scratch", FIGURE.rows),
    "photos": ("Photographs; a small language model from scratch", ("mlp-256", "cos 24-24")),
    "smollm2": ("Drawings; a pretrained language model (SmolLM2-135M, LoRA)", PRETRAINED.rows),
}
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


def quality(folder: Path) -> dict:
    """All rows of the quality benchmark: of the file in which they lay together at first, and one file each since then.
    ``own``: whether an entry says itself where it was run."""
    first = json.loads((folder / "quality-2026-11-21.json").read_text(encoding="utf-8"))
    rows: dict[str, dict] = {}
    for entry in first["rows"]:
        name = (
            entry["row"]
            .replace("standard", BASELINES[1])
            .replace("linear", BASELINES[0])
            .replace("places", "positions")
        )
        if test := entry.get("test", {}):
            test["images"] = test.pop("pictures", None) or test["images"]
        entry |= {"row": name, "own": False, "precision": entry.get("precision", "bf16")}
        rows[same(entry)] = entry
    for file in sorted((folder / "quality").glob("*.json"), key=lambda file: file.stem.rsplit("-", 1)[-1]):
        entry = json.loads(file.read_text(encoding="utf-8"))
        rows[same(entry)] = rows.get(same(entry), {}) | entry | {"own": True}
    clocks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("quality-clock-*.json"))]
    clock = {each.get("data", "scenes"): each for each in [first["clock"], *clocks]}
    for each in clock.values():
        each["rows"] = [row | {"row": row["row"].replace("standard", BASELINES[1])} for row in each["rows"]]
    return {"rows": list(rows.values()), "clock": clock}


def same(entry: dict) -> str:
    """Equal for results that take each other's place."""
    settings = {key: float(value) for key, value in entry["settings"].items()}
    return json.dumps([entry["data"], entry["row"], entry["seed"], settings, entry["precision"]], sort_keys=True)


Rows = dict[tuple[str, str], list[dict]]  # scored entries by row and precision, a seed each


def entries(result: dict, data: str = "scenes", split: int = 1) -> Rows:
    """Scored entries by row and precision, a seed each, with the settings that were best on validation. ``split`` 5 is
    the one in which fine-tuning takes half."""
    mine = [entry for entry in result["rows"] if entry["data"] == data]
    mine = [entry for entry in mine if (entry["settings"]["late"] == 5) == (split == 5)]
    found: Rows = {}
    for key in dict.fromkeys((entry["row"], entry["precision"]) for entry in mine if "test" in entry):
        each = [entry for entry in mine if (entry["row"], entry["precision"]) == key]
        tried = [entry for entry in each if "validation" in entry]
        tested = sorted((entry for entry in each if "test" in entry), key=lambda entry: entry["seed"])
        best = max(tried or tested[:1], key=lambda e: fmean(e.get("validation", e.get("test"))["scores"].values()))
        seeds = [entry for entry in tested if entry["settings"] == best["settings"]]
        found[key] = [entry | {"tried": len(tried or tested[0].get("tried", ())) or 1} for entry in seeds or tested]
    return found


def baseline(rows: Rows) -> tuple[str, str] | None:
    """The better of the ordinary bridges; where none has run, 24 tokens."""
    there = [key for key in rows if key[0] in BASELINES] or [key for key in rows if key[0] == "cos 24-24"]
    return max(there, key=lambda key: fmean(map(mean, rows[key])), default=None)


def mean(entry: dict) -> float:
    """Mean score of the tasks on the test split."""
    return fmean(entry["test"]["scores"].values())


def flops(entry: dict, early: bool = False) -> float:
    """Executed FLOPs of a run, or of its pre-training."""
    late = ("settle", "finetune") if early else ()
    return sum(stage["executed_flops"] for stage in entry["stages"] if stage["name"] not in late)


def seconds(result: dict, entry: dict) -> float | None:
    """What an entry's steps, and encoding its images, take by the clock of its row; None without one."""
    clocked = {row["row"]: row["stages"] for row in result["clock"].get(entry["data"], {"rows": ()})["rows"]}
    if entry["row"] not in clocked:
        return None
    pairs = zip(entry["stages"], clocked[entry["row"]], strict=True)
    return sum(stage["planned_steps"] * step["seconds"] + step["encoding"] for stage, step in pairs)


def quality_table(
    name: str, result: dict, data: str = "scenes", split: int = 1, names: Mapping[str, str] | None = None
) -> str:
    """Rows of the quality benchmark: cost relative to the better ordinary bridge, and scores by task, means over
    seeds. ``names``: only these rows, and how they are called."""
    rows = entries(result, data, split)
    rows = {key: seeds for key, seeds in rows.items() if names is None or key[0] in names}
    which = data + (", fine-tuning half of the resampler's time" if split > 1 else "")
    if (base := baseline(rows)) is None:
        return f"**quality**, {which}: not run yet"
    (first, *_), tasks = rows[base], list(rows[base][0]["test"]["scores"])
    timed = f", {result['clock'][data].get('precision', 'bf16')}" if data in result["clock"] else ": not measured"
    called, whole = (names or {}).get(base[0], base[0]), seconds(result, first)
    lines = [
        f"**quality**, {which}: test scores in percent, means over seeds; cost relative to *{called}*, of pre-training "
        f"alone in brackets; time of steps in turn{timed} (`benchmarks/results/quality/`; rows with * have seeds "
        "of one file, `quality-2026-11-21.json`, which names one machine and commit for all of them)",
        "",
        "| row | tokens by stage | FLOPs | time | " + " | ".join(tasks) + " | mean | seeds | settings tried |",
        "|---" * (len(tasks) + 7) + "|",
    ]
    for key, seeds in sorted(rows.items(), key=lambda pair: (pair[0] != base, flops(pair[1][0]))):
        tokens = ", ".join(str(stage["visual_tokens"]) for stage in seeds[0]["stages"])
        cost = f"{flops(seeds[0]) / flops(first):.2f} ({flops(seeds[0], True) / flops(first, True):.2f})"
        mine = seconds(result, seeds[0])
        clock = f"{mine / whole:.2f}" if mine and whole else ""
        means = (fmean(entry["test"]["scores"][task] for entry in seeds) for task in tasks)
        total = bootstrap(*grouped(seeds))
        shown = (names or {}).get(key[0], key[0]) + f" ({key[1]})" + "*" * any(not entry["own"] for entry in seeds)
        all_tasks = f"{100 * total.mean:.1f} ({100 * total.low:.1f} to {100 * total.high:.1f})"
        cells = [shown, tokens, cost, clock, *(f"{100 * score:.0f}" for score in means), all_tasks]
        lines.append("| " + " | ".join([*cells, str(len(seeds)), str(seeds[0]["tried"])]) + " |")
    if control := first["test"].get("shuffled"):
        cells = [f"*{called}*, shuffled images", "", "", "", *(f"{100 * control[task]:.0f}" for task in tasks)]
        lines.append("| " + " | ".join([*cells, "", "1", ""]) + " |")
    return "\n".join(lines)


def chosen(result: dict, data: str, names: Iterable[str]) -> tuple[Rows, tuple[str, str]]:
    """These rows, each in the baseline's precision if it was run in that, and the baseline's key."""
    rows = entries(result, data)
    base = baseline(rows)
    assert base is not None
    best = {key[0]: key for key in sorted(rows, key=lambda key: (key[1] == base[1], len(rows[key])))}
    return {best[row]: rows[best[row]] for row in names if row in best}, base


def headline(name: str, result: dict, row: str = "cos 24-24") -> str:
    """One sentence: the baseline, what a row costs of it, whether it is ahead, and its worst task."""
    rows, base = chosen(result, "scenes", [*BASELINES, row])
    ours = next(seeds for key, seeds in rows.items() if key[0] == row)
    cost, clock = flops(ours[0]) / flops(rows[base][0]), [seconds(result, each) for each in (ours[0], rows[base][0])]
    assert clock[0] and clock[1], "both are clocked"
    all_tasks, task, worst = extremes(ours, rows[base])
    word = "is ahead" if all_tasks.low > 0 else "is behind" if all_tasks.high < 0 else "is not told apart"
    return (
        f"Against {SHOWN[base[0]]}, the better of the two usual bridges, tuned alike, a training with {SHOWN[row]} "
        f"executes {cost:.2f} of the FLOPs in {clock[0] / clock[1]:.2f} of the time; its mean score {word}, "
        f"{points(all_tasks)} points, and its worst task is {task}, {points(worst)}."
    )


def short_table(name: str, result: dict) -> str:
    """What rows on each kind of data cost of their baseline, their mean score, and their worst task."""
    lines = [
        "| trained with | FLOPs | time | mean score, % | against the MLP, points | worst task, points | seeds |",
        "|---" * 7 + "|",
    ]
    for data, (title, names) in SHORT.items():
        rows, base = chosen(result, data, names)
        (first, *_), whole = rows[base], seconds(result, rows[base][0])
        lines.append(f"| **{title}** | | | | | | |")
        for key, seeds in sorted(rows.items(), key=lambda pair: (pair[0] != base, flops(pair[1][0]))):
            total, mine = bootstrap(*grouped(seeds)), seconds(result, seeds[0])
            clock = f"{mine / whole:.2f}" if mine and whole else ""
            score = f"{100 * total.mean:.1f} ({100 * total.low:.1f} to {100 * total.high:.1f})"
            against = ["", ""]
            if key != base and paired(seeds, rows[base]):
                all_tasks, task, worst = extremes(seeds, rows[base])
                against = [points(all_tasks), f"{task} {points(worst)}"]
            cells = (f"{SHOWN[key[0]]} ({key[1]})", f"{flops(seeds[0]) / flops(first):.2f}", clock, score, *against)
            lines.append("| " + " | ".join([*cells, str(len(seeds))]) + " |")
    lines += [
        "",
        "In brackets 95% intervals over images and seeds; of one seed they do not hold what another one would change. "
        "Rows in another precision than the MLP's are not set against it. Time: of steps in turn, where measured.",
    ]
    return "\n".join(lines)


def grouped(seeds: list[dict]) -> tuple[list[list[float]], list[int], list[str]]:
    """Points of each seed, and image and task of each point, as `sparsight.evaluation.significance` takes them."""
    points = [[*chain(*entry["test"]["points"].values())] for entry in seeds]
    images = seeds[0]["test"]["images"]
    return points, [*chain(*images.values())], [task for task, own in images.items() for _ in own]


def paired(ours: list[dict], theirs: list[dict]) -> list[tuple[dict, dict]]:
    """Entries of two rows that have seed and precision in common."""
    alike = lambda entry: (entry["seed"], entry["precision"])  # noqa: E731
    return [(a, b) for a in ours for b in theirs if alike(a) == alike(b)]


def margins(ours: list[dict], theirs: list[dict]) -> tuple[dict[str, tuple[PairedTest, bool]], int]:
    """By task, and for their mean, the paired test of two rows over the seeds that both have in one precision, and
    whether ours is below 99% of theirs; and how many seeds those are."""
    pairs, found = paired(ours, theirs), {}
    for task, images in pairs[0][0]["test"]["images"].items() if pairs else ():
        mine, other = ([entry["test"]["points"][task] for entry in side] for side in zip(*pairs, strict=True))
        found[task] = paired_test(mine, other, images), fmean(chain(*mine)) < 0.99 * fmean(chain(*other))
    if pairs:
        sides = [list(side) for side in zip(*pairs, strict=True)]
        (mine, images, tasks), (other, *_) = map(grouped, sides)
        ahead, behind = (fmean(map(mean, side)) for side in sides)
        found["mean"] = paired_test(mine, other, images, tasks), ahead < 0.99 * behind
    return found, len(pairs)


def extremes(ours: list[dict], theirs: list[dict]) -> tuple[PairedTest, str, PairedTest]:
    """A row against another one: the mean of all tasks, and the task that pays most with its name."""
    tasks = {task: test for task, (test, _) in margins(ours, theirs)[0].items()}
    all_tasks = tasks.pop("mean")
    task = min(tasks, key=lambda task: tasks[task].difference)
    return all_tasks, task, tasks[task]


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def points(test: PairedTest) -> str:
    return f"{100 * test.difference:+.1f} ({100 * test.low:+.1f} to {100 * test.high:+.1f})"


def margins_table(name: str, result: dict, data: str = "scenes") -> str:
    """Each task of the core rows against the better ordinary bridge; nothing where none has run."""
    rows = entries(result, data)
    if (base := baseline(rows)) is None:
        return ""
    tasks = list(rows[base][0]["test"]["scores"])
    lines = [
        f"Task by task against *{base[0]}* in {base[1]}, {data}: difference in points and its 95% interval over images "
        f"and seeds that both have; bold where the score is below 99% of *{base[0]}*'s.",
        "",
        "| row | " + " | ".join(tasks) + " | mean | seeds |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for key in [key for key in rows if key[0] in SHOWN and key != base]:
        found, seeds = margins(rows[key], rows[base])
        cells = []
        for test, below in found.values():
            cell = f"{100 * test.difference:+.0f} ({100 * test.low:+.0f} to {100 * test.high:+.0f})"
            cells.append(f"**{cell}**" if below else cell)
        if seeds:
            lines.append("| " + " | ".join([key[0], *cells, str(seeds)]) + " |")
    return "\n".join(lines)


def variants(result: dict, data: str) -> list[tuple[str, float, list[dict], list[dict]]]:
    """Of each row that differs from the baseline in fine-tuning's methods alone: its name without the baseline's, FLOPs
    of fine-tuning as a share of the baseline's, and entries of both that have a seed in common; the cheapest first."""
    rows = entries(result, data)
    base = baseline(rows)
    assert base is not None
    found = []
    for (row, _), seeds in rows.items():
        pairs = paired([entry for entry in seeds if entry["own"]], rows[base]) if row != base[0] else []
        if pairs and all(a["recipe"]["stages"][:-1] == b["recipe"]["stages"][:-1] for a, b in pairs):
            mine, theirs = (list(side) for side in zip(*pairs, strict=True))
            cost = fmean(map(tuning_flops, mine)) / fmean(map(tuning_flops, theirs))
            found.append((row.removeprefix(f"{base[0]}, "), cost, mine, theirs))
    return sorted(found, key=lambda each: each[1])


def tuning_flops(entry: dict) -> float:
    """Executed FLOPs of a run's fine-tuning."""
    return next(stage["executed_flops"] for stage in entry["stages"] if stage["name"] == "finetune")


def variants_table(name: str, result: dict, data: str = "photos") -> str:
    """The methods in fine-tuning, setting by setting: what they save of it, and what that costs."""
    lines = [
        f"**quality**, {data}: fine-tuning of *mlp-256* with methods, from the same pre-trained models; FLOPs of "
        "fine-tuning alone; points against *mlp-256* of the same seeds, 95% intervals over images and seeds",
        "",
        "| in fine-tuning | its FLOPs | mean of all tasks | worst task | seeds |",
        "|---|---|---|---|---|",
    ]
    for row, cost, mine, theirs in variants(result, data):
        all_tasks, task, worst = extremes(mine, theirs)
        cells = (row, f"{cost:.2f}", points(all_tasks), f"{task} {points(worst)}", str(len(mine)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def orderings_table(name: str, result: dict) -> str:
    """The papers' orderings, by paired tests over the seeds that both rows have with the same settings."""
    rows: dict[str, dict[str, dict[int, dict]]] = {}  # row -> settings -> seed -> entry
    for entry in result["rows"]:
        if "test" in entry and entry["data"] == "scenes" and entry["settings"]["late"] == 1:
            settings = str(sorted((key, float(value)) for key, value in entry["settings"].items()))
            settings += entry["precision"]  # which moves a score as far as another seed does
            rows.setdefault(entry["row"], {}).setdefault(settings, {})[entry["seed"]] = entry
    means = [
        [fmean(entry["test"]["scores"].values()) for entry in seeds.values()]
        for tried in rows.values()
        for seeds in tried.values()
    ]
    spread = max((max(each) - min(each) for each in means), default=0.0)
    lines = [
        "The papers' orderings: difference of the mean score in points, 95% "
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
        mine, images, tasks = grouped(ours)
        test = paired_test(mine, grouped(theirs)[0], images, tasks)
        word = "reproduced" if test.low > 0 else "contrary" if test.high < 0 else "not seen at this scale"
        p_value = f"{test.p_value:.3f}" if test.p_value >= 0.001 else "< 0.001"
        lines.append(f"| {text} | {points(test)} | {p_value} | {len(seeds)} | {word} |")
    return "\n".join(lines)


def _pyplot() -> Any:
    """Set up so that a figure is the same file wherever it is drawn."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "sparsight", "font.size": 11, "svg.fonttype": "none"}
    matplotlib.rcParams |= {"figure.constrained_layout.w_pad": 0.15, "figure.constrained_layout.h_pad": 0.15}
    return pyplot


def draw(result: dict, file: Path, shown: Figure = FIGURE) -> None:
    """Cost of the whole training against the mean score, with its 95% interval. The figure has a ground of its own, so
    that it can be read on a light page and on a dark one."""
    pyplot = _pyplot()
    rows, base = chosen(result, shown.data, shown.rows)
    figure, panel = pyplot.subplots(figsize=(8.6, 4.4), layout="constrained", facecolor="white")
    for (row, _), seeds in rows.items():
        (text, side, offset), colour = shown.rows[row], "#1f5fa8" if row.startswith("cos") else "#6b6b6b"
        total, cost = bootstrap(*grouped(seeds)), flops(seeds[0]) / flops(rows[base][0])
        low, high = 100 * (total.mean - total.low), 100 * (total.high - total.mean)
        style: dict = {"fmt": "o", "color": colour, "markersize": 8, "elinewidth": 1.2, "capsize": 3}
        panel.errorbar(cost, 100 * total.mean, [[low], [high]], **style)
        text += f"\n{100 * total.mean:.0f}% at {cost:.2f} of the cost ({counted(len(seeds), 'seed')})"
        place: dict = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center", "linespacing": 1.35}
        panel.annotate(text, (cost, 100 * total.mean), color=colour, **place)
    panel.set(**shown.axes, xlabel="cost: executed FLOPs of the whole training (LLaVA's MLP = 1)")
    panel.set_ylabel(f"mean score of {shown.tasks} tasks, %")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


# Kinds of rows in the figure of variants: a word of their names, what the legend says, and the colour.
KINDS = (
    ("falling", "skipper, share of layers falling (the paper's)", "#1f5fa8"),
    ("constant", "skipper, constant share", "#b3401c"),
    ("plateau", "skipper, plateau and other ingredients (ours)", "#3a7d44"),
    ("gap", "skipper, or both methods, by the gap (ours)", "#8a5aa8"),
    ("shorter", "no method: fewer samples", "#444444"),
)


def draw_variants(result: dict, file: Path, data: str = "photos") -> None:
    """What methods save of fine-tuning against what they cost in points, setting by setting."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(8.6, 4.8), layout="constrained", facecolor="white")
    found = variants(result, data)
    assert all(sum(word in row for word, _, _ in KINDS) == 1 for row, *_ in found), "a row of no kind, or of two"
    for word, kind, colour in KINDS:
        mine = [(row, cost, extremes(*sides)[0]) for row, cost, *sides in found if word in row]
        middle, low, high = 100 * np.array(
            [[getattr(test, end) for _, _, test in mine] for end in ("difference", "low", "high")]
        )
        costs = [cost for _, cost, _ in mine]
        panel.errorbar(
            costs, middle, [middle - low, high - middle], fmt="o", color=colour, label=kind, elinewidth=0.7, alpha=0.9
        )
        for (row, cost, _), height in zip(mine, middle, strict=True):
            label = " ".join(re.findall(r"alpha 0\.\d|both", row))
            side = {"xytext": (-5, 5), "ha": "right"} if word == "constant" else {"xytext": (5, 5)}
            panel.annotate(label, (cost, height), textcoords="offset points", color=colour, fontsize=9, **side)
    panel.axhline(0, color="#6b6b6b", linewidth=0.8)
    panel.set(xlabel="executed FLOPs of fine-tuning (without methods = 1)", ylabel="points, mean of seven tasks")
    panel.margins(x=0.15)  # room for labels
    panel.legend(loc="lower right", frameon=False, fontsize=9)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


# Panels of the figure by grade: data, the row that is set against the baseline, and its title.
GRADED = (
    ("scenes", "cos 24-24", "24 tokens,\nsmall language model from scratch"),
    ("photos", "cos 24-24", "24 tokens, photographs,\nsmall language model from scratch"),
    ("smollm2", "cos 32-32", "32 tokens,\nSmolLM2-135M"),
    ("smollm2", "mlp-256 + both", "Sparse Training Scheme,\nSmolLM2-135M"),
)
AXES = {"steps": "steps to the answer", "things": "things in the image", "clutter": "things not asked about"}
AXES |= {"size": "size, % of the side", "digits": "digits to read"}


def graded(result: dict, data: str, row: str) -> tuple[list[Graded], int]:
    """A row's points less the baseline's, by the grades of the questions, and how many seeds both have."""
    rows = entries(result, data)
    base = baseline(rows)
    mine = [entry for key, seeds in rows.items() if key[0] == row for entry in seeds if entry["own"]]
    if base is None or base[0] == row or not (pairs := paired(mine, [entry for entry in rows[base] if entry["own"]])):
        return [], 0
    ours, theirs = ([entry["test"]["points"] for entry in side] for side in zip(*pairs, strict=True))
    gaps = {task: np.subtract([a[task] for a in ours], [b[task] for b in theirs]) for task in ours[0]}
    asked = pairs[0][0]["test"]
    return by_grade(gaps, asked["images"], asked["grades"]), len(pairs)


def draw_grades(result: dict, file: Path) -> None:
    """Where few tokens and the methods hurt: points against the baseline by what a question is about."""
    shown = [(title, *graded(result, data, row)) for data, row, title in GRADED]
    shown = [panel for panel in shown if panel[1]]
    pyplot = _pyplot()
    size = (2.0 + 2.6 * len(shown), 5.4)
    figure, panels = pyplot.subplots(1, len(shown), figsize=size, sharex=True, layout="constrained", facecolor="white")
    for panel, (title, groups, seeds) in zip(np.atleast_1d(panels), shown, strict=True):
        labels, place, grade = {}, 0.0, ""
        for group in groups:
            place -= 1.0 + 1.2 * (group.grade != grade)
            if group.grade != grade:
                panel.text(0.02, place + 0.75, AXES[group.grade], transform=panel.get_yaxis_transform(), weight="bold")
            grade, labels[place] = group.grade, group.group
            mean, low, high = (100 * getattr(group.score, key) for key in ("mean", "low", "high"))
            colour = "#b3401c" if high < 0 else "#1f5fa8" if low > 0 else "#6b6b6b"
            panel.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        panel.axvline(0, color="#6b6b6b", linewidth=0.8)
        panel.set_ylim(-20.5, -0.8)
        panel.set_yticks(list(labels), list(labels.values()))
        panel.set_title(f"{title}\n({counted(seeds, 'seed')})", fontsize=11)
        panel.set_xlabel("points against LLaVA's MLP")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def newest(folder: Path) -> dict[str, dict]:
    """The newest result of each name: NAME-DATE.json, DATE as in 2026-11-21 or 2026-11-21T0829; and `quality`."""
    files = {file.name[: file.name.index("-20")]: file for file in sorted(folder.glob("*-????-??-??*.json"))}
    del files["quality"]  # `quality` reads it, and the clock
    files.pop("quality-clock", None)
    found = {name: json.loads(file.read_text(encoding="utf-8")) | {"file": file.name} for name, file in files.items()}
    return found | {"quality": quality(folder)}


FIGURES: dict[str, Callable[[dict, Path], None]] = {
    "quality.svg": draw,
    "quality-smollm2.svg": partial(draw, shown=PRETRAINED),
    "quality-by-content.svg": draw_grades,
    "quality-skipper.svg": draw_variants,
}
core = partial(quality_table, names=SHOWN)
methods = partial(speed_table, only=("methods", "idle"))
Show = Callable[[str, dict], str]
SUMMARY: list[tuple[str, Show]] = [("quality", headline), ("quality", short_table)]
# Page -> results whose names begin so, and how they are shown.
PAGES: dict[str, list[tuple[str, Show]]] = {
    "README.md": SUMMARY,
    "docs/measured.md": [*SUMMARY, ("quality", core), ("demo", table), ("scenes-60min", table)],
    "docs/chain-of-sight.md": [("bridge-", bridge_table), ("scaling", scaling_table)],
    "docs/quality.md": [
        ("quality", quality_table),
        ("quality", partial(quality_table, split=5)),
        ("quality", partial(quality_table, data="details")),
        ("quality", partial(quality_table, data="easy-vqa")),
        # What differs in fine-tuning alone has a table of its own, `variants_table`.
        ("quality", partial(quality_table, data="photos", names={row: row for row in SHOWN})),
        ("quality", partial(quality_table, data="smollm2")),
        ("quality", margins_table),
        ("quality", partial(margins_table, data="photos")),
        ("quality", partial(margins_table, data="smollm2")),
        ("quality", variants_table),
        ("quality", orderings_table),
    ],
    "docs/speed.md": [("speed-", speed_table)],
    "docs/evaluation.md": [("evaluate-", evaluate_table)],
    "docs/data.md": [("data-", data_table), ("shards", shards_table)],
    "docs/scaling.md": [
        ("ranks", ranks_table),
        ("cluster", partial(cluster_table, kind="weak")),
        ("cluster", partial(cluster_table, kind="strong")),
        ("cluster", waiting_table),
        ("cluster", published_table),
    ],
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
    shown = [text for text in shown if text]
    return "\n\n".join(["## What was measured", *shown] if page == "README.md" else shown)


def main() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        before, rest = text.split(START)
        after = rest.split(END)[1]
        (ROOT / page).write_text(f"{before}{START}\n{render(page)}\n\n{END}{after}", encoding="utf-8")
    found = quality(ROOT / "benchmarks/results")
    for name, drawn in FIGURES.items():
        drawn(found, ROOT / "docs" / name)


if __name__ == "__main__":
    main()
