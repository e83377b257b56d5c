import copy
import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, batch_of, made
from peft import LoraConfig, get_peft_model
from test_families import made as family_made
from test_families import script
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerState, TrainingArguments

from sparsight.cost import LanguageShape, Trains, language_flops
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.callback import STATE_FILE, SparsightCallback, figures
from tiny import conversation, make_image, make_vlm

NAME = "llava, clip + llama"
COMPRESSOR = CompressorConfig(keep=0.25, final=1.0, method="random")
SKIPPER = SkipperConfig(alpha=0.6, epsilon=0.3)


class Images(torch.utils.data.Dataset):
    """24 samples, each with an image of its own."""

    def __init__(self, model):
        self.rows = [{k: v[0] for k, v in batch_of(NAME, model, (1,), seed).items()} for seed in range(24)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trained(folder, resume=None, said=None, accumulate=2, skipper=SKIPPER, seed=1, steps=6, **options):
    model, compressor = made(NAME), options.pop("compressor", COMPRESSOR)
    callback = SparsightCallback(attach(model, compressor, skipper, seed=3), **options)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        weight_decay=0.1,
        save_steps=steps // 2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=False,
        resume_from_checkpoint=said,
    )
    trainer = Trainer(model, arguments, train_dataset=Images(model), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


ALTERNATING = SkipperConfig(
    alpha=0.4, epsilon=0.2, schedule="plateau", dense_last=0.1, layers="alternating", inverse_density=True
)


@pytest.mark.parametrize("skipper", [SKIPPER, ALTERNATING], ids=["falling", "alternating"])
def test_resumed_is_the_run_that_was_never_interrupted(tmp_path, skipper):
    options = {"dense_probe": 2, "skipper": skipper}
    whole, callback = trained(tmp_path / "a", **options)
    resumed, _ = trained(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    keys = ("loss", "keep", "visual_tokens_out", "layers_run", "language_flops", "loss_dense", "loss_sparse")
    assert [[entry.get(key) for key in keys] for entry in steps(whole)][3:] == [
        [entry.get(key) for key in keys] for entry in steps(resumed)
    ][-3:]
    ours, theirs = (t.model.state_dict() for t in (whole, resumed))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert json.loads((tmp_path / "a" / "checkpoint-3" / STATE_FILE).read_text()) == callback.settings()
    logged = steps(whole)
    assert [entry["keep"] for entry in logged] == sorted(entry["keep"] for entry in logged) and logged[0][
        "keep"
    ] == 0.25
    assert all(entry["visual_tokens_in"] == 64 and entry["visual_tokens_out"] < 64 for entry in logged)
    assert any(entry["layers_run"] < 1 for entry in logged)
    assert all(entry["language_flops_ratio"] < 1 for entry in logged)
    assert "loss_dense" not in logged[0] and logged[2]["loss_dense"] != logged[2]["loss_sparse"]


def test_resuming_with_other_settings_is_refused(tmp_path):
    trained(tmp_path)
    file = tmp_path / "checkpoint-3" / STATE_FILE
    saved = json.loads(file.read_text())
    del saved["skipper"]["layers"]  # as a version that knew no such setting has written it
    file.write_text(json.dumps(saved))
    trained(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="was written with other settings; these differ .*skipper"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-3"), skipper=SkipperConfig(alpha=0.1))


def test_r24_resuming_in_another_folder_goes_on_from_the_checkpoint(tmp_path):
    """The Trainer loads nothing of a LLaVA, whose names it does not know: we do, or say that we cannot."""
    whole, _ = trained(tmp_path / "a")
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    with pytest.raises(ValueError, match="from step 3, but .*TrainingArguments.resume_from_checkpoint"):
        trained(tmp_path / "b", checkpoint)
    trained(tmp_path / "b", seed=2)  # now there is a checkpoint of that step, but of another run
    with pytest.raises(ValueError, match="from step 3, but .*TrainingArguments.resume_from_checkpoint"):
        trained(tmp_path / "b", checkpoint)
    resumed, _ = trained(tmp_path / "b", checkpoint, said=checkpoint)
    theirs = resumed.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.model.state_dict().items())
    (tmp_path / "a" / "checkpoint-3" / STATE_FILE).unlink()  # as if nothing had been attached until then
    later, _ = trained(tmp_path / "a", checkpoint)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in later.model.state_dict().items())


def test_copies_of_the_model_are_refused():
    """Without torchrun, transformers wraps a model in nn.DataParallel where it sees several GPUs."""
    handle = attach(made(NAME), CompressorConfig())
    with pytest.raises(ValueError, match="2 GPUs in one process: nn.DataParallel .* start with torchrun"):
        SparsightCallback(handle).on_train_begin(SimpleNamespace(n_gpu=2), TrainerState(), None)


def test_an_engine_that_cannot_skip_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    handle = attach(made(NAME), skipper=SKIPPER)
    with pytest.raises(ValueError, match="cannot work under DeepSpeed, .*Use tokens='visual', DDP or FSDP version 2"):
        SparsightCallback(handle).on_train_begin(None, TrainerState(), None)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layers = handle.model.get_decoder().layers
        layers[0] = FullyShardedDataParallel(layers[0], device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="cannot work under FSDP version 1"):
            SparsightCallback(handle).on_train_begin(None, TrainerState(), None)
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_saved_is_a_plain_model(tmp_path):
    trainer, callback = trained(tmp_path)
    callback.handle.detach()
    plain = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    ours = trainer.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())


