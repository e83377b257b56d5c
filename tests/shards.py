"""Tar shards for tests, made by tarfile as users make them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]


def make_image(colour: str | tuple[int, int, int] = "red", form: str = "PNG") -> bytes:
    """8 x 8 pixels of one colour."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, form)
    return content.getvalue()


def conversation(**changes: object) -> bytes:
    return json.dumps({"conversations": TURNS} | changes).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(start: int, count: int) -> list[tuple[str, bytes]]:
    """Samples START, START + 1, ...: the answer says the number, and so does the image's colour."""
    members = []
    for number in range(start, start + count):
        turns = [TURNS[0], {"from": "gpt", "value": str(number)}]
        members += [(f"{number:06d}.png", make_image((number % 256, number // 256 % 256, number // 65536)))]
        members += [(f"{number:06d}.json", conversation(conversations=turns))]
    return members
