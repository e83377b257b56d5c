import json
import shutil
from copy import deepcopy

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2WithRegistersConfig,
    Qwen2VLImageProcessorPil,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from sparsight.compat import FOUND
from sparsight.modeling.configuration import EfficientNetLiteConfig
from sparsight.modeling.scaling import scale_checkpoint, scale_tokens
from sparsight.settings.bridges import ChainOfSightConfig, ResamplerConfig
from tiny import clip_config, conversation, make_image, make_language, make_vlm

SMALL = ChainOfSightConfig("1:4,2:2", width=32, heads=2)  # 12 tokens
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
# name: configuration, image's side before and after, patches per side before and after
ENCODERS = {
    "clip": (clip_config(), 64, 128, 8, 16),
    "siglip, 27x27": (SiglipVisionConfig(**TINY, image_size=384, patch_size=14), 384, 768, 27, 54),
    "siglip2": (Siglip2VisionConfig(**TINY, patch_size=8, num_patches=64), 64, 128, 8, 16),
    "dinov2 with registers": (
        Dinov2WithRegistersConfig(**TINY, image_size=64, patch_size=8, num_register_tokens=3), 64, 128, 8, 16,
    ),
    "vit": (ViTConfig(**TINY, image_size=64, patch_size=8), 64, 96, 8, 12),
    "efficientnet-lite0": (EfficientNetLiteConfig(), 64, 128, 4, 8),
    "qwen2.5-vl": (
        Qwen2_5_VLVisionConfig(
            depth=4, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, patch_size=8,
            window_size=32, fullatt_block_indexes=[3],
        ),
        64, 128, 8, 16,
    ),
}  # fmt: skip
# Before, transformers makes this tower as a part of its model alone.
alone = pytest.mark.skipif(FOUND < (5, 18), reason="from 5.18 on, Qwen2.5-VL's tower stands by itself")


def prompt(processor):
    talk = conversation("How many?", None)
    talk[0]["content"][0]["image"] = make_image()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(talk, **options)


def text(report):
    return {row.part: row.source for row in report.parts[:-1]}


