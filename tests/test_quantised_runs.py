"""Runs whose language model is in 4 or 8 bits, or whose adapters stay beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from small_runs import FINER, Crash, quiet, recipe_values, save_encoder, stage_values
from sparsight.cost.forecast import forecast
from sparsight.data.collate import TrainingSet
from sparsight.errors import UserError
from sparsight.modeling.quantised import without_adapters
from sparsight.pipeline import evaluate_checkpoint, load, run
from sparsight.reporting import read_run
from sparsight.settings.recipe import Recipe
from tiny import ask, make_image, make_language

NO_SCORES = {"kind": "none"}
LORA = {"rank": 4, "dropout": 0.1}
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
HELD = [
    pytest.param("none", id="plain"),
    pytest.param("nf4", marks=needs_bitsandbytes),
    pytest.param("int8", marks=needs_bitsandbytes),
]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an encoder and of a language model."""
    folder = tmp_path_factory.mktemp("parts")
    language, tokenizer = make_language(hidden=64)
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return save_encoder(folder / "encoder"), folder / "language"


@pytest.fixture
def values(parts: tuple[Path, Path]) -> Callable[..., dict[str, Any]]:
    """Alignment of the bridge, then adapters that are kept, with more visual tokens, then adapters again."""

    def make(quantization: str = "nf4", **changes: Any) -> dict[str, Any]:
        lora = LORA | ({} if quantization != "none" else {"keep": True})
        stages = [
            stage_values("align", learning_rate={"bridge": 2e-3}, samples=8),
            stage_values("tune", lora=lora, checkpoints=4, learning_rate={"bridge": 1e-3, "language": 1e-2}),
            stage_values("finer", bridge=FINER, lora=lora, samples=8, learning_rate={"bridge": 1e-3, "language": 1e-2}),
        ]
        language = {"path": str(parts[1]), "quantization": quantization}
        return recipe_values(parts[0], language=language, stages=stages, evaluation=NO_SCORES) | changes

    return make


@pytest.fixture
def lights_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`lights_out(n)`: the n-th sample that is asked for from now on is not given; 0: all are."""
    real, left = TrainingSet.__getitem__, [0]

    def get(self: TrainingSet, index: int) -> dict[str, Any]:
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        return real(self, index)

    monkeypatch.setattr(TrainingSet, "__getitem__", get)
    return lambda number: left.__setitem__(0, number)


def losses(folder: Path) -> dict[tuple[str, int], float]:
    return {(stage.name, step["step"]): step["loss"] for stage in read_run(folder).stages for step in stage.steps}


def flops(folder: Path) -> list[dict[str, float]]:
    return [step["flops_by_part"] for stage in read_run(folder).stages for step in stage.steps]


def logits(model: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**ask(processor, make_image(), "How many apples?")).logits


def packed(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the language model's layers, as they are stored."""
    found = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if "language_model.layers" in name}


@pytest.mark.parametrize("held", HELD)
def test_a_run_keeps_the_base_and_loads_again_with_its_adapters_in_one_call(
    tmp_path: Path, values: Callable[..., dict[str, Any]], held: str
) -> None:
    final = run(Recipe.model_validate(values(held)), tmp_path / "r", quiet())
    first = packed(tmp_path / "r" / "align" / "model")
    assert first.keys() == packed(final).keys()
    assert all(torch.equal(tensor, packed(final)[name]) for name, tensor in first.items())
    model, processor = AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)
    layer = model.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert layer.dtype == {"none": torch.float32, "nf4": torch.uint8, "int8": torch.int8}[held]
    adapters = {name: value for name, value in model.named_parameters() if ".lora_B" in name}
    assert len(adapters) == 14 and all(value.any() for value in adapters.values())
    found = logits(model, processor)
    assert model.config.num_image_tokens == 24
    assert torch.equal(found, logits(load(final)[0].eval(), processor))
    # As peft itself loads adapters, over the weights that lie beside them.
    with without_adapters(model):
        plain = logits(model, processor)
        assert not torch.allclose(plain, found)
        assert torch.equal(logits(PeftModel.from_pretrained(model, final), processor), found)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("at", [8 + 10, 8 + 16 + 3])
