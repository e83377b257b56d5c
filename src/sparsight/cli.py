"""The command line. Heavy imports happen inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsight.errors import RenamedWarning, UserError

if TYPE_CHECKING:
    from sparsight.console import Console

app = typer.Typer(
    help="Train multimodal language models in a fraction of the time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as stages.pretrain.batch_size=8")
]
Out = Annotated[Path | None, typer.Option(help="folder of the run; runs/NAME if not given")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="move the folder that is there aside, and say where")]
Preset = Annotated[
    str | None, typer.Option(help="few-tokens, scale-settled or scale: bridges and methods of recipes/presets.yaml")
]
# A step a stage; a user's own overrides come after these.
_SHORT = (
    "shared.data.scenes=32",
    "shared.evaluation.items=5",
    *(f"shared.stages.{stage}.samples=32" for stage in ("align", "pretrain", "settle", "finetune")),
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sparsight {version('sparsight')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Train multimodal language models in a fraction of the time."""


def _console() -> Console:
    """A console, with the chatter of the libraries below off; of several ranks, the first one's speaks."""
    from sparsight.console import Console

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import dynamic_module_utils
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it refuses code of a model's folder, where it would ask on stdin
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry, where there is no network
    return Console(quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def _ends_clearly() -> Iterator[None]:
    """Around a command that trains: signals and faults of the machine end it in a sentence."""
    from sparsight.console import Console

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    try:
        yield
    except KeyboardInterrupt:
        console.print("[yellow]stopped at once[/]. What is saved is whole: go on with the same command and --resume")
        raise typer.Exit(130) from None
    except UserError:
        raise
    except (SystemExit, Exception) as error:
        from sparsight.training.checkpoints import Interrupted, explained

        if isinstance(error, Interrupted):
            console.print(f"[yellow]{error}[/]. Go on with the same command and --resume")
            raise typer.Exit(error.code) from None
        if text := explained(error):
            raise UserError(text) from error
        raise


@app.command()
@_ends_clearly()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="folder for runs, report.html and comparison.json; runs/demo, or runs/demo-short"),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML of a comparison; the built-in one if not given")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    short: Annotated[
        bool, typer.Option("--short", help="a minute or less: shows that all works; its scores mean nothing")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train a small VLM twice, the standard way and ours, on the same samples, and compare them."""
    if short and recipe is not None:
        raise UserError(f"--short is the built-in demo; --recipe {recipe} was given as well. Give one of them")
    from sparsight.pipeline import run_comparison
    from sparsight.settings.load import builtin_recipe, load_comparison

    changes = [*(_SHORT if short else ()), *(overrides or [])]
    comparison = load_comparison(recipe or builtin_recipe("demo.yaml"), changes)
    console = _console()
    run_comparison(comparison, out or Path("runs/demo-short" if short else "runs/demo"), console, resume, overwrite)
    if short:
        console.print("[yellow]--short: scores mean nothing after so few steps[/]; without it the demo takes minutes")


@app.command()
@_ends_clearly()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    preset: Preset = None,
    engine: Annotated[
        str | None, typer.Option(help="ddp, fsdp2, zero2 or zero3: start this command on all GPUs under that engine")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="processes of --engine; the number of GPUs if not given", min=1)
    ] = None,
) -> None:
    """Train a VLM by the stages of a recipe."""
    from sparsight.settings.load import load_recipe

    settings = load_recipe(recipe, overrides, preset)  # before the heavy imports: a mistake in it is told at once
    folder = out or Path("runs") / settings.name
    if engine is not None:
        from sparsight.pipeline.launch import launch

        given = {"--resume": resume, "--overwrite": overwrite, f"--preset={preset}": preset}
        options = [option for option, value in given.items() if value]
        launch(engine, ranks, folder, [str(recipe), *(overrides or []), "--out", str(folder), *options])
    if ranks is not None:
        raise UserError(f"--ranks {ranks}: of which --engine? Or start the command by torchrun or accelerate launch")
    from sparsight.devices.ranks import leave
    from sparsight.pipeline import run

    console = _console()
    final = run(settings, folder, console, resume, overwrite=overwrite)
    console.print(f"model: [bold]{final}[/]")
    leave()


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs; the first is the baseline")],
    out: Annotated[Path, typer.Option(help="folder for report.html and comparison.json")] = Path("comparison"),
) -> None:
    """Compare runs by their logs: quality, seconds, FLOPs and memory, as tables, JSON and one HTML page."""
    from sparsight.console import Console
    from sparsight.reporting import report

    report(runs, out, Console())


@app.command()
def watch(run: Annotated[Path, typer.Argument(help="folder of a run, such as runs/NAME")]) -> None:
    """Show a run while it goes on: stage, step, loss, speed, FLOPs, memory, time left. Ctrl-C leaves the run alone."""
    from sparsight.console import Console
    from sparsight.reporting import watch as show

    show(run, Console())


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Overrides = None,
    preset: Preset = None,
    device: Annotated[str | None, typer.Option(help="such as H100")] = None,
    mfu: Annotated[float | None, typer.Option(help="share of the device's peak; 0.4 if not given")] = None,
    memory: Annotated[str | None, typer.Option(help="such as 80GB, to fit into; the device's if not given")] = None,
    like: Annotated[Path | None, typer.Option(help="folder of a run of this machine: as fast as that went")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page to write")] = None,
) -> None:
    """Forecast what a recipe costs, without weights: FLOPs, memory and hours."""
    from sparsight.console import Console
    from sparsight.reporting import plan_page
    from sparsight.settings.load import load_recipes

    console = Console()
    recipes = load_recipes(recipe, overrides, preset)
    speed, said = plan_page.speed_of(recipes[0], device, mfu, like)
    limit = plan_page.memory_of(memory, device)
    console.print(said, highlight=False, markup=False)
    for settings in recipes:
        if out is not None:
            name = f"{out.stem}-{settings.name}" if len(recipes) > 1 else out.stem
            plan_page.write_plan(out.with_stem(name), settings, speed, limit)
        plan_page.print_plan(settings, speed, limit, console)
    if out is not None:
        console.print(f"wrote [bold]{out}[/]")


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a model, such as runs/NAME/finetune/model")],
    items: Annotated[int, typer.Option(help="questions of each task", min=1)] = 100,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    data: Annotated[Path | None, typer.Option(help="held-out conversations or a benchmark's file, for scenes")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the data's images; its own if not given")] = None,
    metric: Annotated[str | None, typer.Option(help="of --data; that of its format if not given")] = None,
    format: Annotated[str | None, typer.Option(help="of --data: conversations, vqav2, gqa, pope, mmbench ...")] = None,
    answers: Annotated[Path | None, typer.Option(help="second file of vqav2 and refcoco, with the answers")] = None,
    choices: Annotated[str | None, typer.Option(help="answers between commas; the likeliest is taken")] = None,
    layouts: Annotated[
        str | None, typer.Option(help="ask in each: cos-80,cos-336, or layouts of scales between semicolons")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="ask with each share of the visual tokens, such as 1,0.5,0.25")
    ] = None,
    method: Annotated[str, typer.Option(help="of the compressor, for --keep")] = "uniform",
    out: Annotated[
        Path | None, typer.Option(help="folder of answers, and of the curve; there a killed eval goes on")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="another model: test the difference of each task")] = None,
) -> None:
    """Ask a model the embedded scenes' questions, or those of a file; print scores with their intervals, chance, and
    the control with shuffled images. With --layouts or --keep: the curve of scores and costs by visual tokens."""
    from sparsight.settings.recipe import held_out_file

    more = {"format": format, "answers": str(answers) if answers else None, "split": split, "choices": choices}
    held_out = held_out_file(data, images, metric, items, **more)
    from sparsight.pipeline import evaluate_checkpoint

    ways: Any = {"layouts": layouts, "keep": keep, "method": method, "against": against}
    evaluate_checkpoint(checkpoint, items, split, _console(), held_out, out=out, **ways)


@app.command()
def scale(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a model, such as runs/NAME/pretrain/model")],
    out: Annotated[Path, typer.Option(help="folder of the scaled model; must not exist")],
    layout: Annotated[str | None, typer.Option(help="such as 1:16,2:16,8:4 or cos-336; unchanged if not given")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of the image in pixels", min=1)] = None,
    levels: Annotated[str | None, typer.Option(help="the encoder's feature levels, such as 16,23")] = None,
    source: Annotated[list[str] | None, typer.Option(help="NEW=OLD: the scale with NEW windows from OLD's")] = None,
) -> None:
    """Give a checkpoint more or fewer visual tokens, or another image size, weights carried over."""
    sources = {new: old for new, old in (_integers(pair, "=", "--source", 2) for pair in source or [])}
    numbers = None if levels is None else _integers(levels, ",", "--levels")
    from sparsight.modeling.scaling import scale_checkpoint

    console = _console()
    console.print(str(scale_checkpoint(checkpoint, out, layout, image_size, sources, numbers)), highlight=False)
    console.print(
        f"wrote [bold]{out}[/]. Train it on with a new optimizer: the old one's state belongs to the old bridge"
    )


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="folder of a model, such as runs/NAME/finetune/model")],
    to: Annotated[str, typer.Option("--to", help="transformers, remote-code, gguf, lora or merged")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
) -> None:
    """Write a model in a form that runs without Sparsight: a class of transformers, its code beside it, or llama.cpp's
    files; or its adapters alone, or merged."""
    from sparsight.pipeline.export import export_model

    export_model(model, out, to, _console())


def _integers(text: str, separator: str, option: str, count: int | None = None) -> list[int]:
    parts = text.split(separator)
    if not all(part.strip().lstrip("-").isdigit() for part in parts) or count not in (None, len(parts)):
        wanted = separator.join(["4", "1", "8"][: count or 2])
        raise UserError(f"{option} {text}: expected integers such as {wanted}")
    return [int(part) for part in parts]


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a model")],
    image: Annotated[Path | None, typer.Option(help="an image; one of the embedded scenes if not given")] = None,
    out: Annotated[Path, typer.Option(help="folder for the page and its images")] = Path("inspect"),
) -> None:
    """Draw the windows of each scale over an image, and where each query looks."""
    from sparsight.pipeline import inspect_checkpoint

    inspect_checkpoint(checkpoint, image, out, _console())


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="folder or hub id of a vision-language model of transformers")],
    data: Annotated[Path | None, typer.Option(help="LLaVA JSON or messages; the embedded scenes if not given")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the data's images; its own if not given")] = None,
    samples: Annotated[int, typer.Option(help="conversations to look at", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="folder for the page and analysis.json")] = Path("analysis"),
) -> None:
    """Measure how a model's layers and visual tokens behave; suggest settings for compressor and skipper."""
    from sparsight.pipeline import analyze_checkpoint

    analyze_checkpoint(model, data, images, samples, out, _console())


