"""The trainer: batches however they are cut, honest records, and going on as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import get_last_checkpoint

from small_runs import Crash, Records, one_stage, quiet, train, training_set
from sparsight.cost import Trains
from sparsight.data.collate import Collator
from sparsight.devices.flops import recomputes
from sparsight.modeling.scaling import scale_tokens
from sparsight.safety import write_manifest
from sparsight.training.checkpoints import Interrupted, last_checkpoint
from sparsight.training.counter import StepCounter, cpu_seconds, resident_now
from sparsight.training.stages import add_lora, merge_lora, select_trainable
from sparsight.training.trainer import plan_stage
from tiny import make_language, make_vlm

BRIDGE_AND_LANGUAGE = {"bridge": 2e-3, "language": 1e-3}
ALL = BRIDGE_AND_LANGUAGE | {"vision": 1e-3}
KINDS: dict[str, dict[str, Any]] = {
    "pre-training": {"learning_rate": BRIDGE_AND_LANGUAGE},
    "all parts": {"learning_rate": ALL},
    "Muon": {"learning_rate": BRIDGE_AND_LANGUAGE, "optimizer": "muon"},
    "LoRA": {"learning_rate": BRIDGE_AND_LANGUAGE, "lora": {"rank": 4, "dropout": 0.1}},
}


def prepared(tiny_vlm: Callable, stage: Any) -> tuple[Any, Any, Any]:
    """A model that is ready for the stage, its processor, and the adapters."""
    model, processor = tiny_vlm()
    lora = add_lora(model, stage.lora, seed=0)
    select_trainable(model, stage)
    return model, processor, lora


def weights(model: Any, lora: Any = None) -> dict[str, torch.Tensor]:
    merge_lora(lora)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------- accumulation (R13)


@pytest.mark.parametrize("kind", ["pre-training", "LoRA"])
def test_batches_may_be_cut_into_micro_batches(tmp_path: Path, tiny_vlm, kind: str) -> None:
    """(batch 4, accumulate 1) = (2, 2) = (1, 4): samples differ in length and in number of labels."""
    losses, ends, counts = [], [], []
    for micro in (4, 2, 1):
        settings = KINDS[kind] | ({"lora": {"rank": 4}} if kind == "LoRA" else {})  # dropout would draw differently
        recipe, stage = one_stage(micro_batch_size=micro, samples=12, warmup=0, **settings)
        model, processor, lora = prepared(tiny_vlm, stage)
        log = train(model, processor, recipe, stage, tmp_path / str(micro))
        losses.append(torch.tensor(list(log.losses().values())))
        counts.append([(step["samples"], step["text_tokens"], step["visual_tokens"]) for step in log.steps().values()])
        ends.append(weights(model, lora))
    assert counts[0] == counts[1] == counts[2] and len(counts[0]) == 3
    for other in (1, 2):
        assert (losses[other] - losses[0]).abs().max() < 3e-6  # measured: 5e-7
        differences = torch.cat([(ends[other][name] - ends[0][name]).flatten() for name in ends[0]])
        assert differences.abs().max() < 2e-5  # measured: 3e-6, where a step moves a weight by 2e-3
        assert differences.mean().abs() < 1e-9  # measured: 3e-11


# ---------------------------------------------------------------------------------------- tokens to come


@pytest.mark.parametrize("to", ["1:4,2:1", "1:4,2:1,4:1"])
def test_tokens_weigh_as_those_to_come(tmp_path: Path, tiny_vlm, to: str) -> None:
    """Of its own layout, every token is born once: training is the plain one. Of a finer one it is another."""
    found = []
    for keys in ({}, {"position_layout": to}, {"position_layout": to, "proportional_attention": True}):
        recipe, stage = one_stage(samples=8, learning_rate=BRIDGE_AND_LANGUAGE, **keys)
        model, processor, _ = prepared(tiny_vlm, stage)
        scale_tokens(model, processor, stage.bridge)
        select_trainable(model, stage)
        log = train(model, processor, recipe, stage, tmp_path / str(len(found)))
        found.append(torch.tensor(list(log.losses().values())))
    differences = [float((other - found[0]).abs().max()) for other in found[1:]]
    if to == str(stage.bridge.scales):
        assert max(differences) < 1e-5
    else:
        assert min(differences) > 1e-4 and (found[2] - found[1]).abs().max() > 1e-4


def test_attention_that_takes_no_weights_is_refused(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage(position_layout="1:4,2:1", proportional_attention=True)
    model, processor, _ = prepared(tiny_vlm, stage)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs attn_implementation sdpa or eager .* found 'flash_attention_2'"):
        train(model, processor, recipe, stage, tmp_path)


def test_labels_per_micro_batch_differ(tiny_vlm) -> None:
    """Without this, the test above would pass for a mean of means."""
    recipe, stage = one_stage(samples=12)
    _, processor = tiny_vlm()
    data = training_set(processor, recipe, stage)
    assert len({sum(label != -100 for label in data[index]["labels"]) for index in range(12)}) > 3


# ---------------------------------------------------------------------------------------- loss that is no number


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage()
    model, processor, _ = prepared(tiny_vlm, stage)

    def poison() -> None:
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))

    log = Records()
    with pytest.raises(ValueError, match="step 3: the loss is nan"):
        train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, 3, poison), log=log)
    assert sorted(log.steps()) == [1, 2]
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-2")  # none of the poisoned step


@pytest.mark.parametrize("bad, micro", [(2, 4), (3, 2), (8, 2)], ids=["middle", "first micro-batch", "last step"])
def test_a_gradient_that_is_not_finite_stops_training(tmp_path: Path, tiny_vlm, bad: int, micro: int) -> None:
    """Behind a loss that is finite: clipping would make all weights NaN, and a checkpoint would keep them."""
    recipe, stage = one_stage(micro_batch_size=micro, checkpoints=4)
    model, processor, _ = prepared(tiny_vlm, stage)
    passes = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return gradient * float("nan") if len(passes) == bad else gradient

    model.lm_head.weight.register_hook(poison)
    log, step = Records(), -(-bad * micro // 4)
    with pytest.raises(ValueError, match=f"step {step}: the norm of the gradients is nan, though the loss") as told:
        train(model, processor, recipe, stage, tmp_path, log=log)
    data = training_set(processor, recipe, stage)
    plan = plan_stage(data, stage, recipe.seed, tmp_path, quiet())
    samples = [data[index]["id"] for batch in plan[step - 1] for index in batch]
    assert len(samples) == 4 and sorted(str(told.value).partition("samples: ")[2].split(", ")) == sorted(samples)
    assert sorted(log.steps()) == list(range(1, step))
    last = get_last_checkpoint(str(tmp_path))
    assert last.endswith(f"checkpoint-{step - 1}")
    assert all(tensor.isfinite().all() for tensor in load_file(Path(last) / "model.safetensors").values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("micro, samples, steps", [(4, 16, 4), (2, 10, 3)])
def test_a_record_of_every_step_adds_up(tmp_path: Path, tiny_vlm, micro: int, samples: int, steps: int) -> None:
    recipe, stage = one_stage(micro_batch_size=micro, samples=samples)
    assert stage.steps == steps
    model, processor, _ = prepared(tiny_vlm, stage)
    data = training_set(processor, recipe, stage)
    log = train(model, processor, recipe, stage, tmp_path)
    records = log.steps()
    assert sorted(records) == list(range(1, steps + 1))
    items = [data[index] for index in range(samples)]
    image = processor.image_token_id
    visual = sum(item["input_ids"].count(image) for item in items)
    keys = ("samples", "visual_tokens", "text_tokens")
    total = {key: sum(record[key] for record in records.values()) for key in keys}
    assert total == {
        "samples": samples,
        "visual_tokens": visual,
        "text_tokens": sum(len(item["input_ids"]) for item in items) - visual,
    }
    for record in records.values():
        assert record["stage"] == "pretrain" and record["layers_run"] == record["layers"] == 2
        assert set(record["seconds"]) == {"data", "compute", "optimizer"}
        assert all(value > 0 for value in record["seconds"].values())
        assert record["flops"] == sum(record["flops_by_part"].values()) > 0
        assert all(value > 0 for value in record["flops_by_part"].values())
        assert record["memory_bytes"] > 1e6
        assert record["loss"] > 0 and record["padding_tokens"] >= 0


def test_text_visual_and_padding_are_the_batches_positions(tmp_path: Path, tiny_vlm) -> None:
    """One step over all samples: the batch is known, whatever the order."""
    recipe, stage = one_stage(samples=8, batch_size=8)
    model, processor, _ = prepared(tiny_vlm, stage)
    data = training_set(processor, recipe, stage)
    batch = Collator(processor.tokenizer.pad_token_id)([data[index] for index in range(8)])
    (record,) = train(model, processor, recipe, stage, tmp_path).steps().values()
    assert record["text_tokens"] + record["visual_tokens"] + record["padding_tokens"] == batch["input_ids"].numel()
    assert record["padding_tokens"] == (batch["attention_mask"] == 0).sum() > 0
    assert record["visual_tokens"] == 8 * processor.num_image_tokens
    with torch.no_grad():
        assert record["loss"] == pytest.approx(tiny_vlm()[0](**batch, loss_only=True).loss.item(), abs=1e-5)


def test_learning_rates_in_the_record_are_those_of_the_step(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage(schedule="linear", warmup=0)
    model, processor, _ = prepared(tiny_vlm, stage)
    records = train(model, processor, recipe, stage, tmp_path).steps()
    for number, left in zip((1, 2, 3, 4), (1, 0.75, 0.5, 0.25), strict=True):
        assert records[number]["learning_rate"] == {"bridge": 2e-3 * left, "language": 1e-3 * left}


class Tracker(TrainerCallback):
    """What Hugging Face's Trainer would make of the name of a tracker."""

    seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:  # not the summary at the end
            self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize(
    "methods", [{}, {"compressor": {"keep": 0.5}, "skipper": {"alpha": 0.5}}], ids=["dense", "sparse"]
)
def test_trackers_get_the_figures_of_the_run_log(tmp_path: Path, tiny_vlm, monkeypatch, methods: dict) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "own", Tracker)
    monkeypatch.setattr(Tracker, "seen", [])
    recipe, stage = one_stage(samples=12, checkpoints=1, **methods)
    model, processor, _ = prepared(tiny_vlm, stage)
    log = train(model, processor, recipe.model_copy(update={"report_to": ("own",)}), stage, tmp_path)
    assert [step for step, _ in Tracker.seen] == [1, 2, 3]
    for step, logs in Tracker.seen:
        record = {key: value for key, value in log.steps()[step].items() if key not in ("type", "stage", "step")}
        nested = {key: value for key, value in record.items() if isinstance(value, dict)}
        assert set(nested) == {"learning_rate", "seconds", "flops_by_part"}
        parts = {f"{key}/{part}": number for key, value in nested.items() for part, number in value.items()}
        assert logs == {key: value for key, value in record.items() if key not in nested} | parts
        assert all(isinstance(number, int | float) for number in logs.values())
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert not any("loss" in entry for entry in state["log_history"])  # checkpoints do not carry every step's record