def test_a_finer_layout_and_a_larger_image(tmp_path):
    model, processor = make_vlm(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = scale_tokens(model, processor, "1:4,2:4,8:2", image_size=128)
    assert text(report) == {"1:4": "1:4", "2:4": "1:4", "8:2": "2:2"}
    config = model.config
    assert config.bridge_config["layout"] == "1:4,2:4,8:2"
    assert (config.bridge_config["width"], config.bridge_config["heads"]) == (32, 2)  # the model's, not the default
    assert (config.image_size, config.map_size) == (128, [16, 16])
    assert config.num_image_tokens == processor.num_image_tokens == 4 + 16 + 128
    batch = prompt(processor)
    assert batch["pixel_values"].shape == (1, 3, 128, 128)
    model.set_attn_implementation("sdpa")  # what loading chooses; others differ in the last bits
    with torch.no_grad():
        out = model(**batch).logits
    assert out.isfinite().all()
    after = model.state_dict()
    kept = [name for name in after if "scales" not in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    one, other = (f"model.multi_modal_projector.scales.{grid}.blocks.0.out.weight" for grid in (8, 2))
    assert torch.equal(after[one], before[other])

    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.num_image_tokens == loaded.config.num_image_tokens == 148
    with torch.no_grad():
        assert torch.equal(loaded(**prompt(again)).logits, out)
    assert model.generate(**batch, max_new_tokens=2).shape[1] <= batch["input_ids"].shape[1] + 2


def test_tokens_of_an_unchanged_scale_are_unchanged():
    """The shared norm and linear are kept, so a scale that stays gives the same tokens as before."""
    model, processor = make_vlm(SMALL)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model.get_image_features(pixels).pooler_output
        scale_tokens(model, processor, "1:4,4:2")
        after = model.get_image_features(pixels).pooler_output
    error = (before[:, :4] - after[:, :4]).abs().max()
    assert error <= 1e-5, error  # measured 0
    assert after.shape == (2, 36, 32)


def test_an_image_size_alone():
    model, processor = make_vlm("linear")
    report = scale_tokens(model, processor, "linear", image_size=128)
    assert (report.parts, report.tokens) == ((), (64, 256))
    assert (model.config.map_size, processor.num_image_tokens) == ([16, 16], 256)
    assert model(**prompt(processor)).logits.isfinite().all()


def test_the_same_layout_changes_nothing():
    model, processor = make_vlm(SMALL)
    batch, bridge = prompt(processor), model.model.multi_modal_projector
    with torch.no_grad():
        before = model(**batch).logits
        assert scale_tokens(model, processor, "1:4,2:2").parts == ()
        assert torch.equal(model(**batch).logits, before) and model.model.multi_modal_projector is bridge


def test_a_chosen_source():
    model, processor = make_vlm(ChainOfSightConfig("1:4,2:4", width=32, heads=2))
    assert text(scale_tokens(model, processor, "4:4", sources={4: 1})) == {"4:4": "1:4"}


def test_training_mode_and_precision_are_kept():
    model, processor = make_vlm(SMALL)
    model.bfloat16().train()
    scale_tokens(model, processor, "1:4,4:2")
    bridge = model.model.multi_modal_projector
    assert bridge.training and {p.dtype for p in bridge.parameters()} == {torch.bfloat16}
    assert model.training and model.model.vision_tower.training


@pytest.mark.parametrize(
    "bridge, options, message",
    [
        ("1:4,2:3", {}, "scale 2:3 of '1:4,2:3' has no source in '1:4,2:2'"),
        ("1:4,16:2", {}, "a grid of 16 windows per side needs at least 16 patches .* has 8"),
        ("mlp", {}, "kind chain_of_sight cannot become one of kind mlp"),
        (ResamplerConfig(tokens=4, width=32, heads=2), {}, "kind chain_of_sight cannot become one of kind resampler"),
        (ChainOfSightConfig("1:4,4:2", width=64, heads=2), {}, r"differ \(old, new\): {'width': \[32, 64\]}"),
        ("1:4,4:2", {"sources": {8: 1}}, r"sources name grids \[8\]"),
        ("cos-528", {}, "ambiguous"),
        (None, {"vision_levels": [2, 9]}, r"CLIPVisionModel has no feature level \[9\]: it has 0 to 4"),
        (None, {"vision_levels": [1]}, r"the new feature levels \[1\] share none with the old ones \[2, 3\]"),
        (None, {"image_size": 4}, "image_size 4: CLIPVisionModel cuts images into patches of 8 pixels"),
        (None, {"image_size": 8}, "a grid of 2 windows per side needs at least 2 patches .* has 1"),
    ],
)
def test_what_cannot_be_reached_changes_nothing(bridge, options, message):
    model, processor = make_vlm(SMALL)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        scale_tokens(model, processor, bridge, **options)
    assert model.config.to_dict() == before and processor.num_image_tokens == 12
    assert model(**prompt(processor)).logits.isfinite().all()


def test_bridges_without_a_layout_cannot_become_others():
    model, processor = make_vlm("mlp")
    with pytest.raises(ValueError, match="kind mlp cannot become one of kind linear"):
        scale_tokens(model, processor, "linear")


def test_more_heads_are_refused():
    """All tensors would fit, but mean something else."""
    model, processor = make_vlm(SMALL)
    with pytest.raises(ValueError, match="heads"):
        scale_tokens(model, processor, ChainOfSightConfig("1:4,4:2", width=32, heads=4))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[alone] if n == "qwen2.5-vl" else []) for n in ENCODERS])
def test_any_encoder_can_be_scaled_in_memory_and_on_disk(name, tmp_path):
    config, small, large, before, after = ENCODERS[name]
    model, processor = make_vlm(SMALL, vision=deepcopy(config), image_size=small)
    assert list(model.config.map_size) == [before, before]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        visual = model.get_image_features(torch.randn(2, 3, small, small)).pooler_output
        assert visual.shape == (2, 12, 32) and visual.isfinite().all()
    report = scale_tokens(model, processor, "1:4,2:4,4:2", image_size=large)
    assert list(model.config.map_size) == [after, after]
    assert report.tokens == (12, 52) and report.image_size == (small, large)

    assert scale_checkpoint(tmp_path / "small", tmp_path / "large", "1:4,2:4,4:2", image_size=large) == report
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "large")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert AutoProcessor.from_pretrained(tmp_path / "large").num_image_tokens == 52
    pixels = torch.randn(2, 3, large, large)
    with torch.no_grad():
        error = loaded.get_image_features(pixels).pooler_output - model.get_image_features(pixels).pooler_output
    assert error.abs().max() <= 1e-5  # measured 5e-7: after loading, another kernel of attention


