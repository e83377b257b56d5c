"""Quality at equal samples: the standard pipeline, Chain-of-Sight, the Sparse Training Scheme, both, and ablations.

Every row sees the same samples in the same order (`quality.yaml`), and differs in bridges and methods alone. Settings
are picked on the validation split, scores are those of the test split; training sees the drawings of neither. Rows that
begin alike share those stages. What is done is kept in the work folder, and each row that was scored is a file of its
own in the folder of results, which says where it was trained: it is written once. A row that has one is not run again,
so run it in slices, several at once if there are cores.

    python benchmarks/quality.py --rows core --tune              # the grid of settings, on the validation split
    python benchmarks/quality.py --rows core --seeds 0 1 2
    python benchmarks/quality.py --only mlp-256                  # one row anew, whatever the results have of it
    python benchmarks/quality.py --clock   # seconds of the rows' steps, taking turns, with nothing beside
    python benchmarks/quality.py --list
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from common import write_result
from rich.console import Console
from rich.progress import track

from sparsight.assets import easy_vqa_folder
from sparsight.bridges import build_bridge
from sparsight.data.sources import scene_config
from sparsight.devices.precision import default_device, precision_on
from sparsight.evaluation.ask import Questions, Scores, ask
from sparsight.evaluation.questions import held_out_questions, scene_questions
from sparsight.modeling.scaling import scale_tokens
from sparsight.pipeline import autocast, load, run, samples_hash
from sparsight.pipeline.files import settle_image_size
from sparsight.reporting import environment, read_run
from sparsight.reporting.runlog import StageRun, step_seconds
from sparsight.reporting.tables import write_atomic
from sparsight.safety import write_manifest
from sparsight.scenes.questions import ScenesDataset
from sparsight.settings.data import SceneData
from sparsight.settings.recipe import Recipe, Stage

HERE = Path(__file__).parent
WIDTHS = {"width": 192, "heads": 3, "mlp_ratio": 2, "query_std": 1}
CLOCKED, IMAGES = 10, 200  # steps of a stage, and images, in a round of --clock
ITEMS = {"validation": 60, "test": 200, "control": 40}


def cos(layout: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "chain_of_sight", "layout": layout, **WIDTHS, **changes}


def single(tokens: int) -> dict[str, Any]:
    return {"kind": "resampler", "tokens": tokens, **WIDTHS}


DUAL = {"compressor": {"keep": 0.1, "method": "uniform", "dense_every": 10}}
# Don't Drop Dropout's ingredients, one after the other, at a share that takes 20% of the layers of the whole stage.
SPARED: dict[str, Any] = {"alpha": 0.3, "epsilon": 0.0, "schedule": "plateau", "decay_from": 0.5, "dense_last": 0.1}
ADDED: dict[str, dict[str, Any]] = {
    "plateau": {},
    "plateau, alternating": {"layers": "alternating"},
    "plateau, inverse density": {"inverse_density": True},
    "plateau, alternating, inverse density": {"layers": "alternating", "inverse_density": True},
}
MLP: dict[str, Any] = {"kind": "mlp"}
QUARTER, FALLING = {"keep": 0.25, "method": "uniform"}, {"alpha": 0.6, "epsilon": 0.3}
# Text goes through every layer. The plateau skips 48% of them on average, for visual tokens alone.
VISUAL = FALLING | {"tokens": "visual"}
VISUAL_PLATEAU = SPARED | {"alpha": 0.6, "decay_from": 0.7, "tokens": "visual"}
# Learning rates before fine-tuning and in it, and its length, of what the shared recipe says: of all rows alike. The
# first if not tuned. Where fine-tuning is most of the work, another length of it is a shorter one.
GRID = [
    {"rate": rate, "late_rate": late_rate, "late": late}
    for rate, late_rate, late in ((1e-3, 5e-4, 1), (2e-3, 1e-3, 1), (1e-3, 5e-4, 3))
]
GRIDS = {"smollm2": [*GRID[:2], GRID[2] | {"late": 0.8}]}
# Up to six things in nine cells, and smaller numbers of three or four digits: `--data details`.
DETAILS = {"grid": 3, "max_things": 6, "digits": [3, 4], "number_size": 30}
FULL = "1:16,2:16,16:1"  # the 336 that 32 reaches
GLOBAL = "1:16,2:16,4:1"  # 32 and a coarse scale more: 96


@dataclass(frozen=True)
class Row:
    """One pipeline. ``early`` holds for alignment and pre-training, ``late`` for fine-tuning.

    ``first``, ``last``: further keys of those stages. ``settle``: share of fine-tuning's samples that are seen before
    scaling, by tokens that weigh as those to come. ``fresh``: new scales start anew. ``share``: of the samples of every
    stage. ``longer``: as many pre-trainings follow each other. ``groups``: what it belongs to.
    """

    early: dict[str, Any]
    late: dict[str, Any] | None = None
    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    settle: float = 0.0
    fresh: bool = False
    share: float = 1.0
    longer: int = 1
    groups: str = ""


few, many, POSITIONS = cos("cos-32"), cos(FULL), {"position_layout": FULL}
fewer = cos("1:8,4:1")
PROPORTIONAL = POSITIONS | {"proportional_attention": True}
DOUBLE = {"image_size": 512}
ROWS = {
    "mlp-256": Row(MLP, groups="core"),
    "resampler-336": Row(single(336), groups="core"),
    "cos 32-336": Row(few, many, groups="scaling"),
    "cos 32-336 positions": Row(few, many, first=POSITIONS, groups="scaling"),
    "cos 32-336 proportional": Row(few, many, first=PROPORTIONAL, groups="scaling"),
    "cos 32-336 half settled": Row(few, many, first=POSITIONS, settle=0.5, groups="scaling"),
    "cos 32-336 settled": Row(few, many, first=POSITIONS, settle=0.75, groups="core scaling"),
    "cos 32-336 settled sts": Row(
        few, many, first=POSITIONS, settle=0.75, last={"skipper": FALLING}, groups="core sts"
    ),
    "cos 32-336 settled alone": Row(few, many, settle=0.75, groups="scaling"),
    "cos 32-32": Row(few, groups="core scaling"),
    "mlp-256, equal time": Row(MLP, share=0.33, groups="control"),
    "mlp-256, longer": Row(MLP, longer=2, groups="control"),
    "cos 24-24, longer": Row(fewer, longer=2, groups="control"),
    "cos 32-336 settled, longer": Row(few, many, first=POSITIONS, settle=0.75, longer=2, groups="control"),
    "single 32-32": Row(single(32), groups="scales"),
    "single 80-80": Row(single(80), groups="scales"),
    "cos 80-80": Row(cos("cos-80"), groups="scales"),
    "cos 80-336": Row(cos("cos-80"), cos("cos-336"), groups="scaling"),
    "cos 80-336 settled": Row(
        cos("cos-80"), cos("cos-336"), first={"position_layout": "cos-336"}, settle=0.75, groups="scaling"
    ),
    "cos 336-336": Row(cos("cos-336"), groups="scales"),
    "cos 32-336 fresh": Row(few, many, fresh=True, groups="scaling"),
    "cos 32-80 local": Row(few, cos("1:16,8:1"), groups="scaling"),
    "cos 32-96 global": Row(few, cos(GLOBAL), groups="scaling"),
    "cos 32-96 global sts": Row(few, cos(GLOBAL), last={"skipper": FALLING}, groups="sts"),
    "cos 32-96 settled": Row(few, cos(GLOBAL), first={"position_layout": GLOBAL}, settle=0.75, groups="scaling"),
    "cos 24-24": Row(fewer, groups="core scaling"),
    "cos 24-24 sts": Row(fewer, last={"skipper": FALLING}, groups="core sts"),
    "cos 24-56 global": Row(fewer, cos("1:8,2:8,4:1"), groups="scaling"),
    "cos 24-296 settled": Row(
        fewer, cos("1:8,2:8,16:1"), first={"position_layout": "1:8,2:8,16:1"}, settle=0.75, groups="scaling"
    ),
    "cos 32-528 double": Row(few, cos("1:16,4:16,16:1"), last=DOUBLE, groups="double"),
    "cos 48-784 double": Row(cos("cos-48"), cos("1:16,4:16,16:2"), last=DOUBLE, groups="double"),
    "fine to coarse 32-32": Row(cos("cos-32", order="fine_to_coarse"), groups="order"),
    "resampler-336, longer": Row(single(336), longer=2, groups="older"),
    "resampler-336, equal time": Row(single(336), share=0.23, groups="older"),
    "resampler-336, dual": Row(single(336), first=DUAL, last=DUAL, groups="older"),
    "resampler-336 + both": Row(single(336), first={"compressor": QUARTER}, last={"skipper": FALLING}, groups="older"),
    "resampler-336 + compressor": Row(single(336), first={"compressor": QUARTER}, groups="sts"),
    "mlp-256 + compressor": Row(MLP, first={"compressor": QUARTER}, groups="sts"),
    "mlp-256 + skipper": Row(MLP, last={"skipper": FALLING}, groups="sts"),
    "mlp-256 + both": Row(MLP, first={"compressor": QUARTER}, last={"skipper": FALLING}, groups="sts"),
    "mlp-256 + both, visual": Row(MLP, first={"compressor": QUARTER}, last={"skipper": VISUAL}, groups="visual"),
    "mlp-256 + both, visual plateau": Row(
        MLP, first={"compressor": QUARTER}, last={"skipper": VISUAL_PLATEAU}, groups="visual"
    ),
    "cos 32-336 + compressor": Row(few, many, first={"compressor": {"keep": 0.5, "final": 1.0}}, groups="sts"),
    "cos 32-336, dual": Row(few, many, last={"compressor": {"keep": 0.1, "dense_every": 10}}, groups="rivals"),
    "mlp-256, dual": Row(MLP, first=DUAL, last=DUAL, groups="rivals"),
    # Where the scheme belongs: LLaVA's bridge, compressor in alignment, skipper in tuning, one knob at a time.
    **{
        f"mlp-256, keep {keep} {method}": Row(
            MLP, first={"compressor": {"keep": keep, "method": method}}, groups="keep"
        )
        for keep in (0.5, 0.25, 0.1)
        for method in ("uniform", "pool", "similarity")
    },
    **{
        f"mlp-256, alpha {alpha} {schedule} {protected}": Row(
            MLP,
            last={"skipper": {"alpha": alpha, "epsilon": 0.0, "schedule": schedule, "protected": [protected] * 2}},
            groups="alpha",
        )
        for alpha in (0.3, 0.6, 0.9)
        for schedule in ("falling", "constant")
        for protected in (0, 1)
    },
    **{f"mlp-256, {name}": Row(MLP, last={"skipper": SPARED | more}, groups="spared") for name, more in ADDED.items()},
    # The control of all methods in fine-tuning: less of it, without any.
    **{
        f"mlp-256, shorter {share}": Row(MLP, last={"samples": round(2880 * share)}, groups="shorter")
        for share in (0.8, 0.5)
    },
    "skipper falling": Row(few, many, first=POSITIONS, last={"skipper": FALLING}, groups="skip"),
    "skipper constant": Row(
        few, many, first=POSITIONS, last={"skipper": FALLING | {"alpha": 0.2, "schedule": "constant"}}, groups="skip"
    ),
    "skipper rising": Row(
        few, many, first=POSITIONS, last={"skipper": FALLING | {"schedule": "rising"}}, groups="skip"
    ),
    "skipper epsilon -0.3": Row(
        few, many, first=POSITIONS, last={"skipper": FALLING | {"epsilon": -0.3}}, groups="skip"
    ),
    "skipper epsilon 0": Row(few, many, first=POSITIONS, last={"skipper": FALLING | {"epsilon": 0.0}}, groups="skip"),
}


def shared(data: str) -> dict[str, Any]:
    """What all rows on these data have in common."""
    name = f"quality-{data}.yaml" if data in ("easy-vqa", "smollm2") else "quality.yaml"
    values = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    values["data"] |= {"details": DETAILS, "photos": {"cutouts": "photos"}}.get(data, {})
    return values


def recipe_of(row: Row, seed: int, settings: dict[str, Any], data: str = "scenes", precision: str = "auto") -> Recipe:
    """A row's recipe: what all share, the row's own keys, and what is tuned: learning rates (``rate``, ``late_rate``)
    and the length of fine-tuning (``late``, of what the shared recipe says)."""
    values = shared(data) | {"seed": seed, "precision": precision_on(default_device(), precision)}
    if data == "easy-vqa":  # its images lie in the package
        held_out = values["evaluation"]["held_out"]["easy-vqa"]
        values["data"]["images"] = held_out["data"]["images"] = str(easy_vqa_folder())
    *early, finetune = values["stages"]
    for stage in early:
        stage |= {"bridge": row.early} | row.first
    finetune |= {"bridge": row.late or row.early} | row.last
    for stage in values["stages"]:  # the shared recipe says how the parts' rates lie to each other, and what is frozen
        rate, own = settings["late_rate" if stage is finetune else "rate"], stage["learning_rate"]
        stage["learning_rate"] = {part: rate * (own[part] / own["bridge"]) for part in own}
    # The samples that fine-tuning does without are seen before it: every row has the same ones.
    late = round(settings["late"] * finetune["samples"] / 32) * 32
    early[-1]["samples"] += finetune["samples"] - late
    finetune["samples"] = late
    for stage in values["stages"]:
        stage["samples"] = round(row.share * stage["samples"] / 32) * 32
    for number in range(2, row.longer + 1):
        values["stages"].insert(-1, early[-1] | {"name": f"pretrain-{number}"})
    if row.settle:
        samples = round(row.settle * late / 32) * 32
        finetune["samples"] -= samples
        settle = {"name": "settle", "bridge": row.early, "samples": samples, "schedule": "constant_with_warmup"}
        settle |= {"position_layout": finetune["bridge"]["layout"], "proportional_attention": True}
        values["stages"].insert(-1, finetune | dict.fromkeys(row.last) | settle)
    return settle_image_size(Recipe.model_validate(values))


def write_easy_vqa(folder: Path) -> None:
    """easy-VQA as conversations: up to five of an image's questions in a training one, one in others. Of the training
    images, the last 400 are for validation."""
    import easy_vqa

    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", "train"), ("validation", "train"), ("test", "test")):
        questions, answers, images = getattr(easy_vqa, f"get_{part}_questions")()
        turns: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in zip(questions, answers, images, strict=True):
            turns.setdefault(image, []).append((question.replace("?", " ?"), answer))
        wanted = {"train": range(3600), "validation": range(3600, 4000), "test": range(1000)}[split]
        size = 5 if split == "train" else 1
        rows = [
            {
                "id": f"{image}-{start}",
                "image": f"{part}/images/{image}.png",
                "conversations": _turns(asked[start : start + size]),
            }
            for image, asked in turns.items()
            for start in range(0, len(asked), size)
            if image in wanted
        ]
        random.Random(0).shuffle(rows)
        write_atomic(folder / f"{split}.json", json.dumps(rows))


def _turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    texts = [text for number, (q, a) in enumerate(pairs) for text in (("" if number else "<image>\n") + q, a)]
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def train(recipe: Recipe, work: Path, console: Console, fresh: bool = False) -> Path:
    """The folder of a recipe's run; stages that another run in ``work`` has had alike are taken from there."""
    before = None
    for count in range(1, len(recipe.stages) + 1):
        part = recipe.model_copy(update={"stages": recipe.stages[:count]})
        anew = fresh and count == len(recipe.stages)
        values = part.model_dump(mode="json", exclude={"name"}, exclude_defaults=True) | {"fresh": anew}
        out = work / hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        if not (out / "done").is_file():
            if before is not None and not out.is_dir():
                _begin(out, before, part, anew)
            run(part, out, console, resume=out.is_dir(), cache_root=work / "cache")
            (out / "done").touch()
        before = out
    assert before is not None
    return before