def test_data_are_loaded_in_their_own_process(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage(workers=1)
    model, processor, _ = prepared(tiny_vlm, stage)
    apart = train(model, processor, recipe, stage, tmp_path / "1").losses()
    recipe, stage = one_stage(workers=0)
    model, processor, _ = prepared(tiny_vlm, stage)
    assert train(model, processor, recipe, stage, tmp_path / "0").losses() == apart


# ---------------------------------------------------------------------------------------- resume (R21, R22)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, tiny_vlm, kind: str, step: int
) -> None:
    """The lights go out while a step loads its data; the process that goes on has another random state."""
    recipe, stage = one_stage(samples=32, checkpoints=4, **KINDS[kind])
    model, processor, lora = prepared(tiny_vlm, stage)
    straight = train(model, processor, recipe, stage, tmp_path / "straight").losses()
    right = weights(model, lora)
    assert sorted(straight) == list(range(1, 9))

    model, processor, _ = prepared(tiny_vlm, stage)
    log = Records()
    data = training_set(processor, recipe, stage, before_step=step + 1)
    with pytest.raises(Crash):
        train(model, processor, recipe, stage, tmp_path / "broken", data, log=log)
    assert {number: log.losses()[number] for number in range(1, step + 1)} == {
        number: straight[number] for number in range(1, step + 1)
    }

    model, processor, lora = prepared(tiny_vlm, stage)
    torch.manual_seed(99)
    again = train(model, processor, recipe, stage, tmp_path / "broken", resume=True)
    began = step // 2 * 2  # 4 checkpoints in 8 steps
    assert again[0] == {"type": "resume", "stage": "pretrain", "step": began}
    assert again.losses() == {number: loss for number, loss in straight.items() if number > began}
    ends = weights(model, lora)
    assert all(torch.equal(ends[name], right[name]) for name in right)


