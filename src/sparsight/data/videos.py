"""Frames of videos: which ones stand for a video, and how they are decoded, by PyAV (the package av)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.data.images import MAX_PIXELS, load_image
from sparsight.errors import UserError

# Formats that are opened, whatever a file's name: a playlist would have other files opened, or fetched.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,gif,h264,hevc"


@dataclass(frozen=True)
class Frame:
    """Frame ``number`` (from 0) of the ``count`` that stand for a video: a path as the row names it, or its bytes."""

    video: str | bytes
    number: int
    count: int


def frames_of(video: str | bytes | Sequence[Any], count: int) -> list[Any]:
    """What stands for a video: ``count`` frames of a file, or of the images that are its frames at most as many."""
    if isinstance(video, str | bytes):
        return [Frame(video, number, count) for number in range(count)]
    return [video[number] for number in _spread(min(count, len(video)), len(video))]


def load_frame(source: Path | bytes, name: str, frame: Frame) -> Image.Image:
    """One of the frames of a video, evenly spread over all that it has (again and again if these are fewer), as RGB and
    turned as the video says.

    Raises:
        UserError: the file is missing or cannot be decoded, has more than `MAX_PIXELS`, or av is not installed.
    """
    stamp = source.stat().st_mtime_ns if isinstance(source, Path) and source.is_file() else 0
    return load_image(_decoded(source, name, frame.count, stamp)[frame.number], name)


def size_of_video(source: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height as stored, read from the header alone. Raises UserError as `load_frame`."""
    with _opened(source, name) as (_, stream):
        return stream.codec_context.width, stream.codec_context.height


def _spread(count: int, total: int) -> list[int]:
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


@lru_cache(maxsize=1)  # a sample's frames are asked for one after the other
def _decoded(source: Path | bytes, name: str, count: int, _stamp: int) -> list[Image.Image]:
    with _opened(source, name) as (container, stream):
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not times:
            raise UserError("no frames in it")
        found = [_frame_at(container, stream, times[index]) for index in _spread(count, len(times))]
        return [frame.to_image().rotate(frame.rotation, expand=True) for frame in found]


def _frame_at(container: Any, stream: Any, time: int) -> Any:
    """The first frame from ``time`` on, in the stream's own unit; the last one if none is that late."""
    found: Any = None
    for start in (time, 0):
        container.seek(start, stream=stream)
        for frame in container.decode(stream):
            if found is None and start and frame.pts > time:
                break  # formats without an index lead behind it: from the beginning, then
            found = frame
            if frame.pts >= time:
                return frame
    if found is None:
        raise UserError("no frame can be decoded")
    return found


def library(name: str) -> Any:
    """The package av. Raises UserError if it is not installed; ``name``: what asks for it."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{name}: videos are decoded by the package av, which is not installed: pip install 'sparsight[video]'"
        ) from None
    return av


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """Container and stream; every error over them, also of the block, is a UserError that names the video."""
    av = library(name)
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(opened, options={"format_whitelist": FORMATS}) as container:
            if not container.streams.video:
                raise UserError("no video in it")
            stream = container.streams.video[0]
            if (pixels := stream.codec_context.width * stream.codec_context.height) > MAX_PIXELS:
                raise UserError(f"{pixels:,} pixels a frame, more than {MAX_PIXELS:,}; make it smaller")
            yield container, stream
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except Exception as error:  # decoders raise all kinds
        raise UserError(f"{name}: cannot be read as a video: {error or type(error).__name__}") from None