def test_figures_are_what_was_executed():
    """Against the cost model by hand: 2 rows of 24 positions cut to 12, two of four layers off."""
    model = made(NAME)
    handle = attach(model, CompressorConfig(keep=0.25), SKIPPER)
    handle.set_skipped((False, True, True, False))
    model(**batch_of(NAME, model))
    found = figures(handle, handle.take_passes())
    shape = LanguageShape.from_config(model.config.get_text_config())
    assert (found["visual_tokens_in"], found["visual_tokens_out"], found["layers_run"]) == (32, 8, 0.5)
    everything = Trains(vision=True, bridge=True, language=True)
    dense = sum(language_flops(shape, 2, 24, 48, everything).values())
    assert 0.2 * dense < found["language_flops"] < 0.5 * dense
    assert found["language_flops_ratio"] == pytest.approx(found["language_flops"] / dense)


def test_executed_flops_match_the_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = made(NAME)
    for parameter in [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]:
        parameter.requires_grad_(False)
    batch = batch_of(NAME, model)
    handle = attach(model, CompressorConfig(keep=0.25), SKIPPER)
    for off in ((False,) * 4, (False, True, True, False)):
        handle.set_skipped(off)
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        by_module = counter.get_flop_counts()
        vision = sum(
            sum(by_module.get(f"{type(model).__name__}.{path}", {}).values())
            for path in ("model.vision_tower", "model.multi_modal_projector")
        )
        counted = counter.get_total_flops() - vision
        ours = figures(handle, handle.take_passes())["language_flops"]
        # The first layer's input needs no gradient here; at this size that is a few percent.
        assert abs(ours / counted - 1) < 0.06, (off, ours, counted)
        model.zero_grad()


def test_a_probe_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="dense_probe 0"):
        SparsightCallback(attach(made(NAME), COMPRESSOR), dense_probe=0)


def test_with_trl(tmp_path):
    """TRL's SFTTrainer on messages and images, its own collator, loss and accuracy; our VLM as any other."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, processor = make_vlm("1:16")
    rows = [{"messages": conversation(f"Read {n}.", f"It is {n}."), "images": [make_image(n)]} for n in range(8)]
    for row in rows:  # one type for all contents, as Arrow wants it
        row["messages"][1]["content"] = [{"type": "text", "text": row["messages"][1]["content"]}]
    callback = SparsightCallback(attach(model, CompressorConfig(keep=0.25), SKIPPER))
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=True,
        max_length=None,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=processor, callbacks=[callback])
    trainer.train()
    logged = steps(trainer)
    assert len(logged) == 12
    assert all((entry["visual_tokens_in"], entry["visual_tokens_out"]) == (64, 16) for entry in logged)
    assert sum(entry["loss"] for entry in logged[-3:]) < sum(entry["loss"] for entry in logged[:3])
    assert logged[-1]["layers_run"] == 1 > min(entry["layers_run"] for entry in logged)
    assert "mean_token_accuracy" in logged[0]  # taken from the logits: they have their full length


class Repeated(torch.utils.data.Dataset):
    """The same batch of two, eight times."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.batch


def model_and_data(name):
    """One of `families`, or one that `try_families` makes."""
    if name in FAMILIES:
        model = made(name)
        return model, batch_of(name, model)
    model = family_made(name)
    return model, script.batch_of(model)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3", "gemma4"])
def test_F40_the_whole_path_in_every_family(name, tmp_path):
    """Train, log, save, resume; layers of other sizes (Gemma 4) are counted too."""
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        model, batch = model_and_data(name)
        skipper = None if name == "gemma4" else SKIPPER
        callback = SparsightCallback(attach(model, COMPRESSOR, skipper, seed=3), dense_probe=1)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=1,
            save_steps=1,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model, arguments, data_collator=lambda x: x[0], train_dataset=Repeated(batch), callbacks=[callback]
        )
        trainer.floating_point_ops = callback.floating_point_ops
        trainer.train(resume_from_checkpoint=resume)
        logged = steps(trainer)
        assert len(logged) == 2
        for entry in logged:
            assert entry["visual_tokens_out"] < entry["visual_tokens_in"] or entry["keep"] == 1.0
            assert 0 < entry["language_flops"] < entry["flops"] and entry["language_flops_ratio"] < 1
            assert {"loss_dense", "loss_sparse"} <= entry.keys() or entry is logged[0]
        ends.append((logged[-1]["loss"], logged[-1]["language_flops"], model.state_dict()))
    (loss, count, state), (again, recount, restate) = ends
    assert loss == again and count == recount
    assert all(torch.equal(tensor, restate[key]) for key, tensor in state.items())


