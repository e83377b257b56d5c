"""ms-swift's plugin: settings, refusals, and batches whose images a hook of the trainer has embedded."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from families import batch_of, made

from sparsight.errors import UserError
from sparsight.integrations import ms_swift
from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.executed import figures


@pytest.mark.parametrize("settings", ['{"compressor": {"keep": 0.5}}', "{'compressor': {'keep': 0.5}}"])
def test_settings_come_from_the_environment(monkeypatch, settings):
    # The second form: ms-swift writes `--model_kwargs` there as Python shows a dict.
    monkeypatch.setenv(ms_swift.VARIABLE, settings)
    assert ms_swift.make_callback(None, None).methods.compressor == CompressorConfig(keep=0.5)


def test_no_settings_or_wrong_ones_are_refused(monkeypatch):
    monkeypatch.delenv(ms_swift.VARIABLE, raising=False)
    with pytest.raises(UserError, match="no settings in the environment variable SPARSIGHT"):
        ms_swift.make_callback(None, None)
    monkeypatch.setenv(ms_swift.VARIABLE, "{compressor: {kepe: 0.5}}")
    with pytest.raises(UserError, match="did you mean 'keep'"):
        ms_swift.make_callback(None, None)


def test_sequences_cut_over_ranks_are_refused(monkeypatch):
    monkeypatch.setenv(ms_swift.VARIABLE, "{compressor: {keep: 0.5}}")
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=2))
    with pytest.raises(UserError, match="--sequence_parallel_size 2"):
        ms_swift.make_callback(None, trainer)


def test_the_module_prints_its_file(fresh):
    done = fresh.run("import forked; forked.module()", ms_swift.__name__, check=True)
    assert done.stdout.strip() == ms_swift.__file__


@pytest.mark.skipif(importlib.util.find_spec("swift") is None, reason="ms-swift is not installed")
def test_the_trainer_finds_it():
    from swift.callbacks import callbacks_map

    ms_swift.register()
    assert callbacks_map["sparsight"] is ms_swift.make_callback


@pytest.mark.parametrize("first", ["attached", "hooked"])
def test_embeddings_made_by_a_hook_are_compressed_as_those_made_by_the_model(first):
    """ms-swift's templates of Qwen2-VL and others embed in a pre-hook, and take ids and images away."""
    model = made("qwen2_vl")
    batch = batch_of("qwen2_vl", model)
    batch["position_ids"] = (
        model.model.compute_3d_position_ids(
            **{key: batch[key] for key in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")},
            inputs_embeds=None,
        )
        if hasattr(model.model, "compute_3d_position_ids")
        else None
    )
    plain = attach(model, CompressorConfig(keep=0.25))
    expected = model(**batch).loss
    reference = figures(plain, plain.take_passes())
    plain.detach()

    def embed(_, args, kwargs):
        given = dict(kwargs)
        ids, grid = given.pop("input_ids"), given.pop("image_grid_thw")
        features = torch.cat(list(model.model.visual(given.pop("pixel_values"), grid_thw=grid).pooler_output[None]))
        embeds = model.get_input_embeddings()(ids)
        mask = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
        return args, given | {"inputs_embeds": embeds.masked_scatter(mask, features)}

    methods = CompressorConfig(keep=0.25)
    if first == "attached":
        handle = attach(model, methods)
    hooked = model.register_forward_pre_hook(embed, with_kwargs=True)
    if first == "hooked":
        handle = attach(model, methods)
    found = model(**batch).loss
    assert torch.equal(found, expected)
    assert figures(handle, handle.take_passes()) == reference
    assert reference["visual_tokens_out"] < reference["visual_tokens_in"]
    assert set(handle.dense_probe()) == {"loss_dense", "loss_sparse"}
    hooked.remove()
