import copy
import warnings
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, IMAGE, TEXT, batch_of, made, masked_reference, tokens_of_an_image
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from sparsight.compat import returns_tuple
from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import NoEffectWarning, attach
from sparsight.sparse.compress import compress
from sparsight.sparse.parts import find_parts
from sparsight.sparse.visual import runs
from tiny import make_vlm

QUARTER = CompressorConfig(keep=0.25)
HALF_OFF = SkipperConfig(alpha=0.5, epsilon=0.0, schedule="constant")
SCALED = SkipperConfig(alpha=0.4, epsilon=0.3, schedule="constant", inverse_density=True)
STEP = 21  # in which SCALED skips some layers, of four as of two
METHODS = ["uniform", "random", "text", "pool", "similarity", "merge"]


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    return (
        torch.equal(one[0], other[0])
        and one[1].keys() == other[1].keys()
        and all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_all_and_skip_none_is_the_plain_model_bit_by_bit(name):
    model = made(name)
    batch = batch_of(name, model, (1, 0, 2) if name != "paligemma" else (1, 1))
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
        modules = {
            path: (type(m), set(m.__dict__) - {"training"}, len(m._forward_hooks)) for path, m in model.named_modules()
        }
        return list(model.state_dict()), modules

    plain = gradients(model, batch)
    before = state()
    handle = attach(model, QUARTER, HALF_OFF)
    assert [*model.state_dict()] == before[0] and [p for p, _ in model.named_modules()] == [*before[1]]
    gradients(model, batch)
    handle.detach()
    after = state()
    assert before[0] == after[0]
    assert {path: found for path, found in after[1].items() if found != before[1][path]} == {}
    assert same(gradients(model, batch), plain)
    with pytest.raises(ValueError, match="detached already"):
        handle.detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_and_what_is_saved_loads_in_plain_transformers(name, tmp_path):
    model = made(name)
    batch = batch_of(name, model)
    handle = attach(model, QUARTER, SkipperConfig(alpha=0.6, epsilon=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    course = []
    for step in range(20):
        handle.step(step, step / 20)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(float(loss.detach()))
    assert sum(course[-5:]) < 0.7 * sum(course[:5]), course
    passes = handle.take_passes()
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    assert len(passes) == 20 and handle.passes == []
    assert {(p.visual_in, p.visual_out) for p in passes} == {(visual, 2 * max(1, round(visual / 2 / 4)))}
    assert {(p.rows, p.length_in) for p in passes} == {tuple(batch["input_ids"].shape)}
    assert all(p.length == p.length_in - (p.visual_in - p.visual_out) // 2 for p in passes)
    assert 0 < sum(p.layers_run for p in passes) < 20 * handle.parts.layers
    model.save_pretrained(tmp_path)
    loaded, told = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["uniform", "text", "similarity"])
def test_a_dropped_token_is_as_if_it_were_masked(name, method, monkeypatch):
    """The short pass gives what the full model gives when the dropped positions are hidden from every other one."""
    model = made(name).eval()
    batch = batch_of(name, model, (1, 2) if name != "paligemma" else (1, 1))
    short, full, keep = masked_reference(model, batch, method, monkeypatch)
    labels = batch["labels"]
    learnt = labels != -100
    before = torch.cat([learnt[:, 1:], torch.zeros_like(learnt[:, :1])], 1)  # the positions that predict a label
    assert (keep | ~before).all()  # none of them was dropped
    error = (short - full)[keep].abs().max() / full[keep].abs().max()
    assert error <= 1e-5, error  # measured 1e-6
    assert short[~keep].abs().sum() == 0  # not computed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_is_off_is_not_there(name):
    model = made(name)
    batch = batch_of(name, model)
    handle = attach(model, skipper=HALF_OFF)
    handle.set_skipped((False, True, True, False)[: handle.parts.layers])
    path = handle.parts.decoder
    loss, grads = gradients(model, batch)
    assert not any(f"{path}.layers.1." in key for key in grads)
    assert any(f"{path}.layers.0." in key for key in grads)
    handle.detach()
    layers = model.get_submodule(f"{path}.layers")
    if name == "qwen3_vl":  # features of deeper levels are added behind the first layers, whether they run or not
        for number in (1, 2):
            layers[number].forward = lambda hidden, *_, **__: hidden
    else:
        kept = [layer for layer, off in zip(layers, handle.skipped, strict=True) if not off]
        model.get_submodule(path).layers = nn.ModuleList(kept)
        model.get_submodule(path).config.num_hidden_layers = len(kept)
    assert torch.equal(model(**batch, use_cache=False).loss, loss)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava, clip + llama", "qwen2_5_vl", "smolvlm"])
def test_every_method_on_uneven_samples(name, method):
    """0 to 3 images a sample, padding between: the loss is finite, and gradients reach encoder and language model."""
    model = made(name)
    batch = batch_of(name, model, (3, 0, 1))
    handle = attach(model, CompressorConfig(keep=0.5, method=method))
    loss, grads = gradients(model, batch)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert any(handle.parts.vision in key for key in grads)
    each = tokens_of_an_image(name)
    (done,) = handle.passes
    assert (done.visual_in, done.visual_out) == (4 * each, 4 * each // 2) and done.length < done.length_in


def grids_of(model, batch, monkeypatch):
    """The grids that a spatial method is given, with how many images."""
    seen = []

    def spy(tokens_IND, keep, method, grid, **options):
        seen.append((len(tokens_IND), grid))
        return compress(tokens_IND, keep, method, grid=grid, **options)

    monkeypatch.setattr("sparsight.sparse.compress.compress", spy)
    handle = attach(model, CompressorConfig(keep=0.5, method="pool"))
    model(**batch)
    handle.detach()
    return sorted(seen)


def test_spatial_methods_know_the_grid(monkeypatch):
    """Of several images a sample, of native-resolution ones, and of our own; queries and tiles stand in none."""
    for name in ("llava, clip + llama", "paligemma"):
        model = made(name)
        assert grids_of(model, batch_of(name, model, (2, 1)), monkeypatch) == [(3, (4, 4))]
    model = made("qwen2_5_vl")
    batch = batch_of("qwen2_5_vl", model, (1, 2))
    # 4 x 4, 8 x 2 and 2 x 8 patches, of which 2 x 2 become one token
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 8, 2], [1, 2, 8]])
    assert grids_of(model, batch, monkeypatch) == [(1, (1, 4)), (1, (2, 2)), (1, (4, 1))]
    model = made("llava_onevision")
    assert grids_of(model, batch_of("llava_onevision", model), monkeypatch) == [(2, (1, 36))]
    model = made("sparsight")
    assert grids_of(model, batch_of("sparsight", model), monkeypatch) == [(2, (1, 16))]
    model = make_vlm("mlp", vision_levels=[2])[0].train()
    ids = torch.full((1, 66), model.config.image_token_id)
    ids[0, -2:] = model.config.image_token_id - 1
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 64, 64), "labels": ids.clone()}
    assert grids_of(model, batch, monkeypatch) == [(1, (8, 8))]


