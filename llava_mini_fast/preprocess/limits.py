"""How large media may be, and the error that says so. One place for every door (Python, command line, vLLM, server)."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ENV_PREFIX = "LLAVA_MINI_"


class MediaError(ValueError):
    """Media that can't be used. The message is one sentence for the person who sent it."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds on media; `None` means no bound.

    Each is also an environment variable, read by `from_env`: `LLAVA_MINI_MAX_PIXELS`, `LLAVA_MINI_MAX_SIDE`,
    `LLAVA_MINI_MAX_BYTES`, `LLAVA_MINI_MAX_SECONDS`, `LLAVA_MINI_MAX_PACKETS`, `LLAVA_MINI_MAX_FRAMES` (a positive
    number or `none`) and `LLAVA_MINI_THIN_FRAMES` (`1` or `0`).
    """

    max_pixels: int | None = 89_478_485
    """Width times height of a picture or of one frame, checked before anything is decoded. The default is the number
    above which Pillow warns of a decompression bomb; Pillow itself refuses twice that, whatever is set here."""
    max_side: int | None = 65_535
    """Width or height of a picture (JPEG's own bound). It keeps the work on a long, thin picture small."""
    max_bytes: int | None = 4 * 1024**3
    """Size of a file or of the bytes of one."""
    max_seconds: float | None = 6 * 3600
    """Length of a clip. At one frame a second it bounds the number of frames too."""
    max_packets: int | None = 8_000_000
    """Packets (coded frames and pieces of sound) that a clip's file may list: 6 hours at 60 frames a second with
    uncompressed sound. It bounds the table that FFmpeg makes, which a short file could blow up to gigabytes."""
    max_frames: int | None = None
    """Frames taken of a clip. The published web worker uses 180."""
    thin_frames: bool = True
    """A clip with more than `max_frames` frames to take: True takes `max_frames`, evenly over the clip, as published;
    False refuses. Frames that the caller has already chosen are always refused beyond `max_frames`."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Limits:
        """The limits that the environment asks for, else the defaults.

        Raises:
            ValueError: a variable is neither a positive number nor `none` (`LLAVA_MINI_THIN_FRAMES`: neither 1 nor 0).
        """
        kinds = {
            "max_pixels": int,
            "max_side": int,
            "max_bytes": int,
            "max_seconds": float,
            "max_packets": int,
            "max_frames": int,
        }
        found: dict[str, int | float | bool | None] = {}
        for name, kind in kinds.items():
            variable = ENV_PREFIX + name.upper()
            if text := environ.get(variable, "").strip():
                found[name] = limit(variable, text, kind)
        variable = ENV_PREFIX + "THIN_FRAMES"
        if text := environ.get(variable, "").strip():
            if text not in ("0", "1"):
                raise ValueError(f"{variable} must be 0 or 1.")
            found["thin_frames"] = text == "1"
        return cls(**found)

    def check_size(self, width: int, height: int, noun: str) -> None:
        """Refuse a picture (or frame, by `noun`) that is empty or too large.

        Raises:
            MediaError: names the size and the limit.
        """
        if width < 1 or height < 1:
            raise MediaError(f"The {noun} is {width} x {height}: it has no pixels.")
        if self.max_side is not None and max(width, height) > self.max_side:
            raise MediaError(f"The {noun} is {width} x {height}; at most {self.max_side:,} pixels a side are allowed.")
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise MediaError(
                f"The {noun} is {width} x {height} ({width * height:,} pixels); "
                f"at most {self.max_pixels:,} pixels are allowed."
            )

    def check_packets(self, packets: int) -> None:
        """Refuse more than `max_packets` packets.

        Raises:
            MediaError: names the limit.
        """
        if self.max_packets is not None and packets > self.max_packets:
            raise MediaError(
                f"The clip's file lists more than {self.max_packets:,} packets (coded frames and pieces of sound), "
                "the most that are allowed."
            )

    def check_seconds(self, seconds: float) -> None:
        """Refuse a clip longer than `max_seconds`.

        Raises:
            MediaError: names the limit.
        """
        if self.max_seconds is not None and seconds > self.max_seconds:
            raise MediaError(f"The clip is longer than {self.max_seconds:,g} s, the most that is allowed.")

    def check_frames(self, frames: int) -> None:
        """Refuse more than `max_frames` frames.

        Raises:
            MediaError: names the number and the limit.
        """
        if self.max_frames is not None and frames > self.max_frames:
            raise MediaError(f"The clip gives {frames:,} frames; at most {self.max_frames:,} frames are allowed.")

    def open(self, source: str | Path | bytes, noun: str) -> BinaryIO:
        """A binary stream over the file or the bytes of a picture or clip, after a look at its size.

        Raises:
            FileNotFoundError: there is no such file.
            MediaError: no regular file, unreadable, empty, or larger than `max_bytes`.
        """
        if not isinstance(source, bytes):
            path = Path(source)
            if not path.exists():
                raise FileNotFoundError(
                    f"There is no file {str(path)!r}; a {noun} is given as the path of a file or as bytes."
                )
            if not path.is_file():
                what = "a folder" if path.is_dir() else "not a regular file"
                raise MediaError(f"{str(path)!r} is {what}; a {noun} is given as the path of a file or as bytes.")
        size = len(source) if isinstance(source, bytes) else path.stat().st_size
        if not size:
            raise MediaError(f"The {noun} is empty (0 bytes).")
        if self.max_bytes is not None and size > self.max_bytes:
            raise MediaError(f"The {noun} has {size:,} bytes; at most {self.max_bytes:,} bytes are allowed.")
        try:
            return io.BytesIO(source) if isinstance(source, bytes) else path.open("rb")
        except OSError as error:
            raise MediaError(f"The {noun} can't be read: {error.strerror}.") from None


def limit(variable: str, text: str, kind: type[int] | type[float]) -> int | float | None:
    """What an environment variable says of a limit: a positive number, or None for `none`.

    Raises:
        ValueError: neither.
    """
    if text.lower() == "none":
        return None
    try:
        number = kind(text.replace("_", ""))
    except ValueError:
        number = 0
    if not number > 0:
        raise ValueError(f"{variable} must be a positive number or none.")
    return number
