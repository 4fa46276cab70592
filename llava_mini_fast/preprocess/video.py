"""Clips: which frames are taken, decoding in one pass, and the published resize. Nothing ever holds a whole clip."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from llava_mini_fast.config import IMAGE_SIZE
from llava_mini_fast.preprocess.image import image_views, load_rgb, open_header
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.preprocess.mp4 import entries_listed

if TYPE_CHECKING:
    from llava_mini_fast.config import LlavaMiniConfig

ASSUMED_FPS = 25.0
# FFmpeg's demuxers that may open what a caller sends. Playlists (hls, dash, concat) are not here: they name other
# files. The sound-only ones are, so that the message can say that there is no video in them.
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,nut,ivf,obu,h264,hevc,m4v,dv,rm,yuv4mpegpipe,"
    "gif,apng,webp,wav,mp3,flac,aac"
)
_PICTURES = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_REUSE = 10
"""How many times over a file's bytes may be read as packets; an edit list may show some twice."""


def frame_indices(total: int, fps: float, cap: int | None = None) -> list[int]:
    """Which frames of a clip are taken: one a second, each the middle of its segment (published: `load_video`).

    A clip shorter than a second gives its middle frame, where the published code divides by zero. Short clips at low
    rates may name a frame twice, as published.

    Args:
        total: frames in the clip, at least 1.
        fps: average frames a second, may be fractional, above 0.
        cap: at most so many frames, evenly over the clip.

    Returns:
        indices in ascending order, at least one.
    """
    if total < 1 or not fps > 0:
        raise ValueError("total must be at least 1 and fps above 0.")
    count = max(1, min(total, int(total // fps)))
    if cap is not None:
        count = min(count, cap)
    segment = (total - 1) / count
    edges = [round(segment * i) for i in range(count + 1)]
    return [(start + end) // 2 for start, end in pairwise(edges)]


def frame_rate(stated: float | None, total: int, seconds: float | None) -> float:
    """A usable frame rate: the stated one, else frames over duration, else `ASSUMED_FPS` with a warning."""
    if stated and stated > 0:
        return float(stated)
    if seconds and seconds > 0:
        return total / seconds
    warnings.warn(f"The clip doesn't state its frame rate; {ASSUMED_FPS:g} frames a second are assumed.", stacklevel=2)
    return ASSUMED_FPS


def frames(
    source: str | Path | bytes | np.ndarray | torch.Tensor | Sequence[Any],
    limits: Limits | None = None,
    as_published: bool = False,
) -> Iterator[np.ndarray]:
    """The frames that stand for a clip, one by one as they are decoded: uint8 (336, 336, 3), RGB.

    Args:
        source: a path or bytes of a video file, or frames already chosen: uint8 (T, h, w, 3), or a sequence of PIL
            images and uint8 (h, w, 3).
        limits: default `Limits()`.
        as_published: for PIL images, see `load_rgb`.

    Raises:
        FileNotFoundError, MediaError: as `decode` and `load_rgb`.
    """
    limits = limits or Limits()
    if isinstance(source, (str, Path, bytes)):
        yield from map(resize_nearest, decode(source, limits))
        return
    limits.check_frames(len(source))
    for frame in source:
        yield resize_nearest(np.asarray(load_rgb(frame, as_published, limits)))


def resize_nearest(frame: np.ndarray) -> np.ndarray:
    """The published resize of a decoded frame: nearest neighbour to 336 x 336, equal to torch's `interpolate`.

    Args:
        frame: uint8 (h, w, 3).

    Returns:
        uint8 (336, 336, 3), contiguous.
    """
    rows, columns = (_nearest(size) for size in frame.shape[:2])
    return frame[rows[:, None], columns]


def frame_views(frame: np.ndarray, config: LlavaMiniConfig) -> torch.Tensor:
    """The views of a resized frame: uint8 (V, 3, 336, 336). In HD the tiles of 168 are cut after the resize."""
    return image_views(Image.fromarray(frame), config)


def decode(source: str | Path | bytes, limits: Limits | None = None) -> Iterator[np.ndarray]:
    """The chosen frames of a video file, upright, at their own size: uint8 (h, w, 3), RGB.

    As the published reader (decord) does, frames are counted by reading the packets, the rate is the container's
    average, and a clip is turned as its display matrix says. A clip that is cut off or damaged gives the frames before
    the damage, chosen among those that are there, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: not a video, no video stream, no frame, or over a limit.
    """
    limits = limits or Limits()
    with limits.open(source, "clip") as file:
        clip = _survey(file, limits)
        total, yielded = clip.frames, False
        while not yielded:
            wanted = _chosen(total, clip.fps, limits)
            position = decoded = 0
            for decoded, frame in enumerate(_decoded(file, clip), 1):
                if wanted[position] == decoded - 1:
                    # The size may change in the middle of a stream.
                    limits.check_size(frame.width, frame.height, "clip's frame")
                    pixels = _upright(frame)
                    while position < len(wanted) and wanted[position] == decoded - 1:
                        yielded = True
                        position += 1
                        yield pixels
                    if position == len(wanted):
                        break
            if not decoded:
                raise MediaError("No frame of the clip can be decoded: it is damaged, or has no frames.")
            if position < len(wanted):
                warnings.warn(
                    f"The clip is damaged: {decoded:,} of {total:,} frames can be decoded, and those are used.",
                    stacklevel=2,
                )
                # If all chosen frames lie behind the damage, choose among those before it.
                total = decoded


@dataclass(frozen=True)
class _Clip:
    stream: int
    packets: int
    """Packets to decode, up to the damage if there is any."""
    frames: int
    """Frames that they hold."""
    fps: float


def _survey(file: BinaryIO, limits: Limits) -> _Clip:
    """Read the packets once, without decoding them: how many frames there really are, and whether some are missing."""
    _refuse_picture(file)
    if limits.max_packets is not None:
        limits.check_packets(entries_listed(file, limits.max_packets))
    size = file.seek(0, 2)
    with _container(file) as container:
        stream = next((s for s in container.streams.video if not _is_cover(s)), None)
        if stream is None:
            raise MediaError("The file has no video stream; a clip needs one.")
        if not stream.codec_context:
            raise MediaError("The clip's video codec is not supported.")
        limits.check_size(stream.codec_context.width or 1, stream.codec_context.height or 1, "clip's frame")
        codec, rate = stream.codec_context.name, float(stream.average_rate or 0)
        packets = shown = read = covered = 0
        start = end = last = None
        damaged = False
        try:
            for packet in container.demux():
                read, covered = read + 1, covered + packet.size + 1
                limits.check_packets(read)
                if covered > _REUSE * size:
                    raise MediaError("The clip's index lists the same bytes over and over.")
                if packet.pts is not None:
                    last = max(last or 0.0, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index or not packet.size:
                    continue
                if damaged := packet.is_corrupt:
                    break
                packets += 1
                # Discarded packets lie outside the edit list and give no frame; nor do VP8's hidden reference frames.
                hidden = packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10)
                shown += not hidden
                if rate:
                    limits.check_seconds(shown / rate)
                if packet.pts is not None:
                    start = packet.pts if start is None else min(start, packet.pts)
                    end = max(end or 0, packet.pts + (packet.duration or 0))
        except MediaError:
            raise
        except _errors():
            damaged = True
        # Formats state the number of frames (MP4, AVI) or the length (Matroska, WebM); GIF and raw streams, neither.
        length = None if end is None else float((end - start) * stream.time_base)
        fps = frame_rate(stream.average_rate, shown, length) if shown else ASSUMED_FPS
        stated = (container.duration or 0) / 1_000_000
        damaged |= stream.frames > packets or (last is not None and stated > last + max(0.5, 2 / fps))
        if not shown:
            raise MediaError("The clip is cut off before its first frame." if damaged else "The clip has no frames.")
        if damaged:
            warnings.warn(
                f"The clip is cut off or damaged: the {shown:,} frames before the damage are used.", stacklevel=2
            )
        return _Clip(stream.index, packets, shown, fps)


def _chosen(total: int, fps: float, limits: Limits) -> list[int]:
    limits.check_seconds(total / fps)
    if limits.thin_frames:
        return frame_indices(total, fps, limits.max_frames)
    wanted = frame_indices(total, fps)
    limits.check_frames(len(wanted))
    return wanted


def _decoded(file: BinaryIO, clip: _Clip) -> Iterator[Any]:
    """Frames in the order of display, up to an error."""
    with _container(file) as container:
        stream = container.streams[clip.stream]
        stream.thread_type = "AUTO"
        try:
            for packet in islice((p for p in container.demux(stream) if p.size), clip.packets):
                yield from packet.decode()
            yield from stream.decode(None)
        except _errors():
            return


def _container(file: BinaryIO) -> Any:
    import av

    file.seek(0)
    try:
        return av.open(file, options={"format_whitelist": _CONTAINERS}, io_open=_no_other_file, buffer_size=1 << 18)
    except _errors():
        raise MediaError(
            "The data is not a video that can be read: it is in no supported format (MP4, Matroska, WebM, AVI, MPEG, "
            "GIF and others), or its index is cut off."
        ) from None


def _refuse_picture(file: BinaryIO) -> None:
    # FFmpeg reads a picture as a clip of one frame; the sender surely meant something else.
    file.seek(0)
    try:
        picture = open_header(file, _PICTURES)
        animated = getattr(picture, "is_animated", False)
    except (
        Exception
    ):  # Pillow raises what it likes on hostile headers; the container's own reader then says what is wrong
        return
    if not animated:
        raise MediaError(f"The file is a picture ({picture.format}), not a video; give it as an image.")


def _no_other_file(url: str, flags: int, options: dict[str, Any]) -> BinaryIO:
    raise PermissionError("a clip may not name other files")


def _errors() -> tuple[type[Exception], ...]:
    import av

    return (av.FFmpegError, OSError, ValueError)


def _is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _upright(frame: Any) -> np.ndarray:
    # The display matrix turns counterclockwise, and so does rot90.
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _nearest(size: int) -> np.ndarray:
    # float32 on purpose: torch computes the source index so, and some sizes differ in float64.
    scale = np.float32(size) / np.float32(IMAGE_SIZE)
    return np.minimum((np.arange(IMAGE_SIZE, dtype=np.float32) * scale).astype(np.int64), size - 1)