def test_a_tied_weight_is_not_missing_when_a_stage_goes_on(tmp_path: Path, caplog) -> None:
    """It is saved once, under its other name."""
    language, tokenizer = make_language()
    config = language.config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    build = lambda: make_vlm(language=AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)  # noqa: E731
    recipe, stage = one_stage(samples=8, checkpoints=2)
    model, processor, _ = prepared(build, stage)
    with pytest.raises(Crash):
        train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, before_step=2))
    model, processor, _ = prepared(build, stage)
    train(model, processor, recipe, stage, tmp_path, resume=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "missing keys" not in caplog.text


@pytest.mark.parametrize("cut", ["no state", "half a state", "no mapping", "only the model"])
def test_F05_a_checkpoint_that_a_kill_cut_short_is_passed_over_and_kept(tmp_path: Path, tiny_vlm, cut: str) -> None:
    recipe, stage = one_stage(samples=32, checkpoints=4)
    model, processor, _ = prepared(tiny_vlm, stage)
    with pytest.raises(Crash):
        train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, before_step=5))
    broken = tmp_path / "checkpoint-4"
    if cut in ("half a state", "no mapping"):
        (broken / "trainer_state.json").write_text('{"global_step": 4,' if cut == "half a state" else "null")
    else:
        for file in broken.iterdir():
            if file.name == "trainer_state.json" or (cut == "only the model" and file.suffix != ".safetensors"):
                file.unlink()
    held = {file.name: file.read_bytes() for file in broken.iterdir()}
    (tmp_path / "damaged-checkpoint-4").mkdir()  # of an earlier time
    model, processor, _ = prepared(tiny_vlm, stage)
    console = Console(file=io.StringIO(), width=80)
    again = train(model, processor, recipe, stage, tmp_path, resume=True, console=console)
    assert again[0] == {"type": "resume", "stage": "pretrain", "step": 2}
    assert sorted(again.losses()) == [3, 4, 5, 6, 7, 8]
    aside = tmp_path / "damaged-checkpoint-4-2"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == held
    said = console.file.getvalue()  # type: ignore[attr-defined]
    file = "sparsight_manifest.json" if cut == "only the model" else "trainer_state.json"
    assert f"{broken} is damaged (" in said and f"{file}: " in said and f"it is now {aside}" in said


