"""Scores of a subset while a run trains: those of the model at that step, and training as if nobody had asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from small_runs import FINER, SCENES, quiet, recipe_values, save_encoder, stage_values
from sparsight.errors import UserError
from sparsight.modeling.scaling import scale_checkpoint
from sparsight.pipeline import evaluate_checkpoint, run
from sparsight.reporting import RunLog, read_run, read_runs, report
from sparsight.reporting.watch import render
from sparsight.settings.recipe import Recipe

ASKED = ("caption", "count")
METHODS = {"compressor": {"keep": 0.5}, "skipper": {"alpha": 0.5}, "lora": {"rank": 4, "dropout": 0.1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of three steps, the first on the way to the second's layout; with questions between, and without."""
    out = tmp_path_factory.mktemp("runs")
    encoder = save_encoder(out / "encoder")
    few, many = stage_values(samples=12), stage_values("finetune", samples=12, bridge=FINER, **METHODS)
    stages = [few | {"position_layout": FINER["layout"]}, many]
    data = SCENES | {"tasks": dict.fromkeys(ASKED, 1)}
    for name, evaluation in (("plain", {"kind": "none"}), ("asked", {"items": 2, "every": 2, "subset": 2})):
        values = recipe_values(encoder, name=name, stages=stages, evaluation=evaluation, data=data)
        run(Recipe.model_validate(values), out / name, quiet())
    return out


def test_training_goes_on_as_if_nobody_had_asked(runs: Path) -> None:
    """Losses and weights to the bit, with draws of layers, tokens and dropout; all that is logged of the steps, too."""
    plain, asked = (read_run(runs / name) for name in ("plain", "asked"))
    same = ("loss", "samples", "flops", "layers_run", "visual_tokens_kept", "learning_rate", "step")
    for one, other in zip(plain.stages, asked.stages, strict=True):
        assert [[step[key] for key in same] for step in one.steps] == [
            [step[key] for key in same] for step in other.steps
        ]
        assert one.executed_flops == other.executed_flops and one.visual_tokens == other.visual_tokens
    ours, theirs = (load_file(runs / name / "finetune" / "model" / "model.safetensors") for name in ("plain", "asked"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scores_are_those_of_the_model_at_that_step(runs: Path, tmp_path: Path) -> None:
    """Behind a stage's last step: of the saved model, in the layout that its positions were for."""
    found = read_run(runs / "asked")
    assert [[each["step"] for each in stage.scored] for stage in found.stages] == [[2, 3], [2, 3]]
    assert [stage.scored[-1]["layout"] for stage in found.stages] == [FINER["layout"], None]
    scale_checkpoint(runs / "asked" / "pretrain" / "model", tmp_path / "scaled", FINER["layout"])
    (scaled,) = evaluate_checkpoint(tmp_path / "scaled", 2, "validation", quiet())
    (final,) = evaluate_checkpoint(runs / "asked" / "finetune" / "model", 2, "validation", quiet())
    for stage, expected in zip(found.stages, (scaled, final), strict=True):
        assert stage.scored[-1]["scores"] == pytest.approx(expected.scores)
        assert stage.scored[-1]["items"] == dict.fromkeys(ASKED, 2)
    assert set(found.scores) == set(ASKED) and found.ended  # those behind training stand by themselves


def test_scores_are_shown(runs: Path, tmp_path: Path) -> None:
    comparison = report(
        [runs / "plain", runs / "asked"], tmp_path / "out", Console(file=(out := io.StringIO()), width=200)
    )
    plain, asked = comparison["runs"]
    assert plain["during"] == [] and [each["samples"] for each in asked["during"]] == [8, 12, 20, 24]
    assert {each["items"] for each in asked["during"]} == {2 * len(ASKED)}
    assert "Scores of a subset during training" in out.getvalue()
    assert "Scores during training" in (tmp_path / "out" / "report.html").read_text()
    shown = io.StringIO()
    Console(file=shown, width=200).print(render(read_runs([runs / "asked"])[0], 1.0, 200))
    assert "a subset, after step 3 of finetune: caption" in shown.getvalue()


def test_scores_behind_the_checkpoint_go_with_their_steps(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("header", version=1, run="r", recipe={"stages": [{"name": "a"}]})
        for step in (1, 2, 3):
            log.write("step", stage="a", step=step, loss=1.0, samples=4)
            log.write("eval_step", stage="a", step=step, scores={"count": step / 10})
        log.write("resume", stage="a", step=2)
        live = log.run()
    for found in (live, read_run(tmp_path)):
        assert [each["step"] for each in found.stages[0].scored] == [1, 2]
        assert found.scores == {} and not found.ended and found.problems == []


def test_every_with_nothing_to_ask_is_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = recipe_values(tmp_path, evaluation={"kind": "none", "every": 2})
    with pytest.raises(UserError, match=r"evaluation.every: there is nothing to ask during training: give held_out"):
        Recipe.read(values, "recipe")