def test_resume_is_the_straight_run(
    tmp_path: Path, values: Callable[..., dict[str, Any]], lights_out: Any, held: str, at: int
) -> None:
    recipe = Recipe.model_validate(values(held))
    straight = run(recipe, tmp_path / "a", quiet())
    lights_out(at)
    with pytest.raises(Crash):
        run(recipe, tmp_path / "b", quiet())
    lights_out(0)
    resumed = run(recipe, tmp_path / "b", quiet(), resume=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for file in ("model.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / file) for folder in (straight, resumed))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@needs_bitsandbytes
def test_figures_and_scores_are_those_of_any_run(
    tmp_path: Path, parts: tuple[Path, Path], values: Callable[..., dict[str, Any]]
) -> None:
    """Executed FLOPs and parameters of the plain twin, and `sparsight eval` on the folder."""
    for held in ("none", "nf4"):
        run(Recipe.model_validate(values(held)), tmp_path / held, quiet())
    assert flops(tmp_path / "nf4") == flops(tmp_path / "none")
    records = [
        [json.loads(line) for line in (tmp_path / held / "run.jsonl").read_text().splitlines()]
        for held in ("none", "nf4")
    ]
    plain, quantised = ([each["total_parameters"] for each in found if each["type"] == "stage"] for found in records)
    assert plain == quantised
    (scores,) = evaluate_checkpoint(tmp_path / "nf4" / "finer" / "model", 2, "test", quiet())
    assert scores.scores


def test_what_would_train_or_merge_packed_weights_is_refused(values: Callable[..., dict[str, Any]]) -> None:
    def read(stage: dict[str, Any], quantization: str = "nf4") -> Recipe:
        made = values(quantization)
        made["stages"][2] |= stage
        return Recipe.read(made, "recipe")

    read({})
    read({"lora": None, "learning_rate": {"bridge": 1e-3}})
    for stage in ({"lora": None}, {"lora": LORA | {"keep": False}}):
        with pytest.raises(UserError, match="stage 'finer': .*quantised \\(nf4\\).*LoRA alone"):
            read(stage)
    for stage in ({"lora": None}, {"lora": LORA | {"keep": True, "rank": 2}}):
        with pytest.raises(UserError, match="stage 'tune' keeps its adapters.*the same lora"):
            read(stage, "none")


def test_lora_sits_where_it_is_told(parts: tuple[Path, Path], tmp_path: Path) -> None:
    lora = LORA | {"targets": ["q_proj", "v_proj"], "scaling": "rslora", "keep": True}
    stage = stage_values(lora=lora, samples=4)
    made = recipe_values(parts[0], language=str(parts[1]), stages=[stage], evaluation=NO_SCORES)
    model, _ = load(run(Recipe.model_validate(made), tmp_path / "r", quiet()))
    adapted = {name: each for name, each in model.named_modules() if hasattr(each, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"} and len(adapted) == 4
    assert {each.scaling["default"] for each in adapted.values()} == {32.0 / 4**0.5}
    made["stages"][0]["lora"]["targets"] = ["query"]
    with pytest.raises(UserError, match="no \\['query'\\].*q_proj"):
        run(Recipe.model_validate(made), tmp_path / "s", quiet())


@needs_bitsandbytes
@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_a_plan_knows_the_bytes_of_packed_weights(parts: tuple[Path, Path], held: str, tmp_path: Path) -> None:
    """Those of the weights that lie in the file, but for norms and the quantizer's tables."""
    stage = stage_values(learning_rate={"bridge": 1e-3}, samples=4)
    language = {"path": str(parts[1]), "quantization": held}
    recipe = Recipe.model_validate(
        recipe_values(parts[0], language=language, stages=[stage], evaluation=NO_SCORES, precision="bf16")
    )
    shape = forecast(recipe)[0].shapes[1]
    found = load_file(run(recipe, tmp_path / "r", quiet()) / "model.safetensors")
    parts_of = ("weight", "absmax", "SCB")
    stored = sum(
        tensor.nbytes
        for name, tensor in found.items()
        if name.startswith(("model.language_model.", "lm_head")) and name.endswith(parts_of)
    )
    assert shape.frozen_bytes == pytest.approx(stored, rel=0.05)
