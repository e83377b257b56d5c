"""What a handle needs of those around it: steps, copies, generation, modes of training, forms of batches."""

import copy
import io
import warnings

import pytest
import torch
from families import IMAGE, TEXT, batch_of, made
from peft import LoraConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from sparsight.compat import CACHE
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse import forward
from sparsight.sparse.attach import NoEffectWarning, attach
from sparsight.sparse.executed import figures
from tiny import make_vlm

NAME = "llava, clip + llama"
QUARTER = CompressorConfig(keep=0.25)
HALF_OFF = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")
SCHEDULES = [
    {"skipper": HALF_OFF},
    {"compressor": CompressorConfig(keep=0.25, final=1.0)},
    {"compressor": CompressorConfig(keep=0.25, dense_every=4)},
]


def told(call):
    """What `call` gives, and the warnings about methods without an effect."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        value = call()
    return value, [str(w.message) for w in found if w.category is NoEffectWarning]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# ------------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("methods", SCHEDULES)
def test_F01_without_steps_all_is_dense_and_it_is_said(methods):
    model = made(NAME)
    batch = batch_of(NAME, model)
    plain = model(**batch).loss
    handle = attach(model, seed=1, **methods)
    assert handle.report()["waits_for_step"]
    losses, messages = told(lambda: [model(**batch).loss for _ in range(60)])
    assert all(torch.equal(loss, plain) for loss in losses)
    assert len(messages) == 1 and "no effect in 3 passes" in messages[0]
    assert "SparsightCallback" in messages[0] and "handle.step(" in messages[0]
    handle.step(1, 0.0)
    assert not torch.equal(model(**batch).loss, plain) and not handle.report()["waits_for_step"]


def test_F01_a_constant_keep_needs_no_step():
    model = made(NAME)
    batch = batch_of(NAME, model)
    handle = attach(model, QUARTER)
    _, messages = told(lambda: [model(**batch) for _ in range(4)])
    assert messages == [] and handle.take_passes()[0].visual_out == 8


def test_F01_a_constant_keep_beside_a_skipper_that_waits():
    model = made(NAME)
    handle = attach(model, QUARTER, HALF_OFF)
    _, messages = told(lambda: [model(**batch_of(NAME, model)) for _ in range(4)])
    assert [m.split(" had")[0] for m in messages] == ["the skipper"]
    assert {(p.visual_out, p.layers_run) for p in handle.take_passes()} == {(8, 4)}


def test_F01_passes_that_nobody_takes_are_bounded(monkeypatch):
    monkeypatch.setattr(forward, "_PASSES", 8)
    model = made(NAME)
    handle = attach(model, QUARTER)
    for _ in range(20):
        model(**batch_of(NAME, model))
    assert len(handle.passes) == 8


def test_F01_the_probe_leaves_frozen_parts_in_eval_mode_and_no_graph_alive():
    model = made(NAME)
    handle = attach(model, QUARTER)
    model.model.vision_tower.eval()
    batch = batch_of(NAME, model)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    model(inputs_embeds=embeds, **{key: value for key, value in batch.items() if key != "input_ids"})
    assert not handle._forwards.last[1]["inputs_embeds"].requires_grad
    handle.dense_probe()
    assert not any(m.training for m in model.model.vision_tower.modules()) and model.training
    handle.detach()
    assert handle._forwards.last is None


# ----------------------------------------------------------------------------------------------------------- copies


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert b"sparsight.sparse" not in file.getvalue()  # loads where there is no Sparsight
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "average": lambda model: AveragedModel(model).module}


@pytest.mark.parametrize("name", [NAME, "qwen2_5_vl"])
@pytest.mark.parametrize("how", COPIES)
def test_F08_a_copy_is_a_plain_model_of_its_own(how, name):
    model = made(name)
    batch = batch_of(name, model)
    plain = logits(made(name), batch)
    handle = attach(model, QUARTER, HALF_OFF)
    handle.step(1, 0.0)
    other = COPIES[how](model)  # before any pass: in those, transformers hangs closures of its own into some
    sparse = logits(model, batch)
    assert torch.equal(logits(other, batch), plain) and not torch.equal(sparse, plain)
    with torch.no_grad():  # each has its own layers
        for layer in other.get_decoder().layers:
            layer.mlp.down_proj.weight.zero_()
    assert torch.equal(logits(model, batch), sparse) and not torch.equal(logits(other, batch), plain)
    changed = logits(other, batch)
    with torch.no_grad():
        for layer in handle.layers:
            layer.mlp.up_proj.weight.zero_()
    assert torch.equal(logits(other, batch), changed)
    taken = len(handle.passes)
    own = attach(other, QUARTER)
    other(**batch).loss.backward()
    assert own.passes[0].visual_out < own.passes[0].visual_in and len(handle.passes) == taken
    assert all(p.grad is None for p in model.parameters())
    own.detach()
    assert torch.equal(logits(other, batch), changed)
    handle.detach()
    assert "_sparsight_handle" not in model.__dict__


def test_F08_a_copy_of_a_composed_model_and_of_adapters():
    ours, _ = make_vlm("1:16", vision_levels=[2])
    model = get_peft_model(ours.train(), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    batch = batch_of("sparsight", ours)
    plain = logits(model, batch)
    attach(model, QUARTER)
    other = copy.deepcopy(model)
    assert not torch.equal(logits(model, batch), plain) and torch.equal(logits(other, batch), plain)
    assert other.get_base_model().get_decoder().forward.__self__ is other.get_base_model().get_decoder()


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("adapters", [False, True])
def test_F09_generate_in_training_mode_is_that_of_eval_mode(options, adapters):
    model = made(NAME)
    inner = model
    batch = {key: value for key, value in batch_of(NAME, model).items() if key != "labels"}
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]} | options
    plain = model.eval().generate(**batch, **options)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    handle = attach(model, QUARTER, SkipperConfig(alpha=1.0, epsilon=0.0, schedule="constant"))
    handle.step(1, 0.0)
    model.train()
    assert torch.equal(model.generate(**batch, **options), plain)
    assert torch.equal(inner.generate(**batch, **options), plain)
    assert handle.take_passes() == [] and handle.active()
    model(**batch)
    assert len(handle.passes) == 1 and handle.passes[0].visual_out == 8


def test_F09_assisted_generation_in_training_mode():
    model, assistant = made(NAME), LlamaForCausalLM(LlamaConfig(**TEXT))
    ids = torch.randint(4, 60, (1, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.eval().generate(ids, **options)
    for each in (model, assistant):
        attach(each, skipper=SkipperConfig(alpha=1.0, epsilon=0.0, schedule="constant")).step(1, 0.0)
    model.train()
    found = model.generate(ids, assistant_model=assistant, **options)
    assert torch.equal(found, plain)


def test_F09_a_given_cache_is_filled_densely_and_one_made_inside_is_not():
    model = made(NAME)
    batch = {key: value for key, value in batch_of(NAME, model).items() if key != "labels"}
    plain = logits(model, batch)
    handle = attach(model, QUARTER)
    assert torch.equal(logits(model, batch | {CACHE: DynamicCache(config=model.config)}), plain)
    assert handle.take_passes() == []
    assert not torch.equal(logits(model, batch | {"use_cache": True}), plain)
    assert handle.take_passes()[0].visual_out == 8


def test_F09_unless_asked_for():
    model = made(NAME).eval()
    batch = {key: value[:1] for key, value in batch_of(NAME, model).items() if key != "labels"}
    handle = attach(model, QUARTER, train_only=False)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert handle.take_passes()[0].visual_out == 4


# ----------------------------------------------------------------------------------------------- modes and batches


def test_F43_a_model_trained_in_eval_mode_is_told():
    model = made(NAME).eval()
    attach(model, QUARTER)
    _, messages = told(lambda: [model(**batch_of(NAME, model)).loss for _ in range(9)])
    assert messages == []  # looked at, not trained on
    _, messages = told(lambda: [model(**batch_of(NAME, model)).loss.backward() for _ in range(9)])
    assert len(messages) == 1 and "eval mode: call model.train()" in messages[0]


def test_F43_a_model_trained_with_given_caches_is_told():
    model = made(NAME)
    attach(model, QUARTER)

    def step():
        model(**batch_of(NAME, model), **{CACHE: DynamicCache(config=model.config)}).loss.backward()

    _, messages = told(lambda: [step() for _ in range(9)])
    assert len(messages) == 1 and "a cache of keys and values was given" in messages[0]


def test_F30_embeddings_without_ids_are_told():
    model = made(NAME)
    batch = batch_of(NAME, model)
    handle = attach(model, QUARTER)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    _, messages = told(lambda: [model(inputs_embeds=embeds, **batch) for _ in range(50)])
    assert len(messages) == 1 and "no input_ids of a batch had visual tokens" in messages[0]
    assert len(handle.passes) == 50


# ------------------------------------------------------------------------------------------------- without vision


def audio():
    torch.manual_seed(0)
    encoder = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = Qwen2AudioConfig(
        audio_config=encoder | {"num_mel_bins": 8, "max_source_positions": 8},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_index=IMAGE,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    ids = torch.tensor([[5, *[IMAGE] * 4, 6, 7, 8]])
    sound = {"input_features": torch.randn(1, 8, 16), "feature_attention_mask": torch.ones(1, 16, dtype=torch.long)}
    labels = ids.masked_fill(ids == IMAGE, -100)
    return model, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), **sound}


def plain_language():
    torch.manual_seed(0)
    ids = torch.randint(4, 60, (2, 9))
    return LlamaForCausalLM(LlamaConfig(**TEXT)), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("made_model", [plain_language, audio])
def test_F39_a_skipper_needs_no_vision(made_model, adapters):
    model, batch = made_model()
    if adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    plain = model(**batch).loss
    handle = attach(model, skipper=HALF_OFF)
    assert handle.parts.vision == ""
    handle.step(1, 0.0)
    assert any(handle.skipped) and not torch.equal(model(**batch).loss, plain)
    found = figures(handle, handle.take_passes())
    assert found["layers_run"] == 1 - sum(handle.skipped) / 4 and found["language_flops_ratio"] < 1
    assert found["language_flops"] > 0 and found["visual_tokens_in"] == 0
    # Qwen2-Audio has no function of its own that encodes, which could be counted.
    assert found.get("flops") == (found["language_flops"] if made_model is plain_language else None)
    assert handle.dense_probe()["loss_dense"] == pytest.approx(float(plain.detach()))
    handle.detach()
    assert torch.equal(model(**batch).loss, plain)
    if made_model is plain_language:
        with pytest.raises(ValueError, match="has no vision tower and no audio encoder"):
            attach(model, QUARTER)


# ------------------------------------------------------------------------------------------------------- arguments


def test_F26_methods_are_known_by_their_types():
    model = made(NAME)
    for given in ((HALF_OFF,), (HALF_OFF, QUARTER), (QUARTER, HALF_OFF), (None, QUARTER)):
        handle = attach(model, *given)
        assert handle.compressor == (QUARTER if QUARTER in given else None)
        assert handle.skipper == (HALF_OFF if HALF_OFF in given else None)
        handle.detach()


def test_F26_neither_method_is_refused():
    model = made(NAME)
    with pytest.raises(ValueError, match="neither a compressor nor a skipper: write attach"):
        attach(model)
