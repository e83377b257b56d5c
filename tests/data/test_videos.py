"""Rows with videos: each is its frames as images, as files or decoded; what cannot be read is told."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.data.cache import build_cache, image_rows
from sparsight.data.collate import Collator, TrainingSet
from sparsight.data.conversations import read_row
from sparsight.data.sources import ConversationSource, MixtureSource, ShardSource, TableSource
from sparsight.data.videos import Frame, load_frame, size_of_video
from sparsight.settings.data import ConversationData, MixtureData

SAYS = {"role": "assistant", "content": "A dog."}
ASK = {"type": "text", "text": "What?"}


def frames_made(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (count, 6, 8, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((64, 48)) for each in small]


def write_video(path: Path, frames: int = 20, codec: str = "libx264", **options: str) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 7
        for image in frames_made(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> list[np.ndarray]:
    """Every frame, decoded from the first to the last."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_image()) for frame in container.decode(video=0)]


def opened(folder: Path, *rows: dict[str, Any], **settings: Any) -> ConversationSource:
    (folder / "data.json").write_text(json.dumps(rows))
    return ConversationSource(ConversationData(path=str(folder / "data.json"), **settings))


def asked(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, SAYS]}


def llava(question: str, **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]} | fields


def forms(video: Any) -> dict[str, dict[str, Any]]:
    return {
        "LLaVA": llava("<video>\nWhat?", video=video),
        "LLaVA-Video, whose tag is <image>": llava("<image>\nWhat?", video=video),
        "a video that no turn mentions": llava("What?", video=video),
        "ms-swift": {"query": "<video>What?", "response": "A dog.", "videos": [video]},
        "a part": asked({"type": "video", "video": video}, ASK),
        "a part of OpenAI": asked({"type": "video_url", "video_url": video}, ASK),
        "a part without a type": asked({"video": video}, ASK),
        "a part of an Arrow table": asked({"type": "video", "video": video, "text": None}, ASK | {"video": None}),
        "a tag and a list": {"messages": [{"role": "user", "content": "<video>What?"}, SAYS], "videos": [video]},
    }


@pytest.mark.parametrize("form", forms(""))
def test_a_video_is_its_frames_as_images(form: str) -> None:
    """Frames as files, and a video file, in each form."""
    names = [f"{number}.png" for number in range(16)]
    found = read_row(forms(names)[form], "0", "row 0", frames=4)
    same = read_row(asked(*[{"type": "image", "image": names[n]} for n in (2, 6, 10, 14)], ASK), "0", "row 0")
    assert found == same
    decoded = read_row(forms("a.mp4")[form], "0", "row 0", frames=4)
    assert decoded.messages == same.messages
    assert decoded.images == tuple(Frame("a.mp4", number, 4) for number in range(4))


def test_few_frames_are_all_shown() -> None:
    assert read_row(forms(["a.png", "b.png"])["LLaVA"], "0", "row 0").images == ("a.png", "b.png")


def test_images_and_videos_keep_their_order() -> None:
    row = llava("<video>\nthen <image> and <video>?", image="a.png", videos=[["0.png", "1.png"], ["2.png", "3.png"]])
    found = read_row(row, "0", "row 0")
    assert found.images == ("0.png", "1.png", "a.png", "2.png", "3.png")
    assert [part.get("text", "-") for part in found.messages[0]["content"]] == [
        "-", "-", "then ", "-", " and ", "-", "-", "?"
    ]  # fmt: skip


