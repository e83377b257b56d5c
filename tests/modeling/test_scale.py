import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.config import ChainOfSight, Resampler
from sparsight.modeling.scale import scale_tokens
from tiny import conversation, make_vlm, picture

SMALL = ChainOfSight("1:4,2:2", width=32, heads=2)  # 12 tokens


def prompt(processor):
    talk = conversation("How many?", None)
    talk[0]["content"][0]["image"] = picture()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(talk, **options)


def text(born):
    return {str(child): str(parent) for child, parent in born.items()}


def test_a_finer_layout_and_a_larger_image(tmp_path):
    model, processor = make_vlm(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    born = scale_tokens(model, processor, "1:4,2:4,8:2", image_size=128)
    assert text(born) == {"1:4": "1:4", "2:4": "1:4", "8:2": "2:2"}
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
    assert scale_tokens(model, processor, "linear", image_size=128) == {}
    assert (model.config.map_size, processor.num_image_tokens) == ([16, 16], 256)
    assert model(**prompt(processor)).logits.isfinite().all()


def test_the_same_layout_changes_nothing():
    model, processor = make_vlm(SMALL)
    batch, bridge = prompt(processor), model.model.multi_modal_projector
    with torch.no_grad():
        before = model(**batch).logits
        assert scale_tokens(model, processor, "1:4,2:2") == {}
        assert torch.equal(model(**batch).logits, before) and model.model.multi_modal_projector is bridge


def test_a_chosen_source():
    model, processor = make_vlm(ChainOfSight("1:4,2:4", width=32, heads=2))
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
        ("mlp", {}, "a bridge chain_of_sight cannot become mlp"),
        (Resampler(tokens=4, width=32, heads=2), {}, "a bridge chain_of_sight cannot become resampler"),
        (ChainOfSight("1:4,4:2", width=64, heads=2), {}, "of the new bridge is .* of the old one is"),
        ("1:4,4:2", {"sources": {8: 1}}, r"sources name grids \[8\]"),
        ("cos-528", {}, "ambiguous"),
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
    with pytest.raises(ValueError, match="a bridge mlp cannot become linear"):
        scale_tokens(model, processor, "linear")


def test_more_heads_are_refused():
    """All tensors would fit, but mean something else."""
    model, processor = make_vlm(SMALL)
    with pytest.raises(ValueError, match="heads"):
        scale_tokens(model, processor, ChainOfSight("1:4,4:2", width=32, heads=4))
