"""Audio tokens: found, compressed along time, and counted apart from visual ones."""

import json

import pytest
import torch
import transformers
from audio_families import AUDIO, END, FAMILIES, IMAGE, OMNI, START, VIDEO, batch_of, made
from families import PATCH, masked_reference
from test_attach import HALF_OFF, METHODS, QUARTER, gradients, same
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMultimodalLM, Trainer, TrainingArguments

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.callback import STATE_FILE, SparsightCallback
from sparsight.sparse.compress import compress
from sparsight.sparse.executed import figures
from sparsight.sparse.parts import find_parts

VISION_START, VISION_END = 2, 1


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_and_skip_none_is_the_plain_model_bit_by_bit(name):
    model = made(name)
    batch = batch_of(name, model, (1, 0, 2))
    plain = gradients(model, batch)
    handle = attach(model, CompressorConfig(keep=1.0), SkipperConfig(alpha=0.0, epsilon=0.0))
    assert same(gradients(model, batch), plain)
    handle.detach()
    assert same(gradients(model, batch), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_attached_and_detached_without_a_trace(name):
    model = made(name)
    batch = batch_of(name, model)

    def state():
        modules = {path: (type(m), set(m.__dict__), len(m._forward_hooks)) for path, m in model.named_modules()}
        return list(model.state_dict()), modules

    plain = gradients(model, batch)
    before = state()
    handle = attach(model, QUARTER, HALF_OFF)
    assert [*model.state_dict()] == before[0] and not same(gradients(model, batch), plain)
    handle.detach()
    assert state() == before and same(gradients(model, batch), plain)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["uniform", "text", "similarity"])