@alone
def test_images_of_several_sizes_at_native_resolution():
    """Qwen2.5-VL's tower with its own processor: each image's tokens are those it has alone."""
    config = ENCODERS["qwen2.5-vl"][0]
    own = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2)
    model, processor = make_vlm(SMALL, vision=config, image_processor=own, image_size=96)
    images = [make_image(0, 64), make_image(1, 90).crop((0, 0, 90, 40)), make_image(2, 80).crop((0, 0, 50, 80))]
    batch = processor.image_processor(images, return_tensors="pt")
    sizes = batch["image_grid_thw"][:, 1:].tolist()
    assert len({tuple(size) for size in sizes}) == 3  # of several sizes indeed
    with torch.no_grad():
        together = model.get_image_features(**batch).pooler_output
        for number, image in enumerate(images):
            alone = processor.image_processor([image], return_tensors="pt")
            error = (model.get_image_features(**alone).pooler_output[0] - together[number]).abs().max()
            assert error <= 1e-5, error  # measured 1e-6
    talk = conversation("How many?", None)
    talk[0]["content"][0]["image"] = images[1]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(talk, **options)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    linear, linear_processor = make_vlm("linear", vision=config, image_processor=own, image_size=96)
    with pytest.raises(ValueError, match="a token for each patch needs maps of one size"):
        linear.get_image_features(**linear_processor.image_processor(images, return_tensors="pt"))


@alone
def test_square_images_are_cut_as_the_native_processor_cuts_them():
    config, side = ENCODERS["qwen2.5-vl"][:2]
    model, _ = make_vlm(SMALL, vision=config, image_size=side)
    own = Qwen2VLImageProcessorPil(patch_size=8, do_resize=False)
    batch = own([make_image(3, side)], return_tensors="pt")
    plain = torch.as_tensor(batch["pixel_values"]).view(8 // 2, 8 // 2, 2, 2, 3, 2, 8, 8)[..., 0, :, :]
    square = plain.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, side, side)
    with torch.no_grad():
        for ours, theirs in zip(model.model.encode_images(square), model.model.encode_images(**batch), strict=True):
            assert torch.equal(ours, theirs)


@alone
def test_native_maps_are_in_reading_order():
    """With blocks that do nothing, a feature depends on its own patch alone."""
    config, side = ENCODERS["qwen2.5-vl"][:2]
    model, _ = make_vlm(SMALL, vision=config, image_size=side)
    tower = model.model.vision_tower
    for name, parameter in tower.named_parameters():
        if name.endswith(("attn.proj.weight", "attn.proj.bias", "down_proj.weight", "down_proj.bias")):
            torch.nn.init.zeros_(parameter)
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        before = model.model.encode_images(pixels)[0]
        pixels[0, :, 8 * 3 : 8 * 4, 8 * 5 : 8 * 6] += 1  # row 3, column 5
        moved = (model.model.encode_images(pixels)[0] - before).abs().amax(-1)[0] > 0
    assert moved.nonzero().tolist() == [[3, 5]]


def test_a_resampler_becomes_chain_of_sight():
    model, processor = make_vlm(ResamplerConfig(tokens=4, width=32, heads=2))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.get_image_features(pixels).pooler_output
        report = scale_tokens(model, processor, "1:4,2:4")
        after = model.get_image_features(pixels).pooler_output
    assert text(report) == {"1:4": "1:4", "2:4": "1:4"}
    assert model.config.bridge_config == ChainOfSightConfig("1:4,2:4", width=32, heads=2).model_dump()
    assert (before - after[:, :4]).abs().max() <= 1e-5 and processor.num_image_tokens == 20