def sizes_seen(monkeypatch):
    """Gets the visual tokens of each image, of each pass."""
    seen = []

    def spy(positions_M2, video_M, sizes, *inputs, **options):
        seen.append(dict(sizes))
        return runs(positions_M2, video_M, sizes, *inputs, **options)

    monkeypatch.setattr("sparsight.sparse.forward.runs", spy)
    return seen


@pytest.mark.parametrize("name", ["llava, clip + llama", "qwen2_5_vl", "sparsight"])
def test_lora_before_or_after(name, monkeypatch):
    found = []
    for attached_first in (True, False):
        model = made(name)
        adapters = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|up_proj)", init_lora_weights=False)
        torch.manual_seed(0)
        wrapped = model if attached_first else get_peft_model(model, adapters)
        handle, seen = attach(wrapped, CompressorConfig(keep=0.5, method="pool"), HALF_OFF), sizes_seen(monkeypatch)
        wrapped = get_peft_model(model, adapters) if attached_first else wrapped
        handle.set_skipped((False, True, False, True)[: handle.parts.layers])
        wrapped.train()(**batch_of(name, model, (2, 1))).loss.backward()
        assert seen == [{"image": [tokens_of_an_image(name)] * 3}]
        found.append({key.removeprefix("base_model.model."): p.grad for key, p in wrapped.named_parameters()})
        handle.detach()
    learnt = {key for key, grad in found[0].items() if grad is not None}
    assert learnt == {key for key in found[0] if "lora_" in key and "layers.1." not in key and "layers.3." not in key}
    assert all(torch.equal(grad, found[1][key]) for key, grad in found[0].items() if grad is not None)


def test_samples_do_not_meet():
    """A sample's loss is the same alone and in a batch with others, whatever is dropped there."""
    name = "llava, clip + llama"
    model = made(name)
    attach(model, CompressorConfig(keep=0.3, method="similarity"))
    batch = batch_of(name, model, (2, 1))
    logits = model(**batch).logits
    for row, pixels in enumerate((slice(0, 2), slice(2, 3))):
        alone = {key: value[row : row + 1] for key, value in batch.items() if key != "pixel_values"}
        found = model(**alone, pixel_values=batch["pixel_values"][pixels]).logits
        learnt = batch["labels"][row] != -100
        assert (logits[row, learnt] - found[0, learnt]).abs().max() <= 1e-4


