"""The command line as a user meets it: what it offers, what it says about mistakes, and whole runs in own processes."""

from __future__ import annotations

import contextlib
import html
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image, ImageDraw
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.trainer_utils import get_last_checkpoint

from forked import Forks
from small_runs import BRIDGE, FINER, quiet, recipe_values, save_encoder, stage_values
from sparsight import cli
from sparsight.data.collate import TrainingSet
from sparsight.pipeline import load, run
from sparsight.reporting import read_run
from sparsight.settings.bridges import ChainOfSightConfig
from sparsight.settings.recipe import Recipe
from tiny import clip_config, make_language, make_vlm

# A new command or option is a promise to keep: it is added here on purpose.
SURFACE = {
    "demo": ["--out", "--recipe", "--resume", "--overwrite", "--short", "overrides"],
    "train": ["recipe", "overrides", "--out", "--resume", "--overwrite", "--preset", "--engine", "--ranks"],
    "compare": ["runs", "--out"],
    "watch": ["run"],
    "plan": ["recipe", "overrides", "--preset", "--device", "--mfu", "--memory", "--like", "--out"],
    "eval": [
        *["checkpoint", "--items", "--split", "--data", "--images", "--metric"],
        *["--format", "--answers", "--choices"],
        *["--layouts", "--keep", "--method", "--out", "--against"],
    ],
    "export": ["model", "--to", "--out"],
    "scale": ["checkpoint", "--out", "--layout", "--image-size", "--levels", "--source"],
    "inspect": ["checkpoint", "--image", "--out"],
    "analyze": ["model", "--data", "--images", "--samples", "--out"],
    "doctor": ["model"],
    "data preview": ["recipe", "overrides", "--out", "--n"],
    "data check": ["recipe", "overrides", "--out", "--workers", "--stage"],
}
HEAVY = {"torch", "transformers", "accelerate", "peft", "pydantic", "yaml", "numpy", "PIL", "rich", "plotly"}
NO_SCORES = {"kind": "none"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from sparsight.cli import main; main()", *map(str, arguments)]


@pytest.fixture
def sparsight(fresh: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in its own process."""
    return partial(fresh.run, "from sparsight.cli import main; main()")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """The command in this process, which saves seconds: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsight", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def write(tmp_path: Path, encoder: Path) -> Callable[..., Path]:
    """A recipe file of a small run, with changes."""

    def make(**changes: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe_values(encoder, **({"evaluation": NO_SCORES} | changes))))
        return file

    return make


# ---------------------------------------------------------------------------------------- what there is


def surface(group: Any, prefix: str = "") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            found |= surface(each, f"{prefix}{name} ")
        else:
            opts = [max(p.opts, key=len) for p in each.params if p.name != "help"]
            found[prefix + name] = opts
    return found


def test_commands_and_options_are_those_that_were_meant() -> None:
    assert surface(typer.main.get_command(cli.app)) == SURFACE


def test_help_shows_them_all(here: Callable[..., tuple[Any, str, str]]) -> None:
    _, text, _ = here("--help")
    assert all(f"\n  {name.split()[0]} " in text for name in SURFACE)
    for name, parameters in SURFACE.items():
        code, text, _ = here(*name.split(), "--help")
        assert code == 0
        assert [option for option in parameters if option.startswith("--") and option not in text] == []


def test_help_loads_nothing_heavy() -> None:
    """No clock: what is not imported takes no time on any machine."""
    code = "import sys; sys.argv = ['sparsight', '--help']; from sparsight.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Commands:" in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in lines}
    assert "sparsight" in loaded and loaded & HEAVY == set()


# ---------------------------------------------------------------------------------------- mistakes