def test_F05_an_error_of_the_disk_is_an_error_and_moves_nothing(tmp_path: Path) -> None:
    for step in (2, 4):
        file = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        file.parent.mkdir()
        file.write_text("{}")
        write_manifest(file.parent)
        file.unlink()
        file.symlink_to("/proc/self/mem")  # reads end in EIO
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="Input/output error"):
        last_checkpoint(tmp_path, quiet())
    assert sorted(tmp_path.rglob("*")) == before


def test_skipping_to_the_checkpoint_decodes_nothing(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage(samples=32, checkpoints=4)
    model, processor, _ = prepared(tiny_vlm, stage)
    with pytest.raises(Crash):
        train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, before_step=7))
    data = training_set(processor, recipe, stage, before_step=1000)
    begun = data.left
    train(model, processor, recipe, stage, tmp_path, data, resume=True)
    assert begun - data.left == 8  # of steps 7 and 8


def test_a_stage_that_never_reached_a_checkpoint_starts_over_and_says_so(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage(samples=16, checkpoints=1)
    model, processor, _ = prepared(tiny_vlm, stage)
    log = Records()
    with pytest.raises(Crash):
        train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, 3), log=log)
    assert sorted(log.steps()) == [1, 2]
    model, processor, _ = prepared(tiny_vlm, stage)
    again = train(model, processor, recipe, stage, tmp_path, resume=True)
    assert sorted(again.steps()) == [1, 2, 3, 4]
    assert again[0] == {"type": "resume", "stage": "pretrain", "step": 0}  # readers forget the first life's steps


