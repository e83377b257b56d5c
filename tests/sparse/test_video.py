"""Visual tokens of videos: the grid of their frames, compressed in space and time, against masked references."""

import numpy as np
import pytest
import torch
from families import IMAGE, PATCH, SIDE, WORDS, batch_of, made, masked_reference
from test_attach import gradients, same

from sparsight.settings.methods import CompressorConfig, SkipperConfig
from sparsight.sparse.attach import attach
from sparsight.sparse.compress import compress, redundancy
from sparsight.sparse.executed import figures
from sparsight.sparse.visual import Run, runs

VIDEO, FRAMES = WORDS + 3, 4
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*QWEN, "llava_onevision", "llava_next_video", "internvl", "smolvlm")


def shown(name, frames=FRAMES):
    """Ids that stand for a video."""
    if name == "qwen3_vl":  # a time and marks around each frame
        return [id for _ in range(frames) for id in (6, WORDS + 2, *[VIDEO] * 4, WORDS + 1)]
    if name in ("internvl", "smolvlm"):  # frames are images, with words between
        return [id for _ in range(frames) for id in (6, *[IMAGE] * 4)]
    return [VIDEO] * (frames * 4 + (name == "llava_onevision"))


def mixed(name, model):
    """Three samples: an image and two videos, a video, and text alone."""
    generator = torch.Generator().manual_seed(0)
    still = batch_of(name, model, (1,))
    image = [IMAGE] * int((still["input_ids"] == IMAGE).sum())
    rows = [
        [5, *image, 7, *shown(name), 8, *shown(name), 9, 10, 11],
        [5, 6, *shown(name), 12, 13],
        [14, 15, 16, 17],
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids < 7, -100)}
    batch["labels"] = batch["labels"].masked_fill(ids >= WORDS, -100)
    batch |= {key: still[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in still}
    if name in QWEN:
        side = SIDE // PATCH
        batch["video_grid_thw"] = torch.tensor([[FRAMES, side, side]] * 3)
        batch["pixel_values_videos"] = torch.randn(3 * FRAMES * side**2, 6 * PATCH**2, generator=generator)
        batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        return batch
    pixels = torch.randn(3, FRAMES, 3, SIDE, SIDE, generator=generator)
    if name in ("internvl", "smolvlm"):
        both = torch.cat([still["pixel_values"].view(1, 3, SIDE, SIDE), pixels.flatten(0, 1)])
        if name == "internvl":
            return batch | {"pixel_values": both}
        rows_of_images = torch.zeros(3, 2 * FRAMES + 1, 3, SIDE, SIDE)
        rows_of_images[0], rows_of_images[1, :FRAMES] = both[: 2 * FRAMES + 1], both[2 * FRAMES + 1 :]
        return batch | {"pixel_values": rows_of_images}
    return batch | {"pixel_values_videos": pixels}


@pytest.mark.parametrize("method", ["uniform", "pool", "similarity"])
@pytest.mark.parametrize("name", FAMILIES)
def test_videos_images_and_text_are_as_if_dropped_tokens_were_hidden(name, method, monkeypatch):
    model = made(name).eval()
    short, full, keep = masked_reference(model, mixed(name, model), method, monkeypatch)
    assert (short - full)[keep].abs().max() <= 1e-5 * full[keep].abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_with_keep_1_videos_are_the_plain_models_bit_by_bit(name):
    model = made(name)
    batch = mixed(name, model)
    plain = gradients(model, batch)
    handle = attach(model, CompressorConfig(keep=1.0), SkipperConfig(alpha=0.0, epsilon=0.0))
    assert same(gradients(model, batch), plain)
    handle.detach()
    assert same(gradients(model, batch), plain)


IMAGES = {name: [(1, (1, 36))] for name in ("llava_onevision", "llava_next_video")}  # tiles: along the sequence
VIDEOS = {name: [(3, (FRAMES, 2, 2))] for name in FAMILIES} | {
    "qwen3_vl": [(3 * FRAMES, (2, 2))],
    "internvl": [(3 * FRAMES, (2, 2))],
    "smolvlm": [(3 * FRAMES, (2, 2))],
    "llava_onevision": [(3, (1, 1)), (3, (FRAMES, 2, 2))],  # what ends the line behind a video
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_frame_has_its_rows_and_columns_and_its_pixels_are_counted(name, monkeypatch):
    model = made(name)
    batch = mixed(name, model)
    seen, done, found = grids_of(model, batch, monkeypatch)
    wanted = sorted([*IMAGES.get(name, [(1, (2, 2))]), *VIDEOS[name]])
    if wanted[0][1] == wanted[1][1]:  # images and frames are compressed together
        wanted = [(sum(count for count, _ in wanted), (2, 2))]
    assert seen == wanted
    keys = {"image": "pixel_values", "video": "pixel_values_videos"}
    assert done.pixels == {kind: batch[key].numel() for kind, key in keys.items() if key in batch}
    assert found["flops"] > found["language_flops"]


@pytest.mark.parametrize("method, works", [("pool", False), ("similarity", False), ("uniform", True), ("merge", True)])
def test_a_video_whose_grid_is_not_known_is_refused_by_methods_that_go_by_it(method, works, monkeypatch):
    model = made("llava_next_video")
    batch = mixed("llava_next_video", model)
    attach(model, CompressorConfig(keep=0.5, method=method))
    monkeypatch.setattr("sparsight.sparse.visual.isqrt", lambda _: 3)  # not the grid that the tokens have
    if works:
        assert model(**batch).loss.isfinite()
    else:
        with pytest.raises(ValueError, match=f"rows and columns of a video's frames are not known, .* '{method}'"):
            model(**batch)


def test_similarity_drops_what_the_frame_before_says():
    x = torch.randn(2, 4, 4, 8)  # two videos of four frames of 2 x 2
    x[0, 1:] = x[0, :1]  # the first stands still
    x[0, 3, 2] += 5.0  # but for one patch at its end
    _, index = compress(x.flatten(1, 2), 5 / 16, "similarity", grid=(4, 2, 2))
    assert index[0].tolist() == [0, 1, 2, 3, 14]
    spaced = torch.cat([redundancy(frame, (2, 2)) for frame in x.unbind(1)], 1)
    before = torch.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1).flatten(1)
    wanted = torch.cat([spaced[:, :4], spaced[:, 4:].maximum(before)], 1)
    assert torch.allclose(redundancy(x.flatten(1, 2), (4, 2, 2)), wanted, atol=1e-6)
    # Frames that stand apart, one after the other, say the same; the second video does not follow the first.
    follows = [number > 0 for _ in range(2) for number in range(4)]
    apart = redundancy(x.flatten(0, 1), (2, 2), follows)
    assert torch.allclose(apart.view(2, 16), wanted, atol=1e-6)


def test_similarity_knows_the_frame_before_where_something_stands_between(monkeypatch):
    model = made("qwen3_vl")
    seen = []

    def spy(tokens_IND, keep, method, follows, **options):
        seen.append(follows)
        return compress(tokens_IND, keep, method, follows=follows, **options)

    monkeypatch.setattr("sparsight.sparse.compress.compress", spy)
    attach(model, CompressorConfig(keep=0.5, method="similarity"))
    model(**mixed("qwen3_vl", model))
    video = [False, *[True] * (FRAMES - 1)]
    assert seen == [[False, *video, *video, *video]]  # the image stands first


def videos(name, frames=4, side=4):
    """A sample with one video of so many frames (after temporal patches) of side x side patches, and some words."""
    model = made(name)
    count = frames * (side // 2) ** 2
    row = [5, 6, *[VIDEO] * count, 7, 8, 9]
    ids = torch.tensor([row])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(frames * side * side, 3 * 2 * 8 * 8, generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == VIDEO, -100),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[frames, side, side]]),
        "mm_token_type_ids": 2 * (ids == VIDEO).long(),
    }
    return model, batch