def _begin(out: Path, before: Path, recipe: Recipe, fresh: bool) -> None:
    """Put the stages of ``before`` into a new run's folder, as if it had trained them itself."""
    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(before, partial, ignore=shutil.ignore_patterns("done", "checkpoints"))
    header, *lines = (before / "run.jsonl").read_text(encoding="utf-8").splitlines()
    values = json.loads(header) | {"recipe": recipe.model_dump(mode="json"), "samples_hash": samples_hash(recipe)}
    (partial / "run.jsonl").write_text("\n".join([json.dumps(values), *lines]) + "\n", encoding="utf-8")
    if fresh:
        _start_anew(partial / recipe.stages[-2].name / "model", recipe.stages[-1], recipe.seed)
    partial.rename(out)


def _start_anew(folder: Path, stage: Stage, seed: int) -> None:
    """Scale a model to a stage's layout, but give the scales that come their start values in place of weights."""
    model, processor = load(folder)
    before = set(model.model.multi_modal_projector.scales)  # type: ignore[arg-type]
    scale_tokens(model, processor, stage.bridge, stage.image_size)
    scales: Any = model.model.multi_modal_projector.scales
    torch.manual_seed(seed)
    anew: Any = build_bridge(stage.bridge, model.config.level_widths, model.config.text_config.hidden_size).scales
    for grid in set(anew) - before:
        scales[grid].load_state_dict(anew[grid].state_dict())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_manifest(folder)


