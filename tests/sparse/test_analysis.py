from dataclasses import replace
from statistics import fmean

import pytest
import torch
from families import FAMILIES, IMAGE, batch_of, made
from torch.nn.functional import cosine_similarity

import sparsight
from sparsight.sparse.analysis import Analysis, LayerFigures, measure, suggest
from sparsight.sparse.compress import redundancy
from sparsight.sparse.parts import find_parts
from tiny import make_language

SOME = ("llava, siglip + qwen2", "smolvlm", "qwen2_5_vl", "paligemma", "sparsight")


def plain(model, batch):
    """The model's own account of a pass in eval mode, and which positions are visual."""
    with torch.no_grad():
        told = model.eval()(**batch, output_hidden_states=True, output_attentions=True)
    image = getattr(model.config, "image_token_id", IMAGE)
    return told, batch["input_ids"] == image


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", SOME)
def test_similarities_are_those_of_the_hidden_states(name):
    model = made(name)
    batch = batch_of(name, model, (1, 2))
    found = measure(model, [batch])
    told, visual = plain(model, batch)
    text = batch["attention_mask"].bool() & ~visual
    assert (found.samples, found.images) == (2, 3)
    assert (found.visual_tokens, found.text_tokens) == (int(visual.sum()), int(text.sum()))
    # The last state of theirs is the one behind the norm: no layer's output.
    for number, layer in enumerate(found.layers[:-1]):
        similar = cosine_similarity(told.hidden_states[number], told.hidden_states[number + 1], dim=-1)
        assert layer.visual_similarity == pytest.approx(float(similar[visual].mean()), abs=1e-5)
        assert layer.text_similarity == pytest.approx(float(similar[text].mean()), abs=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_attention_is_that_of_the_models_weights(name):
    model = made(name)
    batch = batch_of(name, model, (1, 1))
    found = measure(model, [batch])
    told, visual = plain(model, batch)
    assert found.without_attention == ""
    for layer, weights in zip(found.layers, told.attentions, strict=True):
        shares, even = [], []
        for row in range(2):
            for query in (~visual[row]).nonzero().flatten().tolist():
                seen = weights[row, 0, query] > 0
                if (seen & visual[row]).any():
                    shares.append(float(weights[row, :, query, visual[row]].sum(-1).mean()))
                    even.append(int((seen & visual[row]).sum()) / int(seen.sum()))
        assert layer.attention == pytest.approx(fmean(shares), abs=1e-5)
        assert layer.even_attention == pytest.approx(fmean(even), abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured_and_left_as_it_was(name):
    model = made(name)
    batch = batch_of(name, model)
    before, _ = plain(model, batch)
    model.train()
    hooked = hooks(model)  # transformers has its own, to tell hidden states
    found = measure(model, [batch])
    assert model.training and hooks(model) == hooked and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(plain(model, batch)[0].logits, before.logits)
    assert all(0 < layer.attention < 1 and -1 <= layer.similarity <= 1 for layer in found.layers)
    eval(suggest(found).code, {"sparsight": sparsight, "model": model}).detach()


def test_padding_and_batches_change_nothing():
    model = made("qwen2_5_vl")
    batch = batch_of("qwen2_5_vl", model, (1, 1))
    padded = dict(batch)
    for key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
        if key in batch:  # the last from 5.3 on
            padded[key] = torch.nn.functional.pad(batch[key], (0, 7))
    one, other = measure(model, [batch, batch]), measure(model, [padded])
    assert (one.samples, other.samples) == (4, 2) and one.text_tokens == 2 * other.text_tokens
    for a, b in zip(one.layers, other.layers, strict=True):
        for key in ("visual_similarity", "text_similarity", "attention", "even_attention"):
            assert getattr(a, key) == pytest.approx(getattr(b, key), abs=1e-5)
    assert one.redundancy == pytest.approx(other.redundancy, abs=1e-6)


def test_redundancy_is_that_of_each_image():
    model = made("llava, siglip + qwen2")
    batch = batch_of("llava, siglip + qwen2", model, (1, 2))
    found = measure(model, [batch])
    told, visual = plain(model, batch)
    tokens = told.hidden_states[0][visual].view(3, 16, -1)
    by_place = redundancy(tokens, (4, 4))
    assert found.redundancy == pytest.approx(float(by_place.mean()), abs=1e-6)
    assert found.map_images == 3
    assert torch.allclose(torch.tensor(found.redundancy_map), by_place.mean(0).view(4, 4), atol=1e-6)
    pairs = cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)[:, ~torch.eye(16, dtype=torch.bool)]
    assert found.any_two == pytest.approx(float(pairs.mean()), abs=1e-6)


def test_tokens_in_no_square_go_along_the_sequence():
    model = made("llava, siglip + qwen2")
    batch = batch_of("llava, siglip + qwen2", model, (1,))
    last = int((batch["input_ids"] == IMAGE).nonzero()[-1, 1])  # words between: 15 tokens and one
    order = [*range(last), last + 1, last, *range(last + 2, batch["input_ids"].shape[1])]
    batch |= {key: batch[key][:, order] for key in ("input_ids", "labels")}
    found = measure(model, [batch])
    told, visual = plain(model, batch)
    line = redundancy(told.hidden_states[0][visual][None, :15], (1, 15))
    assert found.images == 2 and found.redundancy == pytest.approx(float(line.sum()) / 16, abs=1e-6)
    assert found.redundancy_map == ((0.0,),)


def test_a_layer_that_does_nothing_is_the_least_important():
    model = made("smolvlm")
    layer = model.get_submodule(find_parts(model).decoder).layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    found = measure(model, [batch_of("smolvlm", model)])
    assert found.layers[1].similarity == pytest.approx(1.0, abs=1e-6)
    importance = suggest(found).importance
    assert importance[1] == 0.0 and all(value > 0 for number, value in enumerate(importance) if number != 1)


def test_without_weights_it_says_why():
    model = made("llava, clip + llama")
    model.set_attn_implementation("sdpa")
    found = measure(model, [batch_of("llava, clip + llama", model)])
    assert all(layer.attention is None and layer.even_attention is None for layer in found.layers)
    assert "layers [0, 1, 2, 3] gave no attention weights" in found.without_attention
    assert "backend 'eager'" in found.without_attention and "found the backend 'sdpa'" in found.without_attention


def test_what_cannot_be_measured():
    model = made("smolvlm")
    with pytest.raises(ValueError, match="2 samples with 0 visual tokens and 12 of text: expected some of both"):
        measure(model, [batch_of("smolvlm", model, (0, 0))])
    with pytest.raises(ValueError, match="0 samples"):
        measure(model, [])
    with pytest.raises(ValueError, match="has no vision tower"):
        measure(make_language()[0], [])
    with torch.no_grad():
        model.get_decoder().layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layer 2: its output in torch.float32 is not finite"):
        measure(model, [batch_of("smolvlm", model)])
    assert hooks(model) == 0


# -------------------------------------------------------------------------------------------------------- rules


def analysis(similarities, redundant=0.75, any_two=0.0) -> Analysis:
    layers = tuple(LayerFigures(value, value, None, None) for value in similarities)
    return Analysis(1, 1, 16, 8, layers, "", redundant, any_two, None, 0)


@pytest.mark.parametrize(
    "redundant, any_two, keep",
    [
        (0.75, 0.0, 0.25),
        (0.8, 0.6, 0.5),
        (0.95, 0.9, 0.5),  # nearly all alike, but for that neighbours say but half
        (0.9, 0.9, 1.0),
        (0.2, 0.4, 1.0),  # neighbours differ more than others
        (0.99, 0.0, 0.1),
        (0.31, 0.0, 0.7),
        (1.0, 1.0, 1.0),  # one and the same everywhere: nothing was seen
    ],
)
def test_keep_is_what_neighbours_do_not_say(redundant, any_two, keep):
    assert suggest(analysis([0.9] * 4, redundant, any_two)).compressor.keep == keep


@pytest.mark.parametrize(
    "similarities, protected",
    [
        ([0.3, 0.8, 0.95, 0.95, 0.96, 0.95, 0.5], (2, 1)),
        ([0.95, 0.3, 0.95, 0.95, 0.96, 0.95], (0, 0)),  # in the middle: not at an end
        ([0.94, 0.95, 0.95, 0.95, 0.95], (0, 0)),  # lower, but not clearly
        ([0.5, 0.6, 0.7, 0.8, 0.9], (0, 0)),
        ([0.9], (0, 0)),
    ],
    ids=str,
)
def test_protected_are_the_ends_that_lie_clearly_below_the_median(similarities, protected):
    assert suggest(analysis(similarities)).skipper.protected == protected


@pytest.mark.parametrize(
    "similarities, alpha", [([0.9] * 5, 0.6), ([0.43] * 5, 0.4), ([-0.2] * 5, 0.0), ([0.1, 0.55, 0.55, 0.55], 0.55)]
)
def test_alpha_is_the_free_layers_similarity(similarities, alpha):
    assert suggest(analysis(similarities)).skipper.alpha == alpha


@pytest.mark.parametrize(
    "similarities, epsilon, by_importance",
    [
        ([0.5, 0.6, 0.7, 0.8, 0.9], 0.3, False),  # deep layers change least: they are skipped more
        ([0.9, 0.8, 0.7, 0.6, 0.5], -0.3, False),
        ([0.9, 0.7, 0.9, 0.7, 0.9], 0.3, True),
        ([0.1, 0.95, 0.951, 0.952, 0.953], 0.0, False),  # the first is protected, the others are alike
        ([0.7, 0.8, 0.9], 0.3, True),  # too few for a trend
    ],
    ids=str,
)
def test_the_tilt_follows_depth_if_depth_orders_the_layers(similarities, epsilon, by_importance):
    advice = suggest(analysis(similarities))
    assert advice.skipper.epsilon == epsilon
    assert advice.importance == tuple(round(1 - value, 4) for value in similarities)
    assert advice.skipper.importance == (advice.importance if by_importance else None)
    assert set(advice.reasons) == {"keep", "protected", "alpha", "epsilon"}


def test_both_kinds_of_positions_count_alike():
    measured = analysis([0.5, 0.6])
    layers = (replace(measured.layers[0], text_similarity=0.9), measured.layers[1])
    assert suggest(replace(measured, layers=layers)).importance == (0.3, 0.4)


def test_the_line_to_paste():
    advice = suggest(analysis([0.3, 0.9, 0.92, 0.94, 0.96]))
    assert advice.code == (
        "sparsight.attach(model, sparsight.CompressorConfig(keep=0.25),"
        " sparsight.SkipperConfig(alpha=0.6, epsilon=0.3, protected=(1, 0)))"
    )