def test_without_resume_checkpoints_are_not_looked_at(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage()
    for _ in range(2):
        model, processor, _ = prepared(tiny_vlm, stage)
        log = train(model, processor, recipe, stage, tmp_path)
        assert sorted(log.steps()) == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_ctrl_c_ends_the_step_and_saves(tmp_path: Path, tiny_vlm, checkpoints: int) -> None:
    recipe, stage = one_stage(samples=32, checkpoints=checkpoints)
    model, processor, _ = prepared(tiny_vlm, stage)
    straight = train(model, processor, recipe, stage, tmp_path / "straight").losses()
    before = signal.getsignal(signal.SIGINT)

    model, processor, _ = prepared(tiny_vlm, stage)
    log = Records()
    data = training_set(processor, recipe, stage, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stage 'pretrain' at step 3 of 8"):
        train(model, processor, recipe, stage, tmp_path / "broken", data, log=log)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(log.steps()) == [1, 2, 3]
    assert get_last_checkpoint(str(tmp_path / "broken")).endswith("checkpoint-3")

    model, processor, _ = prepared(tiny_vlm, stage)
    again = train(model, processor, recipe, stage, tmp_path / "broken", resume=True).losses()
    assert again == {number: loss for number, loss in straight.items() if number > 3}


def test_ctrl_c_twice_stops_at_once(tmp_path: Path, tiny_vlm) -> None:
    recipe, stage = one_stage()
    model, processor, _ = prepared(tiny_vlm, stage)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    log = Records()
    with pytest.raises(KeyboardInterrupt):
        train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, 2, twice), log=log)
    assert sorted(log.steps()) == [1] and signal.getsignal(signal.SIGINT) is before


def test_the_terminals_ctrl_c_does_not_kill_the_process_that_loads_data(tmp_path: Path, tiny_vlm) -> None:
    """A terminal signals the whole group: the worker, too, which has the next batches."""
    recipe, stage = one_stage(samples=32, workers=1, checkpoints=1)
    model, processor, _ = prepared(tiny_vlm, stage)

    def group() -> None:  # in the worker
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    log = train(model, processor, recipe, stage, tmp_path, training_set(processor, recipe, stage, 3, group))
    assert sorted(log.steps()) == list(range(1, 9))


def test_F24_what_the_process_held_before_a_run_is_not_its_own():
    before = resident_now()
    held = torch.ones(50_000_000, dtype=torch.uint8)  # of an earlier run
    recipe, stage = one_stage()
    model, _ = make_vlm()
    own = StepCounter(model, Trains.of(stage), 0.0, "fp32", resident_now()).record()()[0]["memory_bytes"]
    whole = StepCounter(model, Trains.of(stage), 0.0, "fp32", before).record()()[0]["memory_bytes"]
    assert whole - own > 0.9 * held.numel() and own < 0.5 * held.numel()


def test_F20_cpu_seconds_are_those_of_the_process_and_of_ended_children():
    start = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert cpu_seconds() > start + 0.05


def test_F22_asking_whether_activations_are_recomputed_warns_of_nothing(recwarn):
    model, _ = make_vlm()
    assert not recomputes(model)
    assert not recwarn.list
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    recwarn.clear()
    assert recomputes(model) and not [w for w in recwarn if issubclass(w.category, FutureWarning)]