def test_a_dropped_token_is_as_if_it_were_masked(name, method, monkeypatch):
    model = made(name).eval()
    batch = batch_of(name, model)
    short, full, keep = masked_reference(model, batch, method, monkeypatch, 0.25)
    assert (keep | (batch["input_ids"] == AUDIO))[batch["attention_mask"].bool()].all()  # text stays
    error = (short - full)[keep].abs().max() / full[keep].abs().max()
    assert error <= 1e-5, error  # measured 5e-7


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_each_clip_is_a_run_along_time(name, method, monkeypatch):
    model, seen = made(name), []

    def spy(tokens_IND, keep, method, grid, **options):
        seen.append((len(tokens_IND), grid))
        return compress(tokens_IND, keep, method, grid=grid, **options)

    monkeypatch.setattr("sparsight.sparse.compress.compress", spy)
    batch = batch_of(name, model, (1, 2))
    handle = attach(model, CompressorConfig(keep=0.25, method=method))
    loss, grads = gradients(model, batch)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in grads.values())
    first = int((batch["input_ids"][0] == AUDIO).sum())
    assert sum(number for number, _ in seen) == 3 and (1, first) in [grid for _, grid in seen]
    (done,) = handle.take_passes()
    assert done.visual_in == 0 and done.audio_in == int((batch["input_ids"] == AUDIO).sum())
    assert done.audio_out == sum(number * max(1, round(grid[1] / 4)) for number, grid in seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_on_placeholders_are_masked_and_told(name):
    model = made(name)
    right = batch_of(name, model)
    count = int((right["input_ids"] == AUDIO).sum())
    wrong = right | {"labels": right["labels"].masked_fill(right["input_ids"] == AUDIO, AUDIO)}
    attach(model, QUARTER)
    wanted = model(**right).loss
    kinds = "visual or audio" if name in OMNI else "audio"
    with pytest.warns(UserWarning, match=rf"{count} of the \d+ labels of this batch stood on {kinds} tokens"):
        assert torch.equal(model(**wrong).loss, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_skipper_works_alone(name):
    model = made(name)
    batch = batch_of(name, model)
    handle = attach(model, skipper=HALF_OFF)
    handle.set_skipped((False, True, True, False))
    loss, grads = gradients(model, batch)
    layers = handle.parts.decoder + ".layers."
    assert {key[len(layers)] for key in grads if key.startswith(layers)} == {"0", "3"}
    handle.detach()
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList([decoder.layers[0], decoder.layers[3]])
    decoder.config.num_hidden_layers = 2
    assert torch.equal(model(**batch, use_cache=False).loss, loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_executed_flops_match_the_counter(name):
    model = made(name)
    if "Moe" in name:  # the counter does not see into grouped products
        model.set_experts_implementation("eager")
    batch = batch_of(name, model)
    handle = attach(model, QUARTER)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    found = figures(handle, handle.take_passes())
    if name == "Qwen2Audio":  # its encoder has no function of its own, which could be counted
        assert "flops" not in found and found["language_flops"] > 0
    else:
        assert found["flops"] == pytest.approx(counter.get_total_flops(), rel=0.03)


class Clips(torch.utils.data.Dataset):
    def __init__(self, name, model):
        self.rows = [{k: v[0] for k, v in batch_of(name, model, (1,), seed).items()} for seed in range(12)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("name", ["Voxtral", "Qwen2_5OmniThinker"])
def test_the_callbacks_whole_path_in_a_trainer(name, tmp_path):
    """Log, save, resume: the resumed run is the straight one, bit by bit; what is saved loads in plain transformers."""

    def trained(resume=None):
        model = made(name)
        compressor = CompressorConfig(keep=0.25, final=1.0, method="random")
        callback = SparsightCallback(attach(model, compressor, HALF_OFF, seed=3), dense_probe=2)
        more = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
        more |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2}
        arguments = TrainingArguments(str(tmp_path), max_steps=4, **more)
        trainer = Trainer(model, arguments, train_dataset=Clips(name, model), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, callback = trained()
    resumed, _ = trained(str(tmp_path / "checkpoint-2"))
    ours, theirs = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert json.loads((tmp_path / "checkpoint-2" / STATE_FILE).read_text()) == callback.settings()
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    tokens = 2 * int((Clips(name, whole.model)[0]["input_ids"] == AUDIO).sum())
    assert [entry["audio_tokens_in"] for entry in logged] == [tokens] * 4
    out = [entry["audio_tokens_out"] for entry in logged]
    assert out[0] == tokens / 4 and out == sorted(out) and len(set(out)) > 1
    for entry in logged:
        assert entry["visual_tokens_in"] == entry["visual_tokens_out"] == 0
        assert entry["language_flops_ratio"] < 1 and entry["flops"] > entry["language_flops"]
    assert logged[1]["loss_dense"] != logged[1]["loss_sparse"]
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in ours.items())


# ------------------------------------------------------------------------------------------------- omni models


def interleaved(name):
    """A sample with a video whose sound stands between its frames, then a clip by itself, then an image."""
    model, generator = made(name), torch.Generator().manual_seed(0)
    clip = batch_of(name, model, (2,))
    count = int((clip["input_ids"] == AUDIO).sum())
    alone = batch_of(name, model, (1,))
    first = int((alone["input_ids"] == AUDIO).sum())
    half = first // 2
    film = [*[VIDEO] * 8, *[AUDIO] * half, *[VIDEO] * 8, *[AUDIO] * (first - half)]
    row = [5, 6, VISION_START, START, *film, END, VISION_END, 7, START, *[AUDIO] * (count - first), END]
    ids = torch.tensor([[*row, 8, VISION_START, *[IMAGE] * 4, VISION_END, 9, 10, 11]])

    def patches(number):
        return torch.randn(number, 3 * 2 * PATCH * PATCH, generator=generator)

    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where((ids > 8) & (ids < 12), ids, -100),
        "input_features": clip["input_features"],
        "feature_attention_mask": clip["feature_attention_mask"],
        "pixel_values_videos": patches(64),
        "video_grid_thw": torch.tensor([[4, 4, 4]]),
        "pixel_values": patches(16),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "use_audio_in_video": True,
        "video_second_per_grid": torch.tensor([1.0]),
    }
    return model, batch, (half, first - half, count - first)


@pytest.mark.parametrize("name", OMNI)
def test_images_videos_and_audio_are_found_apart(name, monkeypatch):
    model, batch, pieces = interleaved(name)
    plain, seen = gradients(model, batch), []
    handle = attach(model, CompressorConfig(keep=1.0), SkipperConfig(alpha=0.0, epsilon=0.0))
    assert same(gradients(model, batch), plain)
    handle.detach()

    def spy(tokens_IND, keep, method, grid, **options):
        seen.extend([grid] * len(tokens_IND))
        return compress(tokens_IND, keep, method, grid=grid, **options)

    monkeypatch.setattr("sparsight.sparse.compress.compress", spy)
    handle = attach(model, CompressorConfig(keep=0.25, method="pool"))
    gradients(model, batch)
    assert sorted(seen) == sorted([(4, 2, 2), (2, 2), *((1, piece) for piece in pieces)])
    (done,) = handle.take_passes()
    found = figures(handle, [done])
    assert (found["visual_tokens_in"], found["visual_tokens_out"]) == (20, 5)
    assert found["audio_tokens_in"] == sum(pieces)
    assert found["audio_tokens_out"] == sum(max(1, round(piece / 4)) for piece in pieces)
    assert (
        [*done.pixels] and set(done.pixels) == {"image", "video", "audio"} and found["flops"] > found["language_flops"]
    )


@pytest.mark.parametrize("name", OMNI)
@pytest.mark.parametrize("method", ["uniform", "similarity"])
def test_in_an_interleaved_sequence_too_a_dropped_token_is_as_if_masked(name, method, monkeypatch):
    model, batch, _ = interleaved(name)
    short, full, keep = masked_reference(model.eval(), batch, method, monkeypatch, 0.25)
    assert (short - full)[keep].abs().max() <= 1e-5 * full[keep].abs().max()


# ----------------------------------------------------------------------------------------------- refused, and told


def test_parts_say_what_was_found():
    parts = find_parts(made("GraniteSpeech"), needs_vision=True)
    assert (parts.vision, parts.audio, parts.audio_token_ids, parts.kinds) == ("", "model.encoder", (AUDIO,), "audio")
    assert "audio encoder        model.encoder\nids of audio tokens  3" in str(parts)
    assert find_parts(made(OMNI[0])).kinds == "visual or audio"


def test_batches_without_audio_are_told():
    model = made("Voxtral")
    attach(model, QUARTER)
    batch = batch_of("Voxtral", model, (0, 0))
    with pytest.warns(UserWarning, match="no input_ids of a batch had audio tokens"):
        _ = [model(**batch) for _ in range(50)]


def empty(name):
    """Of its own sizes, on the meta device."""
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, f"{name}Config")())


@pytest.mark.parametrize(
    "name, why",
    [
        ("VoxtralRealtime", "has no id of an audio token in its config, so its audio tokens cannot be found"),
        ("VibeVoiceAsr", "has no vision tower and no audio encoder"),
        ("VibeVoice", "learns to speak: its loss is taken on audio tokens, so none of them can be dropped"),
        ("HiggsAudioV2", "has no vision tower and no audio encoder"),
        ("Whisper", "is an encoder-decoder: what it encodes does not stand in the decoder's sequence"),
    ],
)
def test_what_cannot_be_compressed_is_refused_with_the_reason(name, why):
    model = empty(name)
    with pytest.raises(ValueError, match=why):
        attach(model, QUARTER)