def score(folder: Path, recipe: Recipe, split: str) -> dict[str, Any]:
    """Scores of a run's last model by task; for the test split every item's points, and of seed 0 with images
    shuffled."""
    model, processor = load(folder / recipe.stages[-1].name / "model")

    def asked(items: int, control: bool) -> Scores:
        questions = questions_of(recipe, split, items, model.config.image_size)
        with autocast(recipe.precision, model.device):
            return ask(model, processor, questions, control=control)

    found = asked(ITEMS[split], control=False)
    result: dict[str, Any] = {"items": ITEMS[split], "scores": found.scores}
    if split == "test":
        result |= {"points": found.points, "images": found.images, "grades": found.grades}
        if recipe.seed == 0:
            result["shuffled"] = asked(ITEMS["control"], control=True).shuffled
    return result


def questions_of(recipe: Recipe, split: str, items: int, side: int) -> Questions:
    """Of scenes so many questions of each task, of easy-VQA five times as many."""
    if isinstance(recipe.data, SceneData):
        scenes = ScenesDataset(
            scene_config(recipe.data, side), split, 8 * items, tasks=recipe.data.tasks, seed=recipe.data.seed
        )
        return scene_questions(scenes, items)
    ((name, held_out),) = recipe.evaluation.held_out.items()
    path = str(Path(held_out.data.path).with_name(f"{split}.json"))
    update = {"data": held_out.data.model_copy(update={"path": path}), "items": 5 * items}
    return held_out_questions(name, held_out.model_copy(update=update), side)