def test_F40_layers_of_other_sizes_count_by_their_own():
    model, batch = model_and_data("gemma4")
    handle = attach(model, CompressorConfig(keep=0.5))
    model(**batch).loss.backward()
    (done,) = handle.take_passes()
    found = figures(handle, [done])["language_flops"]
    config = model.config.get_text_config()
    shapes = [LanguageShape.from_config(layer) for layer in config.per_layer_config]
    assert {shape.head_dim for shape in shapes} == {32, 512}
    each = [
        language_flops(replace(shape, layers=1), done.rows, done.length, done.rows * done.length, Trains(vision=True))
        for shape in shapes
    ]
    vocabulary = each[0]["vocabulary"]
    assert found == pytest.approx(sum(sum(parts.values()) - vocabulary for parts in each) + vocabulary)


def test_F40_accounting_never_ends_a_training(tmp_path, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("no such layer")

    monkeypatch.setattr("sparsight.sparse.callback.figures", fails)
    with pytest.warns(UserWarning, match="FLOPs are left out of the log: Llava.* .ZeroDivisionError: no such layer."):
        trainer, callback = trained(tmp_path)
    assert len(steps(trainer)) == 6 and "language_flops" not in steps(trainer)[0]
    assert callback.floating_point_ops({}) == 0.0


def test_F01_the_handle_of_another_model_is_refused(tmp_path):
    model = made(NAME)
    handle = attach(model, COMPRESSOR)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)

    def train(model, handle):
        callback = SparsightCallback(handle)
        Trainer(model, arguments, train_dataset=Images(model), callbacks=[callback]).train()

    with pytest.raises(ValueError, match="handle of another model .* to which nothing is attached"):
        train(copy.deepcopy(model), handle)
    train(get_peft_model(model, LoraConfig(r=2, target_modules=r".*q_proj")), handle)  # attached inside
    assert (
        handle.report()["global_step"] == 0 and not handle.report()["waits_for_step"] and handle._forwards.last is None
    )
    handle.detach()
    with pytest.raises(ValueError, match="a handle that is detached"):
        train(model, handle)


def test_a_callback_needs_handles():
    for given in ((), [made(NAME)]):
        with pytest.raises(ValueError, match="expected what sparsight.attach returned"):
            SparsightCallback(given)


def preferences(processor):
    from datasets import Dataset

    rows = []
    for n in range(4):
        prompt = conversation(f"Read {n}.", None)
        answers = [
            [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in (f"It is {n}.", "No.")
        ]
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "images": [make_image(n)]})
    return Dataset.from_list(rows)


def dpo(folder, both, adapters=False, method="random"):
    """The log of DPO with an attached policy whose reference is a copy, and the warnings."""
    from trl import DPOConfig, DPOTrainer

    model, processor = make_vlm("1:16")
    reference = None if adapters else copy.deepcopy(model).eval()
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    methods = {"compressor": CompressorConfig(keep=0.25, method=method), "skipper": SKIPPER, "seed": 4}
    handles = [attach(model, **methods)]
    if both:
        handles.append(attach(reference, **methods, train_only=False))
    arguments = DPOConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,  # so that the policy stays the reference
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        save_strategy="no",
        max_length=None,
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(model, reference, arguments, train_dataset=preferences(processor), processing_class=processor)
    trainer.add_callback(SparsightCallback(handles))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    return steps(trainer), [str(w.message) for w in told if "reference model" in str(w.message)]


@pytest.mark.parametrize("adapters", [False, True])
def test_F34_policy_and_reference_see_the_same(tmp_path, adapters):
    logged, told = dpo(tmp_path, both=not adapters, adapters=adapters)
    assert len(logged) == 2 and told == []
    for entry in logged:
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert entry["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert 0 < entry["visual_tokens_out"] < entry["visual_tokens_in"]
    assert min(entry["layers_run"] for entry in logged) < 1


def test_F34_a_dense_reference_is_told(tmp_path):
    logged, told = dpo(tmp_path, both=False)
    assert abs(logged[0]["rewards/margins"]) > 1e-4
    assert len(told) == 1 and "DPOConfig trains against a reference model" in told[0]
    assert "sparsight.attach(trainer.ref_model, compressor=CompressorConfig(keep=0.25" in told[0]
    assert "seed=4, train_only=False)" in told[0] and "SparsightCallback([handle, reference])" in told[0]


def test_F34_a_second_handle_that_cannot_act_or_differs(tmp_path):
    model, reference = made(NAME), made(NAME).eval()
    handles = [attach(model, COMPRESSOR), attach(reference, COMPRESSOR)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    begin = {"args": arguments, "state": TrainerState(), "control": None, "model": model}
    with pytest.raises(ValueError, match="eval mode, .* attach to it with train_only=False"):
        SparsightCallback(handles).on_train_begin(**begin)
    handles[1].detach()
    handles[1] = attach(reference, COMPRESSOR, seed=1, train_only=False)
    with pytest.warns(UserWarning, match="differ in compressor, skipper or seed"):
        SparsightCallback(handles).on_train_begin(**begin)
