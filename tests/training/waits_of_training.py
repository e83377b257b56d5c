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
from families import CONFIGS, PATCH
from transformers import Qwen2VLImageProcessorPil, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import small_runs
from pretended import DEVICE, Pretended, move, on_device
from small_runs import Records, one_stage, train, training_set
from sparsight.data.cache import build_cache
from sparsight.data.collate import Collator, TrainingSet
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
    "native resolution of Qwen2.5-VL, compressor": {
        "encoder": "qwen2_5_vl",
        "compressor": {"keep": 0.5, "method": "pool"},
    },
    "native resolution of Qwen3-VL, all parts": {"encoder": "qwen3_vl", "learning_rate": RATES},
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


def ready(stage: Any, recipe: Any, folder: Path, encoder: str | None = None) -> tuple[Any, Any, TrainingSet]:
    """``encoder``: of a family of native resolution; images then have several sizes."""
    native: dict[str, Any] = {}
    if encoder is not None:
        own = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
        native = {"vision": CONFIGS[encoder]().vision_config, "image_processor": own, "image_size": 64}
    model, processor = make_vlm(stage.bridge, **native)
    add_lora(model, stage.lora, 0)
    select_trainable(model, stage)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    data = training_set(processor, recipe, stage)
    if encoder is not None:
        whole = data.source.image
        data.source.image = lambda key: whole(key).crop((0, 0, 64, 32 + 16 * (key % 3)))
    if stage.cache_features:

        def encode(keys: Any) -> Any:
            return model.model.encode_images(processor.pixels([data.source.image(key) for key in keys])["pixel_values"])

        keys = {key: None for number in range(len(data.source)) for key in data.source[number].images}
        rows = {key: row for row, key in enumerate(keys)}
        data.cache = build_cache(folder / "features", rows, encode)
    return model, processor, data


LONG = ("linear, compressor",)  # and all of the others in bf16, but these
BF16 = ("native resolution of Qwen2.5-VL, compressor", next(iter(CASES)))
RUNS = [(case, "fp32", LONG) for case in CASES] + [(case, "bf16", CASES.keys() - BF16) for case in CASES]


@pytest.mark.parametrize(
    "case, precision",
    [pytest.param(case, kind, marks=pytest.mark.long if case in long else ()) for case, kind, long in RUNS],
)
def test_no_wait_in_a_step_and_what_the_cpu_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, precision: str
) -> None:
    """One small copy an optimizer step, which is looked at in the next one, and no wait in two micro-batches."""
    settings = CASES[case] | {"precision": precision}
    encoder = settings.pop("encoder", None)
    recipe, stage = one_stage(micro_batch_size=2, samples=12, checkpoints=0, **settings)
    model, processor, data = ready(stage, recipe, tmp_path, encoder)
    wanted = train(model, processor, recipe, stage, tmp_path / "cpu", data).losses()
    plain = small_runs.training_arguments

    def on_the_device(*args: Any) -> TrainingArguments:
        arguments = plain(*args)
        PartialState._shared_state["device"] = DEVICE
        return arguments

    monkeypatch.setattr(small_runs, "training_arguments", on_the_device)
    monkeypatch.setattr(TrainingArguments, "device", DEVICE)
    model, processor, data = ready(stage, recipe, tmp_path, encoder)
    types = set()
    model.lm_head.register_forward_hook(lambda _, __, logits: types.add(logits.dtype))
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
    assert log.losses() == pytest.approx(wanted, rel=1e-5 if precision == "fp32" else 1e-4)  # measured 1e-7, 2e-5
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize("place", ["modeling.encoders", "bridges.windowed"])
def test_an_index_left_on_the_host_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """At native resolution: where patches stand, or how large maps are."""
    monkeypatch.setattr(f"sparsight.{place}.to_device", lambda array, device: torch.from_numpy(array))
    recipe, stage = one_stage(micro_batch_size=2)
    model, processor, data = ready(stage, recipe, tmp_path, "qwen3_vl")
    batch = Collator(processor.tokenizer.pad_token_id)([data[number] for number in range(2)])
    assert len({*batch.pop("info")["grids"]}) > 1
    with Pretended():
        move(model)
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            model(**{key: value if key == "image_grid_thw" else on_device(value) for key, value in batch.items()})


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