def costs(folder: Path) -> list[dict[str, Any]]:
    """What each stage of a run took. Other runs went on beside it: for ratios of seconds, see ``--clock``."""
    keys = ("name", "layout", "visual_tokens", "samples", "planned_steps", "seconds", "encoding_seconds")
    return [{key: getattr(stage, key) for key in (*keys, "executed_flops")} for stage in read_run(folder).stages]


class Results:
    """A folder of results, a file for each row that was scored. No file is ever written again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self, **key: Any) -> list[dict[str, Any]]:
        """Of each row, seed and settings what its files say, later ones over earlier ones."""
        merged: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("*.json"), key=lambda file: file.stem.rsplit("-", 1)[-1]):
            entry = json.loads(file.read_text(encoding="utf-8"))
            same = json.dumps([entry[name] for name in ("data", "row", "seed", "settings", "precision")])
            merged[same] = merged.get(same, {}) | entry | {"file": file.name}
        return [entry for entry in merged.values() if all(entry[name] == value for name, value in key.items())]

    def add(self, entry: dict[str, Any]) -> Path:
        """Write what a row had on one split."""
        split = "test" if "test" in entry else "validation"
        words = (entry["data"], entry["row"], *entry["settings"].values(), f"seed {entry['seed']}", split)
        name = "-".join(re.sub(r"[^a-z0-9.]+", "-", str(word)).strip("-") for word in words)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
        with open(file, "x", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
        return file

    def tried(self, data: str, name: str, precision: str) -> list[dict[str, Any]]:
        """The settings of a row that were tried on the validation split, with their mean scores, the best first; where
        none was on data that share their recipe with the scenes, those of the scenes."""
        found = [entry for entry in self.entries(data=data, row=name, precision=precision) if "validation" in entry]
        if not found and data in ("photos", "details"):
            return self.tried("scenes", name, precision)
        means = [(fmean(entry["validation"]["scores"].values()), entry["settings"]) for entry in found]
        return [{"mean": mean, **settings} for mean, settings in sorted(means, key=lambda pair: -pair[0])]

    def best(self, data: str, name: str, precision: str) -> dict[str, Any]:
        """The settings of a row that were best on the validation split, of those that were tried; else those of the row
        that it is a variant of (``mlp-256`` of ``mlp-256, plateau``); else the first."""
        tried = self.tried(data, name, precision) or self.tried(data, re.split(r",| \+", name)[0], precision)
        return {key: tried[0][key] for key in GRID[0]} if tried else GRID[0]


def selected(wanted: Sequence[str]) -> list[str]:
    """Names of the rows that are meant, by name or group.

    Raises:
        ValueError: there is no such row or group.
    """
    groups = {group for row in ROWS.values() for group in row.groups.split()}
    if unknown := set(wanted) - groups - set(ROWS):
        raise ValueError(f"--rows {sorted(unknown)}: expected groups {sorted(groups)} or rows {list(ROWS)}")
    return [name for name, row in ROWS.items() if name in wanted or set(row.groups.split()) & set(wanted)]


def work_through(options: argparse.Namespace, results: Results, console: Console) -> None:
    """Train and score what was asked for and is not there yet, until the minutes are over."""
    if options.tune and options.seeds != [0]:
        raise ValueError(f"--tune --seeds {options.seeds}: settings are picked with seed 0")
    end, split = time.monotonic() + 60 * options.minutes, "validation" if options.tune else "test"
    precision = precision_on(default_device(), options.precision)
    for seed, name in itertools.product(options.seeds, selected(options.only or options.rows)):
        for settings in (
            GRIDS.get(options.data, GRID) if options.tune else [results.best(options.data, name, precision)]
        ):
            key = {"data": options.data, "row": name, "seed": seed, "settings": settings, "precision": precision}
            if not options.only and any(split in entry for entry in results.entries(**key)):
                continue
            if time.monotonic() > end:
                console.print("[yellow]the minutes are over; the same command goes on[/]")
                return
            console.rule(f"[bold]{name}[/], seed {seed}, {settings}")
            recipe = recipe_of(ROWS[name], seed, settings, options.data, precision)
            folder = train(recipe, options.work, console, ROWS[name].fresh)
            entry = key | {"tried": results.tried(options.data, name, precision), "stages": costs(folder)}
            entry[split] = score(folder, recipe, split)
            entry |= {"recipe": recipe.model_dump(mode="json", exclude_defaults=True)}
            entry |= {"env": read_run(folder).environment, "scored": environment()}
            file = results.add(entry)
            shown = {task: round(100 * value) for task, value in entry[split]["scores"].items()}
            console.print(f"{name}, seed {seed}, {settings}: {shown}; wrote [bold]{file}[/]")


def _work(stage: Stage) -> str:
    """Equal for stages whose steps are the same work."""
    return stage.model_dump_json(exclude={"name", "samples", "learning_rate", "schedule", "warmup", "checkpoints"})


def clock(names: Sequence[str], results: Results, data: str, rounds: int, console: Console) -> None:
    """Seconds of a step of every stage of these rows, taking turns in this process, there and back; the first round is
    left out. And each row's seconds in all, with what encoding its images takes. Stages whose steps are the same work
    are one."""
    precision = precision_on(default_device(), "auto")
    recipes = {name: recipe_of(ROWS[name], 0, results.best(data, name, precision), data) for name in names}
    parts = {_work(stage): (name, stage) for name, recipe in recipes.items() for stage in recipe.stages}
    found: dict[str, list[StageRun]] = {key: [] for key in parts}
    with tempfile.TemporaryDirectory() as folder:
        for turn in track(range(rounds + 1), "measuring", console=console):
            for key, (name, stage) in list(parts.items())[:: 1 if turn % 2 else -1]:
                short = stage.model_copy(update={"samples": CLOCKED * stage.batch_size, "checkpoints": 0})
                scenes = recipes[name].data.model_copy(update={"scenes": IMAGES})
                recipe = recipes[name].model_copy(update={"stages": (short,), "data": scenes})
                out = Path(folder) / "run"
                run(recipe, out, Console(quiet=True), cache_root=Path(folder) / "cache")
                found[key] += read_run(out).stages
                shutil.rmtree(out)
    rows: list[dict[str, Any]] = []
    for name, recipe in recipes.items():
        row: dict[str, Any] = {"row": name, "stages": [], "seconds": 0.0}
        for stage in recipe.stages:
            runs = found[_work(stage)][1:]
            times = [statistics.fmean(map(step_seconds, each.steps)) for each in runs]
            flops = statistics.fmean(step["flops"] for step in runs[0].steps)
            step: dict[str, Any] = {"seconds": statistics.median(times), "rounds": times, "flops": flops}
            first = float(all(stage.image_size != earlier["image_size"] for earlier in row["stages"]))  # of this size
            encoding = first * runs[0].encoding_seconds / IMAGES * shared(data)["data"]["scenes"]
            sizes = {"image_size": stage.image_size, "steps": stage.steps, "encoding": encoding}
            row["stages"].append({"name": stage.name, **sizes, **step})
            row["seconds"] += stage.steps * step["seconds"] + encoding
        rows.append(row)
        console.print(f"{name}: {row['seconds']:.0f} s, {row['seconds'] / rows[0]['seconds']:.3f} of the first's")
    result = {"data": data, "precision": precision, "rounds": rounds, "threads": torch.get_num_threads(), "rows": rows}
    write_result("quality-clock", result, None, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["core"], help="rows or groups")
    parser.add_argument("--only", nargs="+", help="rows or groups that are run anew, also if there are results of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", choices=["scenes", "details", "photos", "easy-vqa", "smollm2"], default="scenes")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="compare rows in one")
    parser.add_argument("--tune", action="store_true", help="try the grid on the validation split")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after these")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality", help="folder of the results")
    parser.add_argument("--clock", action="store_true", help="time the rows' steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="show the rows")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if options.list:
        for name, row in ROWS.items():
            console.print(f"[bold]{name}[/] ({row.groups})", highlight=False)
        return
    if options.data == "easy-vqa":
        write_easy_vqa(Path(shared("easy-vqa")["data"]["path"]).parent)
    if options.clock:
        clock(selected(options.rows), Results(options.out), options.data, options.rounds, console)
    else:
        work_through(options, Results(options.out), console)


if __name__ == "__main__":
    main()