def test_what_shards_cannot_hold_is_refused(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        content = json.dumps(llava("<video>\nWhat?", video="k.mp4")).encode()
        member = tarfile.TarInfo("k.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    source = ShardSource(ConversationData(kind="shards", path=str(tmp_path / "a.tar")))
    with pytest.raises(ValueError, match=r"a\.tar, sample 'k' .*videos in shards are not read; write rows"):
        source[0]


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264")]
)
@pytest.mark.parametrize("count", [1, 5, 30])
def test_decoded_frames_are_those_of_the_whole(tmp_path: Path, name: str, codec: str, count: int) -> None:
    """By seeking, also with frames that refer to later ones; from a file and from its bytes; more than there are."""
    path = write_video(tmp_path / name, codec=codec, **({"bf": "2"} if codec == "libx264" else {}))
    whole = all_frames(path)
    assert len(whole) == 20
    wanted = [whole[(2 * number + 1) * 20 // (2 * count)] for number in range(count)]
    for source in (path, path.read_bytes()):
        found = [load_frame(source, name, Frame(name, number, count)) for number in range(count)]
        assert all(np.array_equal(np.asarray(one), other) for one, other in zip(found, wanted, strict=True))
        assert size_of_video(source, name) == (64, 48) == found[0].size


def test_a_file_that_changed_is_read_anew_and_images_are_the_callers_own(tmp_path: Path) -> None:
    path, frame = write_video(tmp_path / "a.mp4"), Frame("a.mp4", 0, 1)
    first = load_frame(path, "a", frame)
    first.thumbnail((8, 8))  # in place, as the contact sheet does
    assert load_frame(path, "a", frame).size == (64, 48)
    write_video(path, frames=1)
    assert np.array_equal(np.asarray(load_frame(path, "a", frame)), all_frames(path)[0])


def test_a_video_is_turned_as_it_says(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    plain = load_frame(path, "a", Frame("a.mp4", 0, 1))
    one, back = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    upright = b"".join([one, bytes(12), one, bytes(12), (1 << 30).to_bytes(4, "big")])
    turned = b"".join([bytes(4), one, bytes(4), back, bytes(16), (1 << 30).to_bytes(4, "big")])
    content = path.read_bytes()
    at = content.rindex(upright)  # the track's; the film's own stands before it
    content = content[:at] + turned + content[at + len(turned) :]
    found = load_frame(content, "a", Frame("a.mp4", 0, 1))
    assert found.size == (48, 64)  # a quarter to the right, as a telephone held upright writes it
    assert np.array_equal(np.asarray(found), np.asarray(plain.rotate(-90, expand=True)))


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "image", "playlist"])
def test_what_cannot_be_decoded_is_told_with_its_name(tmp_path: Path, fault: str) -> None:
    whole = write_video(tmp_path / "whole.ts")
    content = {
        "empty": b"",
        "cut": write_video(tmp_path / "b.mp4").read_bytes()[:600],
        "image": b"no video",
        "playlist": PLAYLIST.format(other=whole).encode(),  # would have another file opened
    }
    path = tmp_path / ("a.m3u8" if fault == "playlist" else "a.mp4")
    if fault in content:
        path.write_bytes(content[fault])
    said = "there is no such file" if fault == "missing" else "cannot be read as a video"
    with pytest.raises(ValueError, match=rf"{path.name}: {said}"):
        load_frame(path, str(path), Frame("a.mp4", 0, 2))
    if fault == "missing":
        with pytest.raises(ValueError, match=r"row 0 \(id 0\): .*a\.mp4: there is no such file \(1 of 1 files"):
            opened(tmp_path, llava("<video>What?", video="a.mp4"))


def test_without_the_package_rows_say_so_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    frames_made(1)[0].save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"data\.json, row 0 \(id 0\): videos .* package av.*'sparsight\[video\]'"):
        opened(tmp_path, llava("<video>What?", video="a.mp4"))
    assert opened(tmp_path, llava("<video>What?", video=["a.png"]))[0].images == ("a.png",)


def test_video_rows_are_batches_of_their_frames(tmp_path: Path, tiny_vlm: Any) -> None:
    """A decoded video, its bytes in a table, and a mixture give what its frames as images give: ids, labels, pixels,
    sizes, and features of the cache, whose fingerprints tell the frames apart."""
    path = write_video(tmp_path / "a.mp4")
    wanted = [(2 * number + 1) * 20 // 6 for number in range(3)]
    for number in wanted:
        Image.fromarray(all_frames(path)[number]).save(tmp_path / f"{number}.png")
    rows = [llava("What?", id="t"), llava("<video>\nWhat?", id="v", video="a.mp4")]
    video = opened(tmp_path, *rows, video_frames=3)
    images = [{"type": "image", "image": f"{number}.png"} for number in wanted]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "data.json").write_text(json.dumps([rows[0], asked(*images, ASK) | {"id": "v"}]))
    still = ConversationSource(ConversationData(path=str(tmp_path / "images" / "data.json"), images=str(tmp_path)))
    datasets.Dataset.from_list(
        [row | {"video": {"bytes": path.read_bytes(), "path": None} if row["id"] == "v" else None} for row in rows]
    ).save_to_disk(tmp_path / "table")
    table = TableSource(ConversationData(kind="datasets", path=str(tmp_path / "table"), video_frames=3))
    part: Any = {"data": {"kind": "json", "path": str(tmp_path / "data.json"), "video_frames": 3}}
    mixture = MixtureSource(MixtureData.model_validate({"parts": [part]}), 2)
    model, processor = tiny_vlm()
    collate = Collator(processor.tokenizer.pad_token_id, image_token_id=processor.image_token_id)

    def batch(source: Any) -> dict[str, Any]:
        data = TrainingSet(source, processor, 2)
        sizes = data.sizes(tmp_path / f"{type(source).__name__}{id(source)}.npy")
        return collate([data[0], data[1]]) | {"sizes": torch.from_numpy(sizes)}

    right = batch(still)
    assert right["info"]["images"] == 3 and right["sizes"][1, 1] == 3
    for source in (video, table, mixture):
        found = batch(source)
        assert {key: value for key, value in found["info"].items() if key != "ids"} == {
            key: value for key, value in right["info"].items() if key != "ids"
        }
        tensors = [key for key, value in right.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(found[key], right[key]) for key in tensors)

    def encode(keys: Any) -> Any:
        return model.model.encode_images(**processor.pixels([video.image(key) for key in keys]))

    cache = build_cache(tmp_path / "cache", image_rows(video.fingerprints())[0], encode)
    features, plain = cache.read(video[1].images), encode(video[1].images)
    assert len(cache.rows) == 3 == len(set(cache.rows.values()))
    assert all(torch.equal(one, other.to(torch.bfloat16)) for one, other in zip(features, plain, strict=True))


def test_a_video_that_cannot_be_decoded_is_a_bad_sample(tmp_path: Path, tiny_vlm: Any) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    source = opened(tmp_path, *[llava("<video>\nWhat?", id=name, video=f"{name}.mp4") for name in "ab"])
    _, processor = tiny_vlm()
    with pytest.raises(ValueError, match=r"sample 'b': .*b\.mp4: cannot be read as a video.* on_bad_sample=quarantine"):
        TrainingSet(source, processor, 2)[1]
    item = TrainingSet(source, processor, 2, replace_bad=True)[1]
    assert item["id"] == "a" and {bad["id"] for bad in item["replaced"]} == {"b"}
    assert len(item["pixels"]["pixel_values"]) == 8
