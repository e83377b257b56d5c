"""`sparsight plan`: a forecast without weights, its honesty about what it assumes, and what it says about mistakes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from small_runs import quiet, recipe_values, stage_values
from sparsight.cost.forecast import (
    StageCost,
    at_peak,
    forecast,
    standard,
    total_flops,
)
from sparsight.devices.peaks import known_device, peak_flops
from sparsight.reporting.plan_page import check_fits, memory_of, print_plan, speed_of, write_plan
from sparsight.reporting.runlog import RunLog
from sparsight.schedules import skip_probabilities
from sparsight.settings.bridges import ChainOfSightConfig
from sparsight.settings.load import load_recipe, load_recipes
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.settings.recipe import LearningRates, Recipe, Stage
from sparsight.sparse.forward import State

PAPER = Path(__file__).parents[1] / "recipes" / "paper-7b.yaml"


@pytest.fixture
def paper() -> Recipe:
    return load_recipe(PAPER)


def test_without_torch():
    code = (
        "import sys; from sparsight.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(PAPER), "--device", "H100"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "one H100: its peak is 989 TFLOP/s, and a run does 40% of it (assumed)" in text
    assert "a single-scale resampler of 336 tokens" in text
    assert "23 text tokens a conversation" in text


def test_paper_ratios(paper):
    """FLOPs allow more than the clock of Chain-of-Sight's Table 1 shows; the order is the paper's."""
    clock = {"cos-32": 0.27, "cos-48": 0.35, "cos-80": 0.42, "cos-336": 1.0}
    flops = [total_flops(forecast(changed(paper, bridge=ChainOfSightConfig(name)))[:1]) for name in clock]
    assert flops == sorted(flops)
    assert all(0.5 * time < part / flops[-1] <= time for part, time in zip(flops, clock.values(), strict=True))


def test_by_hand(paper):
    """Stage one: LM forward, its gradient, LoRA thrice; encoder forward alone; all of it times samples."""
    cost = forecast(paper)[0]
    tokens = (23 + 32) * paper.stages[0].samples
    maps = 4 * 4096**2 + 3 * 4096 * 11008
    adapters = 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    linear = 32 * tokens * (2 * 2 * maps + 3 * 2 * adapters)
    assert cost.flops["language_projections"] + cost.flops["language_mlp"] == pytest.approx(linear)
    assert cost.flops["encoder"] == cost.shapes[0].flops(224, (16, 23), cost.trains) * paper.stages[0].samples
    assert cost.parts.trains == {"vision": 0, "bridge": 54_614_016, "language": 159_907_840}
    assert at_peak(1e15, 0.5)(cost) == pytest.approx(sum(cost.flops.values()) / 5e14)


def changed(recipe: Recipe, number: int = 0, **values) -> Recipe:
    stages = list(recipe.stages)
    stages[number] = stages[number].model_copy(update=values)
    return recipe.model_copy(update={"stages": tuple(stages)})


def test_methods_over_their_schedules(paper):
    plain = forecast(paper)
    kept = forecast(changed(paper, compressor=CompressorConfig(keep=0.25, final=0.75)))[0]
    assert kept.mean("tokens") == pytest.approx(16, abs=0.2) and kept.length(0.25) == 23 + 8
    dense = forecast(changed(paper, compressor=CompressorConfig(keep=0.25, dense_every=2)))[0]
    assert dense.mean("tokens") == pytest.approx((8 + 32) / 2)
    skipper = SkipperConfig(alpha=0.6, epsilon=0.3)
    skipped = forecast(changed(paper, 1, skipper=skipper))[1]
    each = [sum(skip_probabilities(32, (n + 0.5) / 500, 0.6, 0.3)) for n in range(500)]
    assert skipped.mean("layers") == pytest.approx(32 - sum(each) / 500, rel=1e-3)
    share = skipped.mean("layers") / 32
    assert skipped.flops["language_mlp"] == pytest.approx(share * plain[1].flops["language_mlp"])
    assert skipped.flops["vocabulary"] == plain[1].flops["vocabulary"]
    split = forecast(changed(paper, 1, skipper=SkipperConfig(alpha=0.6, epsilon=0.3, tokens="visual")))[1]
    text = split.stage.conversation.text / split.length()  # through all layers
    share += (1 - share) * text
    assert 0 < text < 0.5 and split.flops["language_mlp"] == pytest.approx(share * plain[1].flops["language_mlp"])


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "plateau"},
        {"schedule": "plateau", "decay_from": 0.6, "dense_last": 0.1},
        {"schedule": "constant", "dense_last": 0.25},
        {"schedule": "plateau", "layers": "alternating", "inverse_density": True, "epsilon": 0.2, "protected": (2, 1)},
    ],
    ids=str,
)
def test_layers_run_as_planned(paper, settings):
    """The layers that the steps of a stage draw, against the forecast; twice the standard error is allowed."""
    skipper, steps = SkipperConfig(**({"alpha": 0.4, "epsilon": 0.0} | settings)), 1000
    planned = forecast(changed(paper, 1, skipper=skipper))[1]
    state = State(32, None, skipper, 3, True)
    ran = []
    for step in range(steps):
        state.step(step, step / steps)
        ran.append(32 - sum(state.skipped))
    assert planned.mean("layers") == pytest.approx(sum(ran) / steps, abs=2 * np.std(ran) / steps**0.5)
    assert planned.flops["language_mlp"] == pytest.approx(
        planned.mean("layers") / 32 * forecast(paper)[1].flops["language_mlp"]
    )


def test_a_layout_that_does_not_fit(paper):
    with pytest.raises(ValueError, match="a grid of 16 windows per side needs at least 16 patches per side"):
        forecast(changed(paper, 1, image_size=196))
    with pytest.raises(ValueError, match="vision 'clip-xxl': its sizes are not known here"):
        forecast(paper.model_copy(update={"vision": "clip-xxl"}))


def test_cached_images_are_encoded_once():
    stage = stage_values() | {"cache_features": True, "samples": 400}
    stages = [stage | {"name": "a"}, stage | {"name": "b"}]
    data = {"kind": "scenes", "scenes": 100}
    recipe = Recipe.model_validate(recipe_values("efficientnet-lite0") | {"stages": stages, "data": data})
    first, second = forecast(recipe)
    assert first.flops["encoder"] == 100 * first.shapes[0].flops(first.stage.image_size, None, first.trains)
    assert second.flops["encoder"] == 0


def test_standard_is_plain_and_costs_more(paper):
    plain = standard(changed(paper, compressor=CompressorConfig()))
    assert {(s.bridge.kind, s.bridge.tokens, s.bridge.width) for s in plain.stages} == {("resampler", 336, 1024)}
    assert all(stage.compressor is None for stage in plain.stages)
    assert total_flops(forecast(paper)) < 0.3 * total_flops(forecast(plain))


def test_what_fits(paper):
    cost = forecast(paper)[1]
    limit = known_device("NVIDIA H100 80GB HBM3")[2]
    most = cost.fits(limit)
    assert sum(cost.memory(most).values()) <= limit < sum(cost.memory(most + 1).values())
    full = changed(paper, 1, lora=None)
    cost = StageCost(full, full.stages[1])
    with pytest.raises(
        ValueError, match="stage 'finetune' needs .* at a micro-batch of 4.*largest part.*Not even one of 1 fits"
    ):
        check_fits(cost, 40e9)
    cost = forecast(paper)[1]
    fits = cost.fits(40e9)
    with pytest.raises(ValueError, match=f"A micro-batch of {fits} fits"):
        check_fits(replace(cost, stage=cost.stage.model_copy(update={"micro_batch_size": 256})), 40e9)
    print_plan(paper, None, limit, quiet())


def test_a_comparison_is_planned_run_by_run():
    recipes = load_recipes(PAPER.parent / "demo.yaml", ["shared.seed=4"])
    assert [recipe.name for recipe in recipes] == ["standard", "sparsight"] and recipes[1].seed == 4
    assert [recipe.name for recipe in load_recipes(PAPER)] == ["paper-7b"]


def test_a_preset_is_planned_before_it_is_trained():
    """The preset's stages, each cheaper than the recipe's own plan says; what it does not go with is told."""
    own = PAPER.parent / "own-data.yaml"
    (settled,) = load_recipes(own, None, "scale-settled")
    assert [stage.name for stage in settled.stages] == ["pretrain", "settle", "finetune"]
    assert total_flops(forecast(settled)) < total_flops(forecast(load_recipe(own)))
    with pytest.raises(ValueError, match=r"--preset few-tokens: .*demo\.yaml compares runs"):
        load_recipes(PAPER.parent / "demo.yaml", None, "few-tokens")


def test_page(paper, tmp_path):
    named = paper.model_copy(update={"name": "paper"})
    write_plan(tmp_path / "plan.html", named, at_peak(1e15, 0.4), 80e9)
    page = (tmp_path / "plan.html").read_text()
    assert "language mlp" in page
    lead = page.split('<p class="lead" id="verdict">')[1].split("</p>")[0]  # F27: there was no headline
    assert re.fullmatch(
        r"[\d.]+ EFLOP in all: 0\.\d\dx of the standard recipe&#39;s; \d+ h: 0\.\d\dx of its time\.", lead
    )
    bars = json.loads(page.split('id="figures">')[1].split("</script>")[0])[0]["data"]
    assert len({json.dumps(bar["marker"]) for bar in bars}) == len(bars) == 6  # two were in one grey


def test_time_rests_on_what_is_said(paper, tmp_path):
    assert speed_of(paper) == (None, "No time: name a --device, or a run of this machine with --like RUN.")
    speed, said = speed_of(paper, "H100", 0.25)
    assert "H100: its peak is 989 TFLOP/s, and a run does 25% of it (given)" in said
    cost = forecast(paper)[0]
    assert speed(cost) == pytest.approx(sum(cost.flops.values()) / (0.25 * 989e12))
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12 and peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("another", "bf16") is None
    with pytest.raises(ValueError, match="precision is fp32"):
        speed_of(paper.model_copy(update={"precision": "fp32"}), "H100")
    with pytest.raises(ValueError, match="device 'abacus' is not known; expected one of B200"):
        speed_of(paper, "abacus")
    with pytest.raises(ValueError, match="--mfu 40"):
        speed_of(paper, "H100", 40)
    with pytest.raises(ValueError, match="--memory lots: expected gigabytes, such as 80GB"):
        memory_of("lots", None)
    assert memory_of("24 gb", "H100") == 24e9 and memory_of(None, "H100") == 80e9 and memory_of(None, None) is None


def test_time_as_a_run_of_this_machine_went(paper, tmp_path):
    """FLOPs by seconds of all its stages, encoding included; a run without steps, or a device beside it, is told."""
    with RunLog(tmp_path / "run.jsonl") as log:
        log.write("header", version=1, run="before")
        log.write("stage", stage="a")
        log.write("step", stage="a", step=1, flops=1e9, seconds={"compute": 1.0})
        log.write("stage_end", stage="a", seconds=4.0, executed_flops=6e9)
        log.write("stage", stage="b")
        log.write("step", stage="b", step=1, flops=2e9, seconds={"compute": 1.0})
    speed, said = speed_of(paper, like=tmp_path)
    cost = forecast(paper)[0]
    assert said == "Time as before went: 1.6 GFLOP/s."
    assert speed(cost) == pytest.approx(sum(cost.flops.values()) / (8e9 / 5))
    with pytest.raises(ValueError, match="leave out --device and --mfu"):
        speed_of(paper, "H100", like=tmp_path)
    (tmp_path / "begun").mkdir()
    with RunLog(tmp_path / "begun" / "run.jsonl") as log:
        log.write("header", version=1, run="begun")
    with pytest.raises(ValueError, match="expected a run that has trained, found no step in its log"):
        speed_of(paper, like=tmp_path / "begun")


def test_steps_of_token_budgets(paper):
    """A step is one micro-batch: of 10,000 tokens, as many conversations of 55 as fit."""
    values = paper.stages[0].model_dump(exclude_unset=True, exclude={"batch_size", "micro_batch_size"})
    stage = Stage.model_validate(values | {"batch_tokens": 10_000})
    cost = forecast(paper.model_copy(update={"stages": (stage,)}))[0]
    assert cost.length() == 55 and cost.micro_batch == cost.batch == 181
    assert cost.steps == -(-stage.samples // 181) != stage.steps


def test_console_is_narrow_enough(paper):
    console = Console(width=80, record=True, file=io.StringIO())
    print_plan(paper, at_peak(1e15, 0.4), None, console)
    assert all(len(line) <= 80 for line in console.export_text().splitlines())


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA RTX A1000", "H1000", "GB200", "A100X"])
def test_a_device_is_not_taken_for_another_of_a_like_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is not known"):
        known_device(name)
    for known in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA GH200 480GB", "nvidia a40", "NVIDIA L4"):
        assert known_device(known)[0].lower() in known.lower()


def test_another_stages_own_images_are_encoded_too(paper):
    """Only images of the same data are in the cache already."""
    stages = [stage.model_copy(update={"cache_features": True, "image_size": 224}) for stage in paper.stages]
    same = [cost.flops["encoder"] for cost in forecast(paper.model_copy(update={"stages": tuple(stages)}))]
    own = paper.data.model_copy(update={"path": "other.json"})
    stages[1] = stages[1].model_copy(update={"data": own})
    apart = [cost.flops["encoder"] for cost in forecast(paper.model_copy(update={"stages": tuple(stages)}))]
    assert apart[0] == same[0] and apart[1] > same[1]


def test_what_trains_is_reckoned_in_fp32(paper):
    """As it is trained; what is frozen stays as it is stored, and what has trained stays in fp32."""
    frozen, tuned = forecast(changed(changed(paper, 1, lora=None), 0, learning_rate=LearningRates(bridge=1e-4)))
    assert frozen.shapes[1].weight_bytes == 2 and tuned.shapes[1].weight_bytes == 4
    assert forecast(changed(paper, 1))[1].shapes[1].weight_bytes == 2  # LoRA
    assert forecast(paper.model_copy(update={"precision": "fp32"}))[0].shapes[1].weight_bytes == 4