def grids_of(model, batch, monkeypatch):
    seen = []

    def spy(tokens_IND, keep, method, grid, **options):
        seen.append((len(tokens_IND), grid))
        return compress(tokens_IND, keep, method, grid=grid, **options)

    monkeypatch.setattr("sparsight.sparse.compress.compress", spy)
    handle = attach(model, CompressorConfig(keep=0.5, method="pool"))
    model(**batch)
    (done,) = handle.take_passes()
    found = figures(handle, [done])
    handle.detach()
    return sorted(seen), done, found


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_F35_a_video_has_the_grid_that_the_model_was_given(name, monkeypatch):
    model, batch = videos(name)
    seen, done, found = grids_of(model, batch, monkeypatch)
    assert seen == [(1, (4, 2, 2))]
    assert done.pixels == {"video": batch["pixel_values_videos"].numel()}
    assert found["flops"] > found["language_flops"]


def test_F35_frames_between_which_something_stands_are_compressed_one_by_one(monkeypatch):
    model, batch = videos("qwen3_vl", frames=2)
    ids = torch.tensor([[5, WORDS + 2, *[VIDEO] * 4, WORDS + 1, 6, WORDS + 2, *[VIDEO] * 4, WORDS + 1, 7, 8]])
    batch |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids >= WORDS, -100),
        "mm_token_type_ids": 2 * (ids == VIDEO).long(),
    }
    seen, done, _ = grids_of(model, batch, monkeypatch)
    assert seen == [(2, (2, 2))] and done.pixels == {"video": batch["pixel_values_videos"].numel()}


def test_F35_images_beside_videos_keep_their_own(monkeypatch):
    model, batch = videos("qwen2_5_vl")
    images = batch_of("qwen2_5_vl", model, (1,))
    for key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
        batch[key] = torch.cat([batch[key], images[key], batch[key][:, -2:]], 1)
    batch |= {key: images[key] for key in ("pixel_values", "image_grid_thw")}
    seen, done, found = grids_of(model, batch, monkeypatch)
    assert seen == [(1, (2, 2)), (1, (4, 2, 2))]
    assert done.pixels == {"image": images["pixel_values"].numel(), "video": batch["pixel_values_videos"].numel()}
    assert found["flops"] > found["language_flops"]


def test_F35_no_grid_is_taken_for_granted_of_videos():
    """16 tokens of a video whose grid is not known are no square; those of an image are."""
    positions_M2 = np.array([(row, position) for row in (0, 1) for position in range(16)])
    config = made("llava, clip + llama").config
    found = runs(positions_M2, positions_M2[:, 0] == 1, {"image": [16], "video": [16]}, {}, config, on_grid=True)
    assert found == [Run(0, 16, (4, 4)), Run(16, 16, None)]


def test_F35_pool_does_not_mix_frames():
    x = torch.eye(16)[None]
    kept, _ = compress(x, 0.5, "pool", grid=(4, 2, 2))
    frames_K = (kept[0].unflatten(1, (4, 4)) > 0).any(2).sum(1)
    assert frames_K.tolist() == [1] * 8
    few, _ = compress(x, 2 / 16, "pool", grid=(4, 2, 2))  # fewer than frames: here it is meant
    assert (few[0].unflatten(1, (4, 4)) > 0).any(2).tolist() == [[True, True, False, False], [False, False, True, True]]