@data_app.command()
def preview(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; the embedded scenes if not given")] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("preview.png"),
    n: Annotated[int, typer.Option(help="images", min=1)] = 12,
) -> None:
    """Write a contact sheet of a recipe's data."""
    from sparsight.console import Console
    from sparsight.data.preview import contact_sheet
    from sparsight.data.sources import open_source
    from sparsight.settings.data import SceneData
    from sparsight.settings.load import load_recipe

    data, side = SceneData(), 256
    if recipe is not None:
        settings = load_recipe(recipe, overrides)
        stage = settings.stages[0]
        data, side = settings.data_of(stage), stage.image_size or side  # type: ignore[assignment]
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: expected an image's name, .png, .jpg or .webp")
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(open_source(data, n, side), n).save(out)
    Console().print(f"wrote [bold]{out}[/]")


@data_app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder for the page and check.json")] = Path("check"),
    workers: Annotated[int, typer.Option(help="processes that look at samples", min=0)] = 2,
    stage: Annotated[str | None, typer.Option(help="whose data to check, where stages have their own")] = None,
) -> None:
    """Look at all samples of a recipe: which are bad and why, and how long they are. Exit code 1 if any is bad."""
    from sparsight.settings.load import load_recipe

    settings = load_recipe(recipe, overrides)
    from sparsight.pipeline import check_data

    record = check_data(settings, out, workers, _console(), stage)
    if record["bad"] or record["too_long"]:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Annotated[
        Path | None, typer.Argument(help="folder of a model, checkpoint or run; else this machine")
    ] = None,
) -> None:
    """Show versions, devices and assets, and the command that installs a missing one; or check that a folder's files
    are as they were saved. Exit code 1 if something is missing or damaged."""
    from sparsight.console import Console
    from sparsight.doctor import diagnose, examine, render

    checks = diagnose() if model is None else examine(model)
    render(checks, Console())
    if any(check.status in ("missing", "damaged") for check in checks):
        raise typer.Exit(1)


_format_warning = warnings.formatwarning


def _warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """Warnings and tracebacks, which Python prints itself, hold names of files, too. The line of pydantic that renames
    a key helps nobody."""
    from sparsight.console import printable

    renamed = issubclass(category, RenamedWarning)
    return printable(f"warning: {message}\n" if renamed else _format_warning(message, category, *where, **more))


def _traceback(*found: Any) -> None:
    from sparsight.console import printable

    sys.stderr.write(printable("".join(traceback.format_exception(*found))))


def main() -> None:
    """Entry point. A user's mistake is one clear message and exit code 2; a bug of ours shows its traceback."""
    warnings.formatwarning = _warning
    try:
        app()
    except (UserError, OSError, ImportError) as error:
        if os.environ.get("SPARSIGHT_TRACEBACK"):
            raise
        from rich.markup import escape

        from sparsight.console import Console

        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # the system's, with its number
            message = f"{error.filename}: {(error.strerror or message).lower()}. Give another path, or mend this one"
        if message.startswith("Caught "):  # from a process that loads data: its traceback, with the message at the end
            message = message.rsplit("Error: ", 1)[-1].strip()
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    finally:
        sys.excepthook = _traceback  # here, because typer sets its own
