"""`sparsight train` on a pretended device: no tensor is left on the host, and nobody waits for the device.

`tests/sparse/waits_of_attached.py` has the same for attached methods.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import small_runs
from pretended import DEVICE, Pretended
from small_runs import Records, one_stage, train, training_set
from sparsight.data.cache import build_cache
from sparsight.data.collate import TrainingSet
from sparsight.training.stages import add_lora, select_trainable
from tiny import make_vlm

PAGE = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
SKIPPER = {"alpha": 0.5, "epsilon": 0.3}
RATES = {"bridge": 2e-3, "language": 1e-3, "vision": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "chain_of_sight, positions of more tokens, LoRA, recomputation, compressor, skipper": {
        "position_layout": "1:4,2:1,4:1",
        "lora": {"rank": 4},
        "gradient_checkpointing": True,
        "compressor": {"keep": 0.5, "method": "random"},
        "skipper": SKIPPER,
    },
    "resampler, packing, compressor": {
        "bridge": {"kind": "resampler", "tokens": 4, "width": 32, "heads": 2},
        "packing": True,
        "compressor": {"keep": 0.5, "method": "text", "positions": "renumbered"},
    },
    "mlp, cached features, packing": {"bridge": {"kind": "mlp"}, "cache_features": True, "packing": True},
    "linear, compressor": {
        "bridge": {"kind": "linear"},
        "compressor": {"keep": 0.5, "method": "merge"},
    },
    "pixel_shuffle, all parts": {"bridge": {"kind": "pixel_shuffle"}, "learning_rate": RATES},
}


class Counted(Records):
    """Notes, with each record of a step, the waits since the one before, and the copies that nobody waited for."""

    def __init__(self, mode: Pretended) -> None:
        super().__init__()
        self.mode, self.waits, self.sent = mode, list[list[str]](), list[list[str]]()

    def write(self, type: str, **fields: Any) -> None:
        super().write(type, **fields)
        if type == "step":
            self.sent.append(self.mode.sent)
            self.waits.append(self.mode.take())


def ready(stage: Any, recipe: Any, folder: Path) -> tuple[Any, Any, TrainingSet]:
    model, processor = make_vlm(stage.bridge)
    add_lora(model, stage.lora, 0)
    select_trainable(model, stage)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = training_set(processor, recipe, stage)
    if stage.cache_features:

        def encode(keys: Any) -> Any:
            return model.model.encode_images(processor.pixels([data.source.image(key) for key in keys])["pixel_values"])

        keys = {key: None for number in range(len(data.source)) for key in data.source[number].images}
        rows = {key: row for row, key in enumerate(keys)}
        data.cache = build_cache(folder / "features", rows, encode)
    return model, processor, data


LONG = ("linear, compressor",)


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES])
def test_no_wait_in_a_step_and_what_the_cpu_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """One small copy an optimizer step, which is looked at in the next one, and no wait in two micro-batches."""
    recipe, stage = one_stage(micro_batch_size=2, samples=12, checkpoints=0, **CASES[case])
    model, processor, data = ready(stage, recipe, tmp_path)
    wanted = train(model, processor, recipe, stage, tmp_path / "cpu", data).losses()
    plain = small_runs.training_arguments

    def on_the_device(*args: Any) -> TrainingArguments:
        arguments = plain(*args)
        PartialState._shared_state["device"] = DEVICE
        return arguments

    monkeypatch.setattr(small_runs, "training_arguments", on_the_device)
    monkeypatch.setattr(TrainingArguments, "device", DEVICE)
    model, processor, data = ready(stage, recipe, tmp_path)
    with Pretended() as mode:
        log = Counted(mode)
        train(model, processor, recipe, stage, tmp_path / "device", data, log=log)
    PartialState._shared_state["device"] = torch.device("cpu")
    assert all(parameter.device == DEVICE for parameter in model.parameters())
    assert log.waits[1:] == [[], []]  # the first has the model's way to the device
    assert re.search(
        r"^\| `sparsight train`, an optimizer step of two micro-batches \| 30 \| 0 \|$", PAGE, re.MULTILINE
    )
    assert len(log.sent[1]) == 1
    assert log.losses() == pytest.approx(wanted, rel=1e-5)


def test_what_is_not_finite_is_seen_a_step_later_and_weights_are_those_before(tmp_path: Path, tiny_vlm: Any) -> None:
    recipe, stage = one_stage(checkpoints=0)
    model, _, _ = ready(stage, recipe, tmp_path)
    _, processor = tiny_vlm()
    passes, before = [], dict[str, torch.Tensor]()

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        if len(passes) != 2:
            return gradient
        before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return gradient * float("nan")

    model.lm_head.weight.register_hook(poison)
    log = Records()
    with pytest.raises(ValueError, match="step 2: the norm of the gradients is nan, though the loss is finite") as told:
        train(model, processor, recipe, stage, tmp_path, log=log)
    assert len(passes) == 3 and sorted(log.steps()) == [1]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert len(str(told.value).partition("samples: ")[2].split(", ")) == 4
    saved = Path(get_last_checkpoint(str(tmp_path)))
    assert saved.name == "checkpoint-1"
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 1
    straight, _, _ = ready(stage, recipe, tmp_path)
    after = train(straight, processor, recipe, stage, tmp_path / "straight").losses()
    model.lm_head.weight._backward_hooks.clear()
    again = train(model, processor, recipe, stage, tmp_path, resume=True).losses()
    assert again == {step: loss for step, loss in after.items() if step > 1}


def test_the_last_step_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vlm: Any) -> None:
    recipe, stage = one_stage(checkpoints=0)
    model, _, _ = ready(stage, recipe, tmp_path)
    passes = []
    model.lm_head.weight.register_hook(lambda g: g * (float("inf") if (passes.append(1), len(passes))[1] == 4 else 1))
    log = Records()
    with pytest.raises(ValueError, match="step 4: the norm of the gradients is"):
        train(model, tiny_vlm()[1], recipe, stage, tmp_path, log=log)
    assert sorted(log.steps()) == [1, 2, 3]