def test_renumbered_places_have_no_gaps(monkeypatch):
    name = "llava, clip + llama"
    model = made(name)
    seen = []
    plain = model.get_decoder().forward
    model.get_decoder().forward = lambda *a, **k: (seen.append(k["position_ids"]), plain(*a, **k))[1]
    batch = batch_of(name, model)
    handle = attach(model, CompressorConfig(keep=0.25, positions="renumbered"))
    model(**batch)
    assert torch.equal(seen[0], torch.arange(12).expand(2, -1))
    handle.detach()
    attach(model, CompressorConfig(keep=0.25, positions="original"))
    model(**batch)
    assert seen[1][0].tolist() == [0, 1, 4, 8, 12, 17, *range(18, 24)]  # the last visual token stays


def test_eval_and_generate_are_the_plain_model():
    name = "llava, clip + llama"
    model = made(name).eval()
    batch = batch_of(name, model)
    with torch.no_grad():
        plain = model(**batch).logits
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    handle = attach(model, QUARTER, SkipperConfig(alpha=1.0, epsilon=0.0))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), answer)
    model.train()
    assert not torch.equal(model(**batch).logits, plain)
    with handle.disabled():
        assert torch.equal(model(**batch).logits, plain)


def test_the_step_settles_what_is_kept_and_what_is_off():
    model = made("llava, clip + llama")
    handle = attach(model, CompressorConfig(keep=0.2, final=1.0, dense_every=5), SkipperConfig(alpha=0.5, epsilon=0))
    drawn = []
    for step in range(20):
        handle.step(step, step / 19)
        drawn.append((handle.keep, handle.skipped))
    assert [keep == 1.0 for keep, _ in drawn] == [step % 5 == 0 or step == 19 for step in range(20)]
    assert drawn[19][1] == (False,) * 4 and any(any(off) for _, off in drawn)
    assert handle.report()["global_step"] == 19


def test_the_state_of_a_handle_is_read_only():
    handle = attach(made("llava, clip + llama"), QUARTER, HALF_OFF)
    for name in ("keep", "skipped", "global_step", "compressor", "train_only", "parts", "passes"):
        with pytest.raises(AttributeError):
            setattr(handle, name, None)
    handle.set_skipped([True, False, False, True])
    assert handle.report()["skipped"] == handle.skipped
    assert handle.skipped == (True, False, False, True)
    with pytest.raises(ValueError, match="skipped has 2 values, but the model has 4 layers"):
        handle.set_skipped([True, False])


