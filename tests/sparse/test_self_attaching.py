"""The callback that attaches by itself: as attaching by hand, bit by bit, and no trace of it afterwards."""

import copy

import pytest
import torch
from families import made
from peft import LoraConfig, get_peft_model
from test_callback import COMPRESSOR, NAME, SKIPPER, Images, steps
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import NoEffectWarning, attach
from sparsight.sparse.callback import STATE_FILE, SparsightCallback
from sparsight.sparse.patches import Held

METHODS = {"compressor": COMPRESSOR, "skipper": SKIPPER, "seed": 3}
LORA = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
TIMES = ("mfu", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def adapted(model):
    return get_peft_model(model, LORA)


def by_hand(model):
    return SparsightCallback(attach(model, **METHODS), dense_probe=2)


def by_itself(_):
    return SparsightCallback(**METHODS, dense_probe=2)


def trainer_of(folder, callback, model=None, others=(), kind=Trainer, **options):
    model = made(NAME) if model is None else model
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments |= {"learning_rate": 1e-3, "weight_decay": 0.1, "save_steps": 2, "logging_steps": 1, "use_cpu": True}
    arguments |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False} | options
    callbacks = [each(model) if each in (by_hand, by_itself) else each for each in (callback, *others)]
    return kind(model, TrainingArguments(str(folder), **arguments), train_dataset=Images(model), callbacks=callbacks)


def log_of(trainer):
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in trainer.state.log_history]


def left_of_us(model):
    """Patches and hooks that are still there; transformers sets some of its own."""
    found = []
    for name, module in model.named_modules():
        held = module.__dict__, module._forward_hooks, module._forward_pre_hooks
        found += [(name, key) for each in held for key, value in each.items() if isinstance(value, Held)]
    return found


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["plain", "peft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_attached_by_hand(tmp_path, wrap, checkpointing):
    ends = []
    for callback in (by_hand, by_itself):
        torch.manual_seed(0)
        folder = tmp_path / callback.__name__
        trainer = trainer_of(folder, callback, wrap(made(NAME)), gradient_checkpointing=checkpointing)
        trainer.train()
        assert bool(left_of_us(trainer.model)) == (callback is by_hand)
        torch.manual_seed(0)
        resumed = trainer_of(folder, callback, wrap(made(NAME)), gradient_checkpointing=checkpointing)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert [entry["loss"] for entry in steps(resumed)] == [entry["loss"] for entry in steps(trainer)]
        states = [t.model.state_dict() for t in (trainer, resumed)]
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
        ends.append((log_of(trainer) + log_of(resumed), states[0], (folder / "checkpoint-2" / STATE_FILE).read_text()))
    (log, state, saved), (own_log, own_state, own_saved) = ends
    assert log == own_log and saved == own_saved
    assert all(torch.equal(tensor, own_state[key]) for key, tensor in state.items())
    assert log[1]["visual_tokens_out"] < log[1]["visual_tokens_in"] and "loss_dense" in log[2]
    assert min(entry["layers_run"] for entry in log[:4]) < 1


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_after_a_training_that_failed(tmp_path):
    model = made(NAME)
    callback, fails = SparsightCallback(**METHODS), Fails()
    assert callback.handle is None
    trainer = trainer_of(tmp_path, callback, model, [fails])
    for _again in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert callback.handle.attached
    other = SparsightCallback(compressor=CompressorConfig(keep=0.5))
    trainer_of(tmp_path, other, model).train()  # another one, over the same model
    assert left_of_us(model) == [] and not other.handle.attached
    trainer.remove_callback(fails)
    trainer.train()
    assert left_of_us(model) == [] and not callback.handle.attached
    trainer.add_callback(fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    wrapped = adapted(model)  # what was left inside goes too
    trainer_of(tmp_path, SparsightCallback(**METHODS), wrapped).train()
    assert left_of_us(wrapped) == []


def test_what_the_user_attached_stays(tmp_path):
    model = made(NAME)
    handle = attach(model, COMPRESSOR)
    for each in (model, adapted(model)):
        with pytest.raises(ValueError, match="has something attached already: detach.. that handle first"):
            trainer_of(tmp_path, SparsightCallback(**METHODS), each).train()
    assert handle.attached
    handle.detach()
    callbacks = [SparsightCallback(**METHODS), SparsightCallback(compressor=COMPRESSOR)]
    with pytest.raises(ValueError, match="has something attached already"):
        trainer_of(tmp_path, callbacks[0], made(NAME), callbacks[1:]).train()


def test_other_settings_than_before_are_refused(tmp_path):
    trainer_of(tmp_path, by_hand).train()
    changed = trainer_of(tmp_path, SparsightCallback(compressor={"keep": 0.5}, skipper=SKIPPER, seed=3))
    with pytest.raises(ValueError, match="was written with other settings; these differ .*compressor"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_it_is_given():
    callback = SparsightCallback(compressor={"keep": 0.5}, seed=2)
    assert callback.settings()["compressor"]["keep"] == 0.5 and callback.settings()["seed"] == 2
    assert callback.floating_point_ops({}) == 0.0
    with pytest.raises(ValueError, match=r"nothing to attach: write SparsightCallback"):
        SparsightCallback()
    with pytest.raises(ValueError, match="a handle and methods"):
        SparsightCallback(attach(made(NAME), COMPRESSOR), compressor=COMPRESSOR)
    with pytest.raises(ValueError, match="SparsightCallback: compressor.keep: expected 1.0 or less .given: 2"):
        SparsightCallback(compressor={"keep": 2})
    with pytest.raises(ValueError, match="SparsightCallback: dense_probe: expected 1 or more .given: 0"):
        SparsightCallback(compressor=COMPRESSOR, dense_probe=0)


class Another(Trainer):
    """Trains a copy of the model that it tells callbacks."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.copy = getattr(self, "copy", None) or copy.deepcopy(made(NAME))
        loss = self.copy(**inputs).loss
        loss.backward()
        return loss.detach()


def test_a_trainer_that_trains_another_object_is_told(tmp_path):
    with pytest.warns(
        NoEffectWarning, match="no effect in 3 steps: nothing was trained on in the LlavaFor.* another object"
    ):
        trainer_of(tmp_path, SparsightCallback(**METHODS), kind=Another).train()


class Deaf(SparsightCallback):
    """As in a loop that calls no callback at each step."""

    def on_step_begin(self, args, state, *given, **more):
        if not given:  # from on_train_begin
            super().on_step_begin(args, state)


def test_a_loop_without_steps_is_told(tmp_path):
    trainer = trainer_of(tmp_path, Deaf(**METHODS), gradient_accumulation_steps=1, max_steps=12)
    with pytest.warns(NoEffectWarning, match="9 passes were trained on, and all in optimizer step 0: .*on_step_begin"):
        trainer.train()