def test_engine_starts_the_command_on_several_ranks(
    here: Callable[..., tuple[Any, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the program that this process becomes; test_engines.py starts them."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    became: list[Any] = []

    def become(program: str, command: list[str]) -> None:
        became.append((program, command))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tmp_path / "encoder")))
    for name, launcher in (("ddp", "torch.distributed.run"), ("zero2", "accelerate.commands.launch")):
        here("train", recipe, "seed=3", "--engine", name, "--ranks", 2, "--resume")
        program, command = became.pop()
        assert program == command[0] == sys.executable and command[2] == launcher
        assert command[-7:] == ["sparsight", "train", str(recipe), "seed=3", "--out", "runs/small", "--resume"]
    config = yaml.safe_load((tmp_path / "runs" / "small-zero2.yaml").read_text())
    assert (config["distributed_type"], config["num_processes"]) == ("DEEPSPEED", 2)
    settings = json.loads(Path(config["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert settings["zero_optimization"] == {"stage": 2} and settings["gradient_clipping"] == "auto"
    for options, said in (
        (["--engine", "zero9"], "expected one of ddp, fsdp2, zero2, zero3"),
        (["--engine", "fsdp2", "--ranks", 2], "shows no GPU; accelerate shards on GPUs alone"),
        (["--engine", "ddp"], "how many ranks there are to be: --ranks"),
        (["--ranks", 2], "--ranks 2: of which --engine?"),
    ):
        code, _, error = here("train", recipe, *options)
        assert code == 2 and said in error
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "a launcher has done so" in here("train", recipe, "--engine", "ddp", "--ranks", 2)[2]
    assert became == []


@pytest.mark.parametrize(
    "override, expected",
    [
        ("stages.pretrain.bach_size=8", ["unknown key 'bach_size'", "did you mean 'batch_size'?"]),
        ("sed=1", ["unknown key 'sed'", "did you mean 'seed'?"]),
        ("stages.pretrain.bridge.layout=cos-33", ["cos-33", "cos-32"]),
        ("stages.pretrain.bridge.layout=1:16,x", ["1:16,x"]),
        ("stages.nope.seed=1", ["no item 'nope'", "pretrain", "finetune"]),
        ("seed", ["seed", "key=value"]),
        ("vision=no-such-encoder", ["vision 'no-such-encoder'"]),
        ("language=no-such-model", ["language 'no-such-model'"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    here: Callable[..., tuple[Any, str, str]],
    write: Callable[..., Path],
    tmp_path: Path,
    override: str,
    expected: list[str],
) -> None:
    code, _, said = here("train", write(), override, "--out", tmp_path / "out")
    assert code == 2
    assert [word for word in expected if word not in said] == [], said
    assert said.startswith("error: ") and "Traceback" not in said


def test_what_is_not_there_is_named(
    here: Callable[..., tuple[Any, str, str]], write: Callable[..., Path], tmp_path: Path
) -> None:
    cases = {
        "gone.yaml": ("train", tmp_path / "gone.yaml"),
        "data.json": (
            "train",
            write(data={"kind": "json", "path": str(tmp_path / "data.json")}),
            "--out",
            tmp_path / "o",
        ),
        "nothing": ("eval", tmp_path / "nothing"),
    }
    for word, arguments in cases.items():
        code, _, said = here(*arguments)
        assert code == 2 and word in said and "Traceback" not in said
    assert here("no-such-command")[0] == 2


def test_a_folder_that_holds_a_run_is_refused(
    here: Callable[..., tuple[Any, str, str]], write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.jsonl").write_text("{}\n" * 2)
    code, _, said = here("train", write(), "--out", tmp_path / "out")
    assert code == 2 and "--resume" in said and "--overwrite" in said
    code, _, said = here("train", write(), "--out", tmp_path / "out", "--resume")
    assert code == 2 and "run.jsonl, line 1: expected a header with the run's recipe, found b'{}'" in said


@pytest.mark.parametrize("name", ["train", "demo"])
def test_F26_overwrite_moves_what_is_there_aside_and_says_where(
    here: Callable[..., tuple[Any, str, str]],
    write: Callable[..., Path],
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    recipe, out = write(stages=[stage_values(samples=4)]), tmp_path / "out"
    run_folder, arguments = out, ["train", recipe, "--out", out]
    if name == "demo":
        shared = recipe_values(encoder, evaluation=NO_SCORES, stages=[stage_values(samples=4)])
        del shared["name"]
        recipe.write_text(yaml.safe_dump({"shared": shared, "runs": {"a": {}, "b": {}}}))
        run_folder, arguments = out / "a", ["demo", "--recipe", recipe, "--out", out]
    for folder in (run_folder, tmp_path / "out-old"):  # and one of an earlier time
        folder.mkdir(parents=True)
        (folder / "run.jsonl").write_text("{}\n" * 2)
    (out / "cache").mkdir()
    (out / "cache" / "notes.txt").write_text("mine")
    before = {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert here(*arguments)[0] == 2
    code, _, said = here(*arguments, "--overwrite", "--resume")
    assert code == 2 and "--resume goes on with the run that --overwrite moves aside" in said
    with monkeypatch.context() as patch:
        patch.chdir(run_folder)
        code, _, said = here(*arguments, "--overwrite")
        assert code == 2 and "which this command works in" in said
    assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    code, said, _ = here(*arguments, "--overwrite")
    aside = tmp_path / "out-old-2"
    assert code == 0 and f"{out} is now {aside}" in said
    assert {file.relative_to(aside): file.read_bytes() for file in aside.rglob("*") if file.is_file()} == before
    assert read_run(run_folder).trained


def test_F26_version(here: Callable[..., tuple[Any, str, str]]) -> None:
    code, said, _ = here("--version")
    assert code == 0 and said == f"sparsight {version('sparsight')}\n"


def test_a_traceback_is_there_for_those_who_ask(
    here: Callable[..., tuple[Any, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        here("train", tmp_path / "gone.yaml")


# ---------------------------------------------------------------------------------------- data and doctor

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 30),
    "blue": (30, 30, 220),
    "black": (10, 10, 10),
    "white": (250,) * 3,
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A LLaVA data set: ten small images of five colours, some with a bar in them, in sizes of their own."""
    folder, rng, rows = tmp_path / "own", random.Random(0), []
    (folder / "images").mkdir(parents=True)
    for number in range(10):
        name = list(COLOURS)[number % 5]
        image = Image.new("RGB", (rng.randint(40, 90), rng.randint(40, 90)), COLOURS[name])
        if number >= 5:
            ImageDraw.Draw(image).rectangle((5, 5, 9, 30), fill=(128, 128, 128))
        image.save(folder / "images" / f"{number}.{('png', 'jpg')[number % 2]}")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": f"It is {name}."},
        ]
        rows.append({"id": f"own-{number}", "image": f"{number}.{('png', 'jpg')[number % 2]}", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def json_data(folder: Path) -> dict[str, str]:
    return {"kind": "json", "path": str(folder / "data.json"), "images": str(folder / "images")}


def test_preview_writes_a_image(
    here: Callable[..., tuple[Any, str, str]], write: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    for name, arguments in {
        "own/sheet.png": (write(data=json_data(images)), "--n", 3),
        "scenes.png": (write(), "data.scenes=3"),
    }.items():
        code, said, _ = here("data", "preview", *arguments, "--out", tmp_path / name)
        assert code == 0 and "wrote" in said
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == "PNG" and sheet.width > 3 * 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = make_vlm(ChainOfSightConfig("1:4,2:1", width=32, heads=2))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_scale_prints_what_came_from_where(
    here: Callable[..., tuple[Any, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    options = "--layout", "1:4,2:4,4:1", "--image-size", 128, "--levels", "2,3", "--source", "2=1"
    code, out, _ = here("scale", checkpoint, "--out", tmp_path / "scaled", *options)
    assert code == 0 and "visual tokens 8 -> 36, images 64 -> 128 px" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["2:4", "1:4"] in [row[:2] for row in rows] and ["4:1", "2:1"] in [row[:2] for row in rows]
    assert load(tmp_path / "scaled")[0].config.num_image_tokens == 36


def test_inspect_writes_a_page(here: Callable[..., tuple[Any, str, str]], checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 40), "red").save(tmp_path / "a.png")
    code, out, _ = here("inspect", checkpoint, "--image", tmp_path / "a.png", "--out", tmp_path / "seen")
    assert code == 0 and "2 images beside it" in out
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"index.html", "scale-1x4.png", "scale-2x1.png"}
    assert "a.png" in (tmp_path / "seen" / "index.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("scale", "CHECKPOINT", "--out", "new", "--source", "4"), "--source 4: expected integers such as 4=1"),
        (("scale", "CHECKPOINT", "--out", "new", "--levels", "2,x"), "--levels 2,x: expected integers such as 4,1"),
        (("scale", "CHECKPOINT", "--out", "new", "--layout", "1:4,3:3"), "scale 3:3 of '1:4,3:3' has no source"),
        (("scale", "CHECKPOINT", "--out", "new", "--image-size", 2), "image_size 2: CLIPVisionModel cuts images"),
        (("scale", ".", "--out", "new"), "expected a model of Sparsight, found no config.json"),
        (("inspect", "CHECKPOINT", "--image", "none.png"), "none.png: there is no such file"),
        (("inspect", "."), "no model there"),
        (("analyze", "."), "no model there"),
        (
            ("analyze", "no/such/model"),
            "'no/such/model': there is no such folder here, and from a hub it cannot be loaded",
        ),
        (("analyze", "CHECKPOINT", "--images", "seen"), "--images seen: expected --data as well"),
        (("analyze", "CHECKPOINT", "--data", "none.json"), "none.json: there is no such file"),
    ],
)
def test_what_cannot_be_scaled_or_looked_at(
    here: Callable[..., tuple[Any, str, str]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[Any, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = here(*(checkpoint if argument == "CHECKPOINT" else argument for argument in arguments))
    assert code == 2 and message in err, err
    assert list(tmp_path.iterdir()) == []


def llava(folder: Path) -> Path:
    """LLaVA as transformers has it, tiny and with random weights, and its processor."""
    _, own = make_vlm()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    text |= {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": len(own.tokenizer)}
    config = LlavaConfig(
        vision_config=clip_config(), text_config=text, image_token_id=own.image_token_id, vision_feature_layer=-2
    )
    options = {"chat_template": own.chat_template, "patch_size": 8, "vision_feature_select_strategy": "default"}
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(own.image_processor, own.tokenizer, num_additional_image_tokens=1, **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, layers, tokens", [("ours", 2, 8), ("llava", 5, 64)])
def test_analyze_measures_any_model(
    here: Callable[..., tuple[Any, str, str]],
    checkpoint: Path,
    images: Path,
    tmp_path: Path,
    kind: str,
    layers: int,
    tokens: int,
) -> None:
    model = checkpoint if kind == "ours" else llava(tmp_path / "llava")
    rows = json.loads((images / "data.json").read_text())
    del rows[1]["image"]  # a conversation without an image
    rows[1]["conversations"][0]["value"] = "Which colours are there?"
    (images / "data.json").write_text(json.dumps(rows))
    options = "--data", images / "data.json", "--images", images / "images", "--samples", 3
    code, out, _ = here("analyze", model, *options, "--out", tmp_path / "seen")
    assert code == 0 and "no measured optimum" in out and "without an image, passed over: 1" in out
    record = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    found = record["analysis"]
    assert (found["samples"], found["images"], found["visual_tokens"]) == (3, 3, 3 * tokens)
    assert len(found["layers"]) == layers and found["without_attention"] == ""
    assert all(0 < layer["attention"] < 1 for layer in found["layers"])
    assert record["environment"]["versions"]["torch"] and record["suggestion"]["code"] in out
    assert record["without_images"] == 1
    page = html.unescape((tmp_path / "seen" / "index.html").read_text())
    assert record["suggestion"]["reasons"]["keep"] in page and record["suggestion"]["code"] in page


def test_what_cannot_be_analyzed(
    here: Callable[..., tuple[Any, str, str]], checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    language, tokenizer = make_language()
    for part in (language, tokenizer):
        part.save_pretrained(tmp_path / "language")
    code, _, err = here("analyze", tmp_path / "language", "--out", tmp_path / "seen")
    assert code == 2 and "language': it cannot be loaded: Unrec" in err
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": turns}] * 2))
    code, _, err = here("analyze", checkpoint, "--data", tmp_path / "text.json", "--out", tmp_path / "seen")
    assert code == 2 and "text.json: none of its 2 samples has an image" in err
    assert not (tmp_path / "seen").exists()


def test_doctor_finds_nothing_missing(here: Callable[..., tuple[Any, str, str]]) -> None:
    code, said, _ = here("doctor")
    assert code == 0 and "torch" in said


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_goes_bad_names_sample_and_file(
    here: Callable[..., tuple[Any, str, str]], write: Callable[..., Path], images: Path, tmp_path: Path, workers: int
) -> None:
    file = images / "images" / "7.jpg"
    file.write_bytes(file.read_bytes()[:300])
    recipe = write(data=json_data(images), workers=workers)
    code, _, said = here("train", recipe, "--out", tmp_path / "out")
    assert code == 2
    assert "sample 'own-7'" in said and str(file) in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["train", "demo"])
def test_ctrl_c_is_exit_code_130_with_a_hint(
    here: Callable[..., tuple[Any, str, str]],
    write: Callable[..., Path],
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    real, left = TrainingSet.__getitem__, [6]

    def get(self: TrainingSet, index: int) -> dict[str, Any]:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, index)

    monkeypatch.setattr(TrainingSet, "__getitem__", get)
    recipe, folder = write(), tmp_path / "out"
    if name == "demo":
        shared = recipe_values(encoder, evaluation=NO_SCORES)
        del shared["name"]
        recipe.write_text(yaml.safe_dump({"shared": shared, "runs": {"a": {"seed": 1}, "b": {"seed": 1}}}))
    arguments = (name, "--recipe", recipe) if name == "demo" else (name, recipe)
    code, said, _ = here(*arguments, "--out", folder)
    assert code == 130 and "--resume" in said and "stage 'pretrain' at step 2 of 4" in " ".join(said.split())
    run_folder = folder / "a" if name == "demo" else folder
    assert (run_folder / "pretrain" / "checkpoints" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("where", ["sparsight.pipeline.train.build", "sparsight.pipeline.train.check_inputs"])
def test_D12_ctrl_c_before_training_is_told(
    here: Callable[..., tuple[Any, str, str]],
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    code, said, error = here("train", write(), "--out", tmp_path / "out")
    assert code == 130 and said.startswith("stopped at once. What is saved is whole") and error == ""


def logged(folder: Path, stage: str) -> int:
    """Steps of a stage that the log of a running process holds."""
    file = folder / "run.jsonl"
    return file.read_text().count(f'"type": "step", "stage": "{stage}"') if file.is_file() else 0


def started(recipe: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("train", recipe, "--out", folder, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def when(process: subprocess.Popen[str], folder: Path, stage: str, steps: int) -> None:
    """Wait until the stage has done so many steps."""
    deadline = time.monotonic() + 90
    while logged(folder, stage) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def test_a_run_is_watched_from_another_terminal_and_compared(
    sparsight: Callable[..., subprocess.CompletedProcess[str]], write: Callable[..., Path], tmp_path: Path
) -> None:
    """Ctrl-C ends the watching, and not the run; what is left of a killed run is shown beside a whole one."""
    killed = write(stages=[stage_values(samples=80_000)]).rename(tmp_path / "long.yaml")  # longer than this test
    recipe, folder = write(), tmp_path / "out"
    process = started(killed, tmp_path / "long")
    when(process, tmp_path / "long", "pretrain", 3)
    watching = subprocess.Popen(command("watch", tmp_path / "long"), stdout=subprocess.PIPE, text=True)
    for _ in range(10):  # a signal that comes while it imports may be lost, and how long that takes is the machine's
        with contextlib.suppress(subprocess.TimeoutExpired):
            watching.wait(timeout=6)
            break
        watching.send_signal(signal.SIGINT)
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == 0 and "of 20000 steps" in said and "last record" in said and "time left" in said
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert sparsight("train", recipe, "--out", folder).returncode == 0
    assert "small: ended" in sparsight("watch", folder).stdout
    result = sparsight("compare", folder, tmp_path / "long", "--out", tmp_path / "seen")
    said = " ".join(result.stdout.split())
    assert result.returncode == 0, result.stderr
    assert "stage pretrain is not finished" in said and "samples hash" in said and "speed-up ? of ? possible" in said
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"report.html", "comparison.json"}


@pytest.mark.parametrize("name", ["compare", "watch"])
def test_a_folder_without_a_run_is_told(here: Callable[..., tuple[Any, str, str]], tmp_path: Path, name: str) -> None:
    code, _, err = here(name, tmp_path)
    assert code == 2 and f"there is no run log at {tmp_path / 'run.jsonl'}; expected the folder of a run" in err
    (tmp_path / "run.jsonl").write_text("x\n")
    code, _, err = here(name, tmp_path)
    assert code == 2 and "has no header record in its 1 lines; line 1: cut, or not JSON" in err


def test_ctrl_c_and_kill_and_resume_give_the_run_that_was_never_interrupted(
    sparsight: Callable[..., subprocess.CompletedProcess[str]], write: Callable[..., Path], tmp_path: Path
) -> None:
    """In the terminal, Ctrl-C reaches the whole group of processes, that which loads data too."""
    stages = [
        stage_values(samples=120, checkpoints=6),
        stage_values("finetune", bridge=FINER, lora={"rank": 4, "dropout": 0.1}, samples=120, checkpoints=6),
    ]
    recipe, folder = write(stages=stages, workers=1), tmp_path / "out"
    rng = random.Random()
    first, second = rng.randint(2, 14), rng.randint(2, 14)

    process = started(recipe, folder)
    when(process, folder, "pretrain", first)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said, said
    stopped = logged(folder, "pretrain")
    assert get_last_checkpoint(str(folder / "pretrain" / "checkpoints")).endswith(f"checkpoint-{stopped}")

    process = started(recipe, folder, "--resume")
    when(process, folder, "finetune", second)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    done = sparsight("train", recipe, "--out", folder, "--resume")
    assert done.returncode == 0 and "done already" in done.stdout, done.stderr

    found = read_run(folder)
    assert found.problems == [] and [stage.finished for stage in found.stages] == [True, True]
    for stage in found.stages:
        assert [step["step"] for step in stage.steps] == list(range(1, 31))
        assert sum(step["samples"] for step in stage.steps) == 120
    run(Recipe.model_validate(yaml.safe_load(recipe.read_text())), tmp_path / "straight", quiet())
    for stage, right in zip(found.stages, read_run(tmp_path / "straight").stages, strict=True):
        # Bit-equal on the CPU in fp32, from process to process.
        assert [step["loss"] for step in stage.steps] == [step["loss"] for step in right.steps], (first, second)


ASK = """
import json, sys
import sparsight
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
answers = []
for file in sys.argv[2:]:
    content = [{"type": "image", "image": Image.open(file)}, {"type": "text", "text": "What colour is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answers.append(processor.decode(ids, skip_special_tokens=True))
print(json.dumps([model.config.num_image_tokens, answers]))
"""


def test_own_images_in_and_a_model_of_transformers_out(
    fresh: Forks,
    sparsight: Callable[..., subprocess.CompletedProcess[str]],
    write: Callable[..., Path],
    images: Path,
    tmp_path: Path,
) -> None:
    """From a folder of images to a model that a new process loads as any other, and that has learnt the colours."""
    rates = {"bridge": 5e-3, "language": 5e-3}
    stages = [
        stage_values(samples=600, batch_size=10, learning_rate=rates, checkpoints=1),
        stage_values("finetune", bridge=FINER, samples=200, batch_size=10, learning_rate=rates, checkpoints=1),
    ]
    recipe = write(data=json_data(images), stages=stages, precision="auto")
    result = sparsight("train", recipe, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    model = tmp_path / "runs" / "small" / "finetune" / "model"
    assert str(model.relative_to(tmp_path)) in result.stdout.replace("\n", "")
    files = sorted((images / "images").iterdir())
    asked = fresh.run(ASK, model, *files, cwd=images)
    assert asked.returncode == 0, asked.stderr
    tokens, answers = json.loads(asked.stdout.splitlines()[-1])
    assert tokens == 24
    truth = [f"It is {list(COLOURS)[int(file.stem) % 5]}." for file in files]
    right = sum(answer == true for answer, true in zip(answers, truth, strict=True))
    assert right >= 8, list(zip(answers, truth, strict=True))  # measured: 10 of 10; a blind guess gets 2
    found = read_run(tmp_path / "runs" / "small")
    assert found.problems == [] and [len(stage.steps) for stage in found.stages] == [60, 20]
    assert BRIDGE["layout"] == found.stages[0].layout


def test_F26_errors_of_the_system_are_told_without_its_numbers(
    here: Callable[..., tuple[Any, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = here("scale", checkpoint, "--out", tmp_path / "file" / "new", "--image-size", 128)
    assert code == 2 and "Errno" not in err and "not a directory. Give another path" in err.replace("\n", " ")
