"""Picture or clip? Decided by a file's content; the name counts only where the content says nothing."""

from __future__ import annotations

import mimetypes
from contextlib import closing
from pathlib import Path

from llava_mini_fast.media import Media, image, video
from llava_mini_fast.preprocess.image import FORMATS, load_rgb, open_header
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.preprocess.video import frames

_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
"""Formats in which several frames are an animation; in others (TIFF, JPEG's MPO) they are pages or other sizes."""


def guess(path: str | Path, limits: Limits | None = None) -> Media:
    """The image or clip that a file holds. An animated picture is a clip.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: a URL, a folder, an empty or too large file, or neither a picture nor a clip that can be read.
    """
    limits = limits or Limits.from_env()
    medium = image(path)  # refuses URLs
    with limits.open(path, "picture or clip") as file:
        try:
            picture = open_header(file, FORMATS)
        except OSError:
            picture = None
        except Exception:  # a picture with a hostile or damaged header: opening it will say so
            return medium
        if picture is not None:
            animated = picture.format in _ANIMATED and getattr(picture, "is_animated", False)
            return video(path) if animated else medium
    try:
        with closing(frames(str(path), limits)) as found:
            next(found)
    except MediaError as error:
        kind = (mimetypes.guess_type(str(path))[0] or "").partition("/")[0]
        if kind == "image":
            load_rgb(str(path), limits=limits)  # its error tells what is wrong with the picture
        if kind == "video":
            raise
        raise MediaError(f"{str(path)!r} is no picture that can be read; as a clip: {error}") from None
    return video(path)
