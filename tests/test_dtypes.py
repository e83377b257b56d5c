"""Weights that are stored in 16 bits, as most on a hub are: what trains is fp32, and nothing is lost on the way."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from small_runs import quiet, recipe_values, save_encoder, stage_values
from sparsight.pipeline import evaluate, evaluate_checkpoint, files, load, run
from sparsight.reporting import read_run
from sparsight.settings.recipe import Recipe
from sparsight.training import trainer
from tiny import make_language

PARTS = {"vision": "model.vision_tower.", "bridge": "model.multi_modal_projector.", "language": "model.language_model."}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """The bridge alone, then language model and bridge, from an encoder in fp16 and a language model in bf16."""
    encoder = save_encoder(folder / "encoder")
    CLIPVisionModel.from_pretrained(encoder).to(torch.float16).save_pretrained(encoder)  # type: ignore[arg-type]
    language, tokenizer = make_language()
    language.to(torch.bfloat16).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    stages = [
        stage_values("align", learning_rate={"bridge": 2e-3}, samples=8),
        stage_values("finetune", learning_rate={"bridge": 2e-5, "language": 2e-5}, samples=8),
    ]
    values = recipe_values(encoder, language=str(folder / "language"), stages=stages, evaluation={"kind": "none"})
    return Recipe.model_validate(values | {"precision": "bf16"} | changes)


def dtypes(model: torch.nn.Module) -> dict[str, set[torch.dtype]]:
    return {
        part: {p.dtype for name, p in model.named_parameters() if name.startswith(prefix)}
        for part, prefix in PARTS.items()
    }


def test_what_trains_is_fp32_and_the_rest_stays_as_it_was_stored(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    final = run(recipe, tmp_path / "straight", quiet())
    aligned, _ = load(tmp_path / "straight" / "align" / "model")
    assert dtypes(aligned) == {"vision": {torch.float32}, "bridge": {torch.float32}, "language": {torch.bfloat16}}
    saved = load_file(tmp_path / "straight" / "align" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in aligned.named_parameters() if name in saved)
    tuned, _ = load(final)
    assert dtypes(tuned) == {"vision": {torch.float32}, "bridge": {torch.float32}, "language": {torch.float32}}
    before = dict(aligned.named_parameters())
    moved = [
        (p != before[name]).float().mean().item()
        for name, p in tuned.named_parameters()
        if name.startswith("model.language_model.layers") and p.ndim == 2
    ]
    assert min(moved) > 0.9  # in bf16, steps of 2e-5 are lost on most weights

    # Resumed where the first stage ends, the model comes from disk; the rest is as if it had never stopped.
    first = recipe.model_copy(update={"stages": recipe.stages[:1]})
    run(first, tmp_path / "again", quiet())
    log = tmp_path / "again" / "run.jsonl"
    header, *lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = (tmp_path / "straight" / "run.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    log.write_text(whole + "".join(lines), encoding="utf-8")
    again = load_file(run(recipe, tmp_path / "again", quiet(), resume=True) / "model.safetensors")
    straight = load_file(final / "model.safetensors")
    assert again.keys() == straight.keys()
    assert all(torch.equal(again[name], straight[name]) for name in straight)


def test_fp32_is_fp32_throughout(tmp_path: Path) -> None:
    final = run(recipe_of(tmp_path, precision="fp32"), tmp_path / "r", quiet())
    assert set.union(*dtypes(load(final)[0]).values()) == {torch.float32}


@pytest.mark.parametrize("fast", [True, False])
def test_a_model_is_asked_on_the_device_and_in_what_it_is_fast_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe.model_copy(update={"stages": recipe.stages[:1]}), tmp_path / "r", quiet())
    asked: list[tuple[str, set[torch.dtype]]] = []

    class Seen(Exception): ...

    def look(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        asked.append((next(model.parameters()).device.type, dtypes(model)["language"]))
        raise Seen

    monkeypatch.setattr(files, "default_device", lambda: torch.device("meta"))
    monkeypatch.setattr(evaluate, "precision_on", lambda device, _: "bf16" if fast else "fp32")
    monkeypatch.setattr(evaluate, "autocast", lambda *_: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(evaluate, "ask", look)
    with pytest.raises(Seen):
        evaluate_checkpoint(tmp_path / "r" / "align" / "model", 2, "test", quiet())
    assert asked == [("meta", {torch.bfloat16 if fast else torch.float32})]


def test_adapters_take_bf16_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As peft does it, all is widened and narrowed again: the same bits."""
    tuned = stage_values(lora={"rank": 4}, samples=16)
    recipe, plain, widened = recipe_of(tmp_path, stages=[tuned]), BaseTunerLayer._cast_input_dtype, set()

    def watched(self: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        taken = plain(self, x, dtype)
        widened.add(taken is not x)
        return taken

    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", watched)
    run(recipe, tmp_path / "ours", quiet())
    assert widened == {False}
    monkeypatch.setattr(trainer, "narrow_adapters", lambda *_: nullcontext())
    run(recipe, tmp_path / "peft", quiet())
    assert widened == {False, True}
    ours, peft = (read_run(tmp_path / name).stages[0].steps for name in ("ours", "peft"))
    assert [step["loss"] for step in ours] == [step["loss"] for step in peft]