@pytest.mark.parametrize("skipper", [HALF_OFF, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", ["llava, clip + llama", "qwen3_vl", "sparsight"])
def test_activation_checkpointing_recomputes_the_same(name, skipper):
    found = []
    for recompute in (False, True):
        model = made(name)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = attach(model, CompressorConfig(keep=0.5, method="random"), skipper)
        handle.step(STEP, 0.1)
        assert any(handle.skipped)
        found.append(gradients(model, batch_of(name, model)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    assert all(torch.allclose(grad, found[1][1][key], atol=1e-6) for key, grad in found[0][1].items())


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_the_large_batch(method):
    """R13 with both methods: (4), (2, 2) and (1, 1, 1, 1) give the same gradients; the draw of a step is shared."""
    name = "llava, clip + llama"
    found = []
    for parts in (1, 2, 4):
        model = made(name)
        handle = attach(model, CompressorConfig(keep=0.5, method=method), HALF_OFF)
        handle.step(3, 0.2)
        batch = batch_of(name, model, (1, 1, 1, 1))
        total = (batch["labels"] != -100).sum()
        for part in range(parts):
            rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
            model(**{key: value[rows] for key, value in batch.items()}, num_items_in_batch=total).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.allclose(grad, other[key], atol=1e-5) for key, grad in found[0].items())


def test_random_tokens_are_a_function_of_seed_step_and_image():
    """Also of numbers that differ in high bits alone, of which torch's generator sees nothing."""
    name, steps, seeds = "llava, clip + llama", (0, 4096), (0, 1, 2**32)
    kept = []
    for seed in seeds:
        model = made(name)
        handle = attach(model, CompressorConfig(keep=0.5, method="random"), seed=seed)
        seen = []
        handle.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
        )
        for step in (*steps, *steps):
            handle.step(step, 0.0)
            model(**batch_of(name, model, (1, 1)))
        assert seen[:2] == seen[2:]
        kept += [row for rows in seen[:2] for row in rows]
    assert len({tuple(row) for row in kept}) == len(seeds) * len(steps) * 2


def test_the_dense_probe_is_the_plain_loss_and_leaves_no_trace():
    model = made("llava, clip + llama")
    batch = batch_of("llava, clip + llama", model)
    with torch.no_grad():
        plain = float(model.eval()(**batch).loss)
    handle = attach(model.train(), QUARTER, HALF_OFF)
    assert handle.dense_probe() == {}
    loss = model(**batch).loss
    before = list(handle.passes)
    probe = handle.dense_probe()
    assert probe == {"loss_dense": plain, "loss_sparse": float(loss.detach())} and plain != float(loss)
    assert handle.passes == before and model.training and handle.train_only and all(m.training for m in model.modules())


def plain_and_scaled(name, reference, **changes):
    """Loss and gradients with the skipper of a step, and those of the plain model that ``reference`` has changed."""
    model = made(name)
    batch = batch_of(name, model)
    plain = gradients(model, batch)
    handle = attach(model, skipper=SCALED.model_copy(update=changes))
    handle.step(STEP, 0.1)
    assert any(handle.skipped) == (handle.skipper.alpha > 0) and not all(handle.skipped)
    found = gradients(model, batch)
    with torch.no_grad():
        evaluated = model.eval()(**batch).loss
        handle.detach()
        assert torch.equal(model(**batch).loss, evaluated)  # the plain model, exactly
    reference(model.train(), handle)
    return plain, found, gradients(model, batch)


def close(one, other):
    largest = max(gradient.abs().max() for gradient in other[1].values())
    assert one[1].keys() == other[1].keys() and torch.allclose(one[0], other[0], rtol=1e-6)
    return all((gradient - other[1][name]).abs().max() <= 1e-5 * largest for name, gradient in one[1].items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_runs_adds_the_inverse_of_its_density(name):
    """In each family as hooks on the plain model do it, forward and backward."""

    def reference(model, handle):
        chances = SCALED.probabilities(handle.parts.layers, 0.1)
        for layer, p, skipped in zip(handle.layers, chances, handle.skipped, strict=True):
            form = (lambda hidden: (hidden, None)) if returns_tuple(layer) else (lambda hidden: hidden)  # up to 5.3
            if skipped:
                layer.forward = lambda hidden, *_, form=form, **__: form(hidden)
                continue
            layer.register_forward_hook(
                lambda _, args, out, p=p, form=form: form(
                    args[0] + ((out[0] if isinstance(out, tuple) else out) - args[0]) / (1 - p)
                )
            )

    plain, found, wanted = plain_and_scaled(name, reference)
    assert close(found, wanted) and not torch.allclose(found[0], plain[0], rtol=1e-4)  # of other weights, 5e-4
    plain, found, wanted = plain_and_scaled(name, lambda *_: None, alpha=0.0)  # nothing to make up for
    assert same(found, plain) and same(wanted, plain)


def test_the_inverse_of_the_density_in_a_decoder_written_by_hand():
    """A Llama as the papers draw it: what attention and MLP of a layer add counts 1 / (1 - p) times."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    handle = attach(model, skipper=SCALED)
    handle.step(STEP, 0.1)
    ids = torch.randint(4, 60, (2, 9))
    found = gradients(model, {"input_ids": ids, "labels": ids})
    handle.detach()
    model.zero_grad()
    inner, positions = model.model, torch.arange(9)[None]
    x = inner.embed_tokens(ids)
    turned = inner.rotary_emb(x, positions)
    for layer, p, skipped in zip(inner.layers, SCALED.probabilities(4, 0.1), handle.skipped, strict=True):
        if not skipped:
            seen = layer.self_attn(layer.input_layernorm(x), position_embeddings=turned, attention_mask=None)[0]
            added = seen + layer.mlp(layer.post_attention_layernorm(x + seen))
            x = x + added / (1 - p)
    logits = model.lm_head(inner.norm(x))
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    wanted = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert close(found, wanted)


def test_layers_in_step_with_the_draw_and_a_step_of_all_layers():
    """Where all layers run for sure, none is scaled: at a dense end, and in a step at its largest."""
    model = made("llava, clip + llama")
    batch = batch_of("llava, clip + llama", model)
    plain = gradients(model, batch)
    ended = SCALED.model_copy(update={"dense_last": 0.5, "layers": "alternating", "alpha": 0.3})
    handle = attach(model, skipper=ended)
    handle.step(9, 0.5)
    assert same(gradients(model, batch), plain)
    for step in range(20):
        handle.step(step, 0.0)
        assert not any(one and other for one, other in pairwise(handle.skipped))
    assert not torch.equal(gradients(model, batch)[0], plain[0])
    handle.at_its_largest()
    assert same(gradients(model, batch), plain)


def test_a_dense_end_is_no_idleness(recwarn):
    model = made("llava, clip + llama")
    handle = attach(model, skipper=SCALED.model_copy(update={"dense_last": 0.5}))
    handle.step(9, 0.5)
    batch = batch_of("llava, clip + llama", model)
    for _ in range(55):
        model(**batch)
    assert [w for w in recwarn if w.category is NoEffectWarning] == []


def test_a_probe_without_a_loss_is_refused():
    model = made("llava, clip + llama")
    batch = batch_of("llava, clip + llama", model)
    del batch["labels"]
    handle = attach(model, QUARTER)
    handle.step(0, 0.0)
    model(**batch)
    with pytest.raises(ValueError, match="the trainer gives LlavaForConditionalGeneration no labels"):
        handle.dense_probe()


def test_a_layer_that_is_off_is_not_updated():
    """No gradient, no weight decay, no decay of moments: with AdamW, state and weights stay bit by bit, also where a
    loop leaves gradients of zero instead of none."""
    model = made("llava, clip + llama")
    batch = batch_of("llava, clip + llama", model)
    handle = attach(model, skipper=HALF_OFF)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    layer = handle.layers[1]

    def step(off, clear=True):
        handle.set_skipped((False, off, False, False))
        model(**batch).loss.backward()
        if clear:
            handle.clear_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        state = [optimizer.state[p] for p in layer.parameters()]
        return [t.clone() for p, s in zip(layer.parameters(), state, strict=True) for t in (p, *s.values())]

    first, second, third = step(False), step(True), step(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    fourth = step(True, clear=False)  # so the test can fail
    assert not any(torch.equal(a, b) for a, b in zip(third, fourth, strict=True))


def test_no_effect_is_told():
    model = made("llava, clip + llama")
    attach(model, QUARTER, SkipperConfig(alpha=0.0, epsilon=0.0)).step(0, 0.0)
    text = {"input_ids": torch.full((1, 4), 9), "labels": torch.full((1, 4), 9)}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NoEffectWarning)
        for _ in range(60):
            model(**text)
    messages = sorted(str(w.message) for w in told if w.category is NoEffectWarning)
    assert [m.split(":")[0] for m in messages] == [
        "the compressor had no effect in 50 passes",
        "the skipper had no effect in 50 passes",
    ]


def test_the_dry_run_touches_nothing():
    model = made("llava, clip + llama")
    before = copy.copy(model.__dict__)
    parts = find_parts(model)
    assert (parts.decoder, parts.layers, parts.head) == ("model.language_model", 4, "lm_head")
    assert parts.visual_token_ids == (IMAGE,) and model.__dict__ == before
    assert "model.language_model, 4 layers" in str(parts) and "model.vision_tower" in str(parts)
    assert "none: only a skipper" in str(find_parts(LlamaForCausalLM(LlamaConfig(**TEXT))))


def test_what_cannot_be_attached():
    model = made("llava, clip + llama")
    with pytest.raises(ValueError, match=r"protected layers 3 \+ 2: the model has 4"):
        attach(model, skipper=SkipperConfig(protected=(3, 2)))
    with pytest.raises(ValueError, match="importance has 2 values, but the model has 4 layers"):
        attach(model, skipper=SkipperConfig(importance=(1.0, 2.0)))
    with pytest.raises(ValueError, match="compressor: expected a CompressorConfig, found SkipperConfig"):
        attach(model, SkipperConfig(), SkipperConfig())
    with pytest.raises(ValueError, match=r"write attach\(model, skipper=SkipperConfig\(...\)\)"):
        attach(model, skipper=0.25)
    attach(model, QUARTER)
    with pytest.raises(ValueError, match="has something attached already"):
        attach(model, QUARTER)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no vision tower"):
        attach(LlamaForCausalLM(LlamaConfig(**TEXT)), QUARTER)
    with pytest.raises(ValueError, match="Linear: expected a model of transformers"):
        attach(nn.Linear(2, 2), QUARTER)
    with pytest.raises(ValueError, match="keep"):
        CompressorConfig(keep=0.0)
    with pytest.raises(ValueError, match="alpha 0.9, epsilon 0.3"):
        SkipperConfig(alpha=0.9, epsilon=0.3)


def test_detach_after_the_model_was_wrapped_is_refused():
    model = made("llava, clip + llama")
    handle = attach(model, QUARTER)
    layer = model.get_decoder().layers[0]
    ours = layer.forward
    layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="was wrapped since"):
        handle.detach()