def test_up_and_down_again():
    model, processor = make_vlm(ChainOfSightConfig("1:4,4:2", width=32, heads=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale_tokens(model, processor, "1:4,2:4,8:2")
    report = scale_tokens(model, processor, "1:4,4:2")
    assert text(report) == {"1:4": "1:4", "4:2": "8:2"} and report.tokens == (148, 36)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("levels", [[3], [2, 3, 4]], ids=str)
def test_other_feature_levels(levels):
    model, processor = make_vlm(SMALL)  # sees levels 2 and 3
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.get_image_features(pixels).pooler_output
        report = scale_tokens(model, processor, vision_levels=levels)
        after = model.get_image_features(pixels).pooler_output
    assert list(model.config.vision_levels) == levels and len(model.config.level_widths) == len(levels)
    assert torch.equal(before, after) == (levels == [2, 3, 4])  # a level that comes adds nothing at first
    assert (sum(row.new for row in report.parts) > 0) == (levels == [2, 3, 4])


def test_lora_and_language_model_carry_over_and_an_optimizer_does_not():
    from peft import LoraConfig, get_peft_model

    model, processor = make_vlm(SMALL)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    language = {n: p.clone() for n, p in tuned.state_dict().items() if "language_model" in n or "lm_head" in n}
    assert any("lora_A" in name for name in language)
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters())
    scale_tokens(tuned, processor, "1:4,4:2")
    after = tuned.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in language.items())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.model.multi_modal_projector.parameters()}  # so: make a new one
    assert tuned(**prompt(processor)).logits.isfinite().all()


def test_a_checkpoint_in_shards(tmp_path):
    """Shards without a tensor that changes are copied byte by byte; a Trainer's state is left behind."""
    model, processor = make_vlm(SMALL)
    model.save_pretrained(tmp_path / "small", max_shard_size="40KB")
    processor.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "small" / "notes.md").write_text("kept")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    scale_checkpoint(tmp_path / "small", tmp_path / "large", "1:4,4:2", image_size=128)
    scale_tokens(model, processor, "1:4,4:2", image_size=128)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "large").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    files = {path.name for path in (tmp_path / "large").iterdir()}
    assert "notes.md" in files and "optimizer.pt" not in files
    shards = [path.name for path in (tmp_path / "small").glob("*.safetensors")]
    same = [s for s in shards if (tmp_path / "small" / s).read_bytes() == (tmp_path / "large" / s).read_bytes()]
    assert 0 < len(same) < len(shards)
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text())
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    again = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == again["metadata"] and index["weight_map"].keys() == again["weight_map"].keys()


def test_what_is_no_checkpoint_of_ours(tmp_path):
    model, processor = make_vlm(SMALL)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "good")
    out, bad = tmp_path / "out", tmp_path / "bad"

    def fails(message, **options):
        with pytest.raises(ValueError, match=message):
            scale_checkpoint(bad, out, **({"layout": "1:4,4:2"} | options))
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"good", "bad"} & set(_names(tmp_path)))
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path / "good", bad)

    fails("expected a model of Sparsight, found no config.json")
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fails("cut short or damaged")
    weights.unlink()
    fails(r"is not complete: it lacks any \*.safetensors")
    (bad / "config.json").write_text(json.dumps({"model_type": "llava"}))
    fails("expected a model of Sparsight, found a model of type 'llava'")
    fails("scale 4:3 of '1:4,4:3' has no source", layout="1:4,4:3")
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        scale_checkpoint(bad, out, "1:4,4:2")


def test_F05_a_folder_that_is_called_partial_is_somebodys(tmp_path):
    for part in make_vlm(SMALL):
        part.save_pretrained(tmp_path / "good")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    scale_checkpoint(tmp_path / "good", tmp_path / "out", "1:4,4:2")
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
    assert sorted(_names(tmp_path)) == ["good", "out", "out.partial"]


def _names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_missing_shard_is_named(tmp_path):
    model, processor = make_vlm(SMALL)
    model.save_pretrained(tmp_path / "small", max_shard_size="40KB")
    processor.save_pretrained(tmp_path / "small")
    sorted((tmp_path / "small").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="is not complete: it lacks [0-9]+ tensors, such as"):
        scale_checkpoint(tmp_path / "small", tmp_path / "out", "1:4,4:2")
    assert not (tmp_path / "out").exists()


def test_without_a_layout_for_a_scratch_language_model_all_else_is_kept(tmp_path):
    """The report of a size alone has no rows, and says so in one line."""
    model, processor = make_vlm(SMALL, language=make_language()[0])
    report = scale_tokens(model, processor, image_size=128)
    assert str(report) == "visual tokens 12 -> 12, images 64 -> 128 px"
