"""Packed samples stay apart when tokens are dropped."""

from types import SimpleNamespace

import pytest
import torch
from families import batch_of, made

from sparsight.settings.methods import CompressorConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.gather import Kept, gather_inputs

NAME = "llava, clip + llama"


def packed(samples):
    """One row of several samples, as transformers takes it: places start anew, and there is no mask."""
    row = {key: torch.cat([sample[key] for sample in samples], 1) for key in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    images = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    return row | {"pixel_values": torch.cat(images)}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("method", ["uniform", "similarity", "merge", "text"])
def test_a_packed_row_gives_what_its_samples_give_alone(backend, positions, method):
    model = made(NAME)
    model.set_attn_implementation(backend)
    attach(model, CompressorConfig(keep=0.4, method=method, positions=positions))
    samples = [batch_of(NAME, model, (images,), seed=images) for images in (1, 2, 0, 3)]
    rows = [packed(samples[:2]), packed(samples[2:])]
    found = [model(**row, use_cache=False).logits[0] for row in rows]
    alone = [model(**sample, use_cache=False).logits[0] for sample in samples]
    for row, pair in zip(found, (alone[:2], alone[2:]), strict=True):
        assert (row - torch.cat(pair)).abs().max() <= 1e-4 * row.abs().max()
    # And two packed rows in one batch, of which one keeps more.
    longest = max(row["input_ids"].shape[1] for row in rows)
    wide = {
        key: torch.cat([torch.nn.functional.pad(row[key], (0, longest - row[key].shape[1])) for row in rows])
        for key in ("input_ids", "labels", "position_ids")
    }
    pixels = torch.cat([row["pixel_values"] for row in rows])
    both = model(**wide, pixel_values=pixels, use_cache=False).logits
    for row, other in zip(found, both, strict=True):
        assert (row - other[: len(row)]).abs().max() <= 1e-4 * row.abs().max()


def gathered(inputs, keep_T, backend="flash_attention_2", **config):
    keep_BT = torch.tensor([keep_T], dtype=torch.bool)
    inputs = {"inputs_embeds": torch.zeros(1, len(keep_T), 4)} | inputs
    config = SimpleNamespace(_attn_implementation=backend, **config)
    return gather_inputs(inputs, Kept.of(keep_BT), keep_BT, False, config)


@pytest.mark.parametrize("told", ["places", "boundaries"])
def test_boundaries_of_variable_length_attention(told):
    """Samples of 3, 4 and 2 positions, of which 2, 1 and 2 stay; the first place of the second one is dropped."""
    keep = [1, 0, 1, 0, 0, 0, 1, 1, 1]
    edges = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    given = {"position_ids": places}
    if told == "boundaries":
        given |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 4, "max_length_k": 4}
    cut = gathered(given, keep)
    for side in ("q", "k"):
        assert cut[f"cu_seq_lens_{side}"].tolist() == [0, 2, 3, 5] and cut[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert cut[f"max_length_{side}"] == 4  # at most
    assert cut["attention_mask"] is None and cut["position_ids"].tolist() == [[0, 2, 3, 0, 1]]


def test_what_cannot_be_cut():
    places = {"position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="under attention 'flex_attention'"):
        gathered(places, [1, 1, 0, 1], "flex_attention")
    with pytest.raises(ValueError, match="with a sliding window of 2"):
        gathered(places, [1, 1, 0, 1], "sdpa", sliding_window=2)
    keep_BT = torch.ones(2, 4, dtype=torch.bool)
    two = {"inputs_embeds": torch.zeros(2, 4, 4), "position_ids": places["position_ids"].expand(2, -1)}
    with pytest.raises(ValueError, match="packed samples in 2 rows under flash_attention_2: expected one row"):
        gather_inputs(two, Kept.of(keep_BT), keep_BT, False, SimpleNamespace(_attn_implementation="flash_attention_2"))
    with pytest.raises(ValueError, match="attention mask of type str"):
        gathered({"attention_mask": "causal"}, [1, 1, 0, 1])
