"""Tar shards: what is read, what is said about each fault, and indices that fit, or are built anew."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import resource
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from shards import conversation, make_image, samples, write_tar
from sparsight.data.shards import build_index, stem
from sparsight.data.sources import ShardSource
from sparsight.settings.data import ConversationData


def opened(path: Path, index_folder: Path | None = None) -> ShardSource:
    folder = str(index_folder) if index_folder else None
    return ShardSource(ConversationData(kind="shards", path=str(path), index_folder=folder))


def numbers(source: ShardSource, indices: range) -> list[tuple[int, int]]:
    """What answers and colours say, which must agree."""
    found = []
    for index in indices:
        sample = source[index]
        red, green, _ = source.image(sample.images[0]).getpixel((0, 0))
        found.append((int(sample.messages[1]["content"][0]["text"]), red + 256 * green))
    return found


# ---------------------------------------------------------------------------------------- what is read


def test_samples_of_all_shards_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 3))
    write_tar(tmp_path / "b.tar", samples(3, 1))
    write_tar(tmp_path / "c.tar", samples(4, 5))
    source = opened(tmp_path)
    assert len(source) == 9
    assert numbers(source, range(9)) == [(number, number) for number in range(9)]
    assert source[4].id == "000004" and len(list(source)) == 9
    assert len(source.fingerprints()) == 9
    assert len(opened(tmp_path / "[ab].tar")) == 4 and len(opened(tmp_path / "b.tar")) == 1


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_long_and_foreign_in_every_format_of_tar(tmp_path: Path, form: int) -> None:
    long = "a" * 60 + "/" + "b" * 90 if form == tarfile.USTAR_FORMAT else "a" * 150 + "/" + "b" * 150
    foreign = "\u72ac\U0001f415" if form != tarfile.USTAR_FORMAT else "dog"
    members = [("./x/1.json", conversation()), ("./x/1.png", make_image())]
    for key in (long, foreign):
        members += [(f"{key}.json", conversation()), (f"{key}.png", make_image())]
    source = opened(write_tar(tmp_path / "a.tar", members, form))
    assert [source[index].id for index in range(3)] == ["x/1", long, foreign]
    key = source[1].images[0]
    assert source.image(key).size == source.size(key) == (8, 8)


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members = samples(0, 4)
    source = opened(write_tar(tmp_path / "a.tar", members[::2] + members[1::2]))
    assert numbers(source, range(4)) == [(number, number) for number in range(4)]


def colours(source: ShardSource, index: int = 0) -> list[tuple[int, ...]]:
    return [source.image(key).getpixel((0, 0)) for key in source[index].images]


def test_several_images_go_by_number_or_by_the_names_that_the_row_gives(tmp_path: Path) -> None:
    two = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "No."}]
    red, blue = ("k.2.png", make_image("red")), ("k.10.png", make_image("blue"))
    ordered, turned = [(255, 0, 0), (0, 0, 255)], [(0, 0, 255), (255, 0, 0)]
    cases = {"none": None, "here": ["k.10.png", "k.2.png"], "elsewhere": ["train/1.jpg", "train/2.jpg"]}
    for case, names in cases.items():
        text = conversation(conversations=two, **({"image": names} if names else {}))
        source = opened(write_tar(tmp_path / f"{case}.tar", [blue, red, ("k.json", text)]))
        assert colours(source) == (turned if case == "here" else ordered), case


def test_captions_text_alone_and_metadata_beside_a_caption(tmp_path: Path) -> None:
    silent = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    members = [("c.jpg", make_image(form="JPEG")), ("c.txt", b" A red square.\n"), ("c.json", b'{"url": "x"}')]
    members += [
        ("t.json", conversation(conversations=silent, id=7)),
        ("d.WEBP", make_image(form="WEBP")),
        ("d.txt", b"x"),
    ]
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert source[0].messages == [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
    ]
    assert (source[1].id, source[1].images) == ("7", ())
    assert source.image(source[2].images[0]).size == (8, 8)


@pytest.mark.parametrize("name, key", [("a/b.c/d.0.jpg", "a/b.c/d"), ("d.json", "d"), ("a/.d.jpg", ""), ("d", "d")])
def test_stem(name: str, key: str) -> None:
    assert stem(name) == key


# ---------------------------------------------------------------------------------------- faults

ROWS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "json": ([("k.json", b"{")], "TAR, offset 512, member 'k.json': not valid JSON: "),
    "coding": ([("k.json", b"\xff")], "TAR, offset 512, member 'k.json': expected text in UTF-8: "),
    "caption": (
        [("k.txt", b"\xff"), ("k.png", make_image())],
        "TAR, offset 512, member 'k.txt': expected text in UTF-8: ",
    ),
    "caption of nothing": (
        [("k.txt", b"x")],
        "TAR, sample 'k': expected one .txt and images beside it, found ['k.txt']",
    ),
    "caption empty": (
        [("k.txt", b" "), ("k.png", make_image())],
        "TAR, sample 'k' (id k), field 'messages': the assistant's turn is empty; expected text",
    ),
    "a dot too many": (  # in the names: three samples, and the first alone would be read
        [(f"k.{number}.json", conversation(image=None)) for number in range(3)],
        "TAR, sample 'k': 3 members .json hold conversations; what stands before the first dot of a name tells samples",
    ),
    "no conversation": (
        [("k.json", b'{"id": 4}')],
        "TAR, sample 'k' (id 4): expected 'conversations' (LLaVA) or 'messages', found the fields ['id']",
    ),
    "no image": (
        [("k.json", conversation())],
        "TAR, sample 'k' (id k), field 'conversations': the text has 1 <image>, but there are 0 images: []",
    ),
    "another image": (
        [("k.json", conversation(image=["k.1.png", "no.png"])), ("k.1.png", make_image()), ("k.2.png", make_image())],
        "TAR, sample 'k' (id k), field 'image': expected members of the sample, which are ['k.1.png', 'k.2.png'], "
        "found ['k.1.png', 'no.png']",
    ),
    "two of one name": (
        [("k.json", conversation()), ("k.png", make_image()), ("k.png", make_image())],
        "TAR, sample 'k': expected members of different names, found ['k.json', 'k.png', 'k.png']",
    ),
}


@pytest.mark.parametrize("fault", ROWS)
def test_a_wrong_sample_is_told_with_tar_and_sample(tmp_path: Path, fault: str) -> None:
    members, expected = ROWS[fault]
    tar = write_tar(tmp_path / "a.tar", members)
    source = opened(tar)
    with pytest.raises(ValueError) as caught:
        source[0]
    assert str(caught.value).startswith(expected.replace("TAR", str(tar)))


def test_a_broken_image_is_told_with_its_place(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("k.json", conversation()), ("k.png", make_image()[:40])])
    source = opened(tar)
    with pytest.raises(ValueError, match="a.tar, offset 1536, member 'k.png': cannot be read as an image"):
        source.image(source[0].images[0])


def test_a_sample_without_text_is_told_when_the_index_is_built(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [*samples(0, 1), ("k.png", make_image()), ("l.png", make_image())])
    with pytest.raises(ValueError) as caught:
        opened(tar)
    assert str(caught.value) == (
        f"{tar}, sample 'k': expected a member 'k.json' or 'k.txt', found images alone (2 of 3 samples are so)"
    )
    assert os.listdir(tmp_path) == ["a.tar"]


def test_members_of_no_use_are_counted(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [*samples(0, 2), ("0.cls", b"1"), ("1.cls", b"2"), ("._0.png", b"")])
    with pytest.warns(UserWarning, match=r"a.tar: 3 members are of no use here: \{'.cls': 2, '.png': 1\}"):
        assert len(opened(tar)) == 2


def test_what_is_no_tar_of_samples(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        archive.addfile(link)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.json"), io.BytesIO())
    write_tar(tmp_path / "none.tar", [])
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("hello" * 1000)
    expected = {
        "link": "offset 0: not a whole tar: expected files and folders, but 'a.png' is a link or a device",
        "packed": "offset 0: not a whole tar: ",
        "none": "no samples in it; expected members .json or .txt, with images beside them",
        "empty": "offset 0: not a whole tar: empty file",
        "text": "offset 0: not a whole tar: ",
    }
    for name, words in expected.items():
        with pytest.raises(ValueError) as caught:
            opened(tmp_path / f"{name}.tar")
        assert words in str(caught.value) and f"{name}.tar" in str(caught.value), name
    with pytest.raises(ValueError, match="gone/\\*.tar: found no files; expected a file, a folder of \\*.tar"):
        opened(tmp_path / "gone" / "*.tar")


@settings(max_examples=150)
@given(share=st.floats(0, 1, exclude_max=True), form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_a_tar_that_is_cut_is_told_wherever_the_cut_is(tmp_path_factory, share: float, form: int) -> None:
    """Samples that are lost must be told. What stands behind the last member (the end mark) is no loss."""
    folder = tmp_path_factory.mktemp("cut")
    members = [*samples(0, 2), ("\u72ac" * 60 + ".png", make_image()), ("\u72ac" * 60 + ".json", conversation())]
    tar = write_tar(folder / "a.tar", members, form)
    with tarfile.open(tar) as archive:
        end = archive.getmembers()[-1].offset_data + 512 * -(-len(members[-1][1]) // 512)
    os.truncate(tar, int(share * (end + 512)))
    with pytest.raises(ValueError, match=r"a\.tar, offset \d+: not a whole tar: "):
        opened(tar)
    assert os.listdir(folder) == ["a.tar"]


@settings(max_examples=150)
@given(place=st.integers(0, 4095), value=st.binary(min_size=1, max_size=600))
def test_a_damaged_tar_is_read_or_told_never_a_crash(tmp_path_factory, place: int, value: bytes) -> None:
    tar = write_tar(tmp_path_factory.mktemp("damaged") / "a.tar", samples(0, 2))
    content = bytearray(tar.read_bytes())
    content[place : place + len(value)] = value
    tar.write_bytes(content)
    told = ""
    try:
        with warnings.catch_warnings(action="ignore"):
            source = opened(tar)
        for index in range(len(source)):
            for key in source[index].images:
                source.image(key)
    except ValueError as error:
        told = str(error)
    assert "a.tar" in told or not told


# ---------------------------------------------------------------------------------------- indices


def test_an_index_is_built_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(0, 3))
    opened(tar)
    index = tmp_path / "a.tar.idx"
    written = index.stat().st_mtime_ns, index.stat().st_ino
    assert len(opened(tar)) == 3
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == written
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.idx"] and not recwarn.list


def test_a_stale_index_is_built_anew_and_said_so(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(0, 3))
    opened(tar)
    write_tar(tar, samples(10, 4))
    with pytest.warns(UserWarning, match=r"a.tar.idx: the index does not fit, and is built anew: .*a.tar has changed"):
        source = opened(tar)
    assert numbers(source, range(4)) == [(number, number) for number in range(10, 14)]
    os.utime(tar, ns=(0, 1))  # the same size, another time
    with pytest.warns(UserWarning, match="has changed since"):
        opened(tar)


def test_more_shards_than_a_process_may_open_files_by_default(tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", samples(number, 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, limits[1]))
    try:
        assert numbers(opened(tmp_path), range(40)) == [(number, number) for number in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"SPARIDX1", None])
def test_an_index_that_is_not_whole_is_built_anew_and_said_so(tmp_path: Path, content: bytes | None) -> None:
    tar, index = write_tar(tmp_path / "a.tar", samples(0, 3)), tmp_path / "a.tar.idx"
    opened(tar)
    index.write_bytes(index.read_bytes()[:-1] if content is None else content)
    with pytest.warns(UserWarning, match="a.tar.idx: the index does not fit, and is built anew: "):
        assert numbers(opened(tar), range(3)) == [(number, number) for number in range(3)]


def test_a_tar_that_is_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(0, 3))
    source = opened(tar)
    os.truncate(tar, 2000)
    with pytest.raises(ValueError, match=r"a.tar, offset \d+: expected \d+ bytes, found \d+; is it cut short\?"):
        source[2]


def test_an_index_may_lie_elsewhere_where_its_own_place_cannot_be_written(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", samples(0, 2))
    source = opened(tmp_path / "*" / "0.tar", tmp_path / "new" / "indices")
    assert len(source) == 4 and len(os.listdir(tmp_path / "new" / "indices")) == 2
    assert os.listdir(tmp_path / "a") == ["0.tar"]
    with pytest.raises(ValueError) as caught:
        opened(tmp_path / "a", tmp_path / "a" / "0.tar" / "sub")
    assert str(caught.value) == (
        f"{tmp_path / 'a/0.tar/sub'}: the index of {tmp_path / 'a/0.tar'} cannot be written here: Not a directory. "
        "Set index_folder to a folder where it can"
    )


def _build(tar: Path, index: Path, barrier: object) -> int:
    barrier.wait()  # type: ignore[attr-defined]
    build_index(tar, index)
    return len(opened(tar))


def test_processes_that_build_at_once_do_not_meet(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples(0, 300))
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, ProcessPoolExecutor(4, mp_context=context) as pool:
        barrier = manager.Barrier(4)
        found = [pool.submit(_build, tar, tmp_path / "a.tar.idx", barrier) for _ in range(4)]
        assert [each.result() for each in found] == [300] * 4
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.idx"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_at_once(tmp_path: Path, method: str) -> None:
    """Descriptors are shared by fork, and their position too: reading must not depend on it."""
    write_tar(tmp_path / "a.tar", samples(0, 200))
    write_tar(tmp_path / "b.tar", samples(200, 200))
    source = opened(tmp_path)
    numbers(source, range(2))
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(400), (3, 1)), axis=1).tolist()
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        found = list(pool.map(numbers, [source] * 3, orders))
    assert found == [[(number, number) for number in order] for order in orders]


class Noting(Dataset):
    """Ids and pixels, and a note of all that is asked for."""

    def __init__(self, source: ShardSource) -> None:
        self.source, self.noted = source, []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        sample = self.source[index]
        self.source.image(sample.images[0])
        self.noted.append(sample.id)
        return sample.id


def test_after_a_resume_the_same_samples_come_and_none_before_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 40))
    write_tar(tmp_path / "b.tar", samples(40, 60))

    def loader(data: Noting) -> DataLoader:
        return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))

    whole, resumed = Noting(opened(tmp_path)), Noting(opened(tmp_path))
    right = list(loader(whole))
    assert list(skip_first_batches(loader(resumed), 22)) == right[22:]
    assert len(whole.noted) == 100 and resumed.noted == whole.noted[88:]


def test_a_source_travels_by_pickle_without_its_index(tmp_path: Path) -> None:
    source = opened(write_tar(tmp_path / "a.tar", samples(0, 500)))
    content = pickle.dumps(source)
    assert len(content) < 1000
    assert numbers(pickle.loads(content), range(498, 500)) == [(498, 498), (499, 499)]
