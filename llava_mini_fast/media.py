"""Media as callers give them: what it is and where it comes from. Nothing is read or decoded before it is needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from llava_mini_fast.config import IMAGE_SIZE
from llava_mini_fast.preprocess.limits import MediaError

_IMAGE_INPUTS = "a path, bytes, a PIL image, a uint8 array (h, w, 3) or a float tensor (views, 3, 336, 336)"
_VIDEO_INPUTS = (
    "a path, bytes, a list of frames (PIL images or uint8 arrays (h, w, 3)), a uint8 array (T, h, w, 3) "
    "or a float tensor (T, views, 3, 336, 336)"
)


@dataclass(frozen=True, eq=False)
class Media:
    """One image or clip. Made by `image` and `video`; turned into pixels by `preprocess.views.views`."""

    kind: str
    """`"image"` or `"video"`."""
    source: Any
    """A path (str), bytes, a PIL image, a uint8 array or tensor, a float array or tensor, or a tuple of frames."""
    as_published: bool = False
    """Pictures through plain `convert("RGB")`: neither made upright by EXIF nor laid on white."""


def image(x: Any, *, as_published: bool = False) -> Media:
    """An image to ask about.

    Args:
        x: a path, the bytes of a picture file, a PIL image, a uint8 array or tensor (h, w, 3) or (1, h, w, 3), or a
            float array or tensor (views, 3, 336, 336) that is already preprocessed (views: 1, in HD 5).
        as_published: take the pixels as the published code does, with plain `convert("RGB")`. By default EXIF makes
            the picture upright and transparency lies on white, as in vLLM's loader.

    Raises:
        TypeError: x is of another type.
        ValueError: x is a URL, or an array of another shape or dtype.
    """
    if _is_array(x):
        shape = tuple(x.shape)
        if _is_float(x):
            _check_floats(x, 4, "image", "(views, 3, 336, 336)")
        elif not _is_uint8(x) or shape[-1:] != (3,) or not (len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)):
            raise MediaError(
                f"An image array must be uint8 of shape (h, w, 3) or (1, h, w, 3); this is {_describe(x)}."
            )
        return Media("image", x if len(shape) == 3 or _is_float(x) else x[0], as_published)
    if _is_picture(x):
        return Media("image", x, as_published)
    return Media("image", _file(x, "An image", _IMAGE_INPUTS), as_published)


def video(x: Any, *, as_published: bool = False) -> Media:
    """A clip to ask about.

    Args:
        x: a path, the bytes of a video file (one frame a second is taken of either), or frames already chosen: a list
            or tuple of PIL images or uint8 arrays (h, w, 3), a uint8 array or tensor (T, h, w, 3), or a float array
            or tensor (T, views, 3, 336, 336) that is already preprocessed (views: 1, in HD 5).
        as_published: as in `image`, for frames that are PIL images; video files are decoded as published either way.

    Raises:
        TypeError: x, or one of its frames, is of another type.
        ValueError: x is a URL, has no frames, or is an array of another shape or dtype.
    """
    if _is_array(x):
        if _is_float(x):
            _check_floats(x, 5, "video", "(T, views, 3, 336, 336)")
        elif not _is_uint8(x) or x.ndim != 4 or x.shape[-1] != 3:
            raise MediaError(f"A video array must be uint8 of shape (T, h, w, 3); this is {_describe(x)}.")
        if not x.shape[0]:
            raise MediaError("The clip has no frames (T is 0).")
        return Media("video", x, as_published)
    if isinstance(x, (list, tuple)):
        if not x:
            raise MediaError("The clip has no frames (the list is empty).")
        for frame in x:
            if not _is_picture(frame) and not _is_array(frame):
                raise TypeError(f"A frame must be a PIL image or a uint8 array (h, w, 3), not {type(frame).__name__}.")
            if _is_array(frame) and not (_is_uint8(frame) and frame.ndim == 3 and frame.shape[-1] == 3):
                raise MediaError(f"A frame must be uint8 of shape (h, w, 3); this is {_describe(frame)}.")
        return Media("video", tuple(x), as_published)
    if _is_picture(x):
        raise TypeError("One PIL image is no clip; give image(x), or video([x]) for a clip of one frame.")
    return Media("video", _file(x, "A video", _VIDEO_INPUTS), as_published)


def _file(x: Any, subject: str, inputs: str) -> str | bytes:
    if isinstance(x, (bytes, bytearray, memoryview)):
        return bytes(x)
    if not isinstance(x, (str, PathLike)):
        raise TypeError(f"{subject} must be {inputs}, not {type(x).__name__}.")
    path = fspath(x)
    if not isinstance(path, str):
        raise TypeError(f"{subject}'s path must be text, not {type(path).__name__}.")
    scheme, colon, _ = path.partition(":")
    if "://" in path or (colon and scheme == "data"):
        raise MediaError(f"{subject} is given as a path or as bytes, not as a URL; fetch it first.")
    return path


def _instance(x: Any, module: str, name: str) -> bool:
    # Whoever holds an object of a library has imported it, so a look at sys.modules spares us its import.
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(x, getattr(loaded, name))


def _is_picture(x: Any) -> bool:
    return _instance(x, "PIL.Image", "Image")


def _is_array(x: Any) -> bool:
    return _instance(x, "numpy", "ndarray") or _instance(x, "torch", "Tensor")


def _is_uint8(x: Any) -> bool:
    return str(x.dtype) in ("uint8", "torch.uint8")


def _is_float(x: Any) -> bool:
    return str(x.dtype).removeprefix("torch.") in ("float16", "bfloat16", "float32", "float64")


def _check_floats(x: Any, dims: int, kind: str, shape: str) -> None:
    if x.ndim != dims or tuple(x.shape[-3:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise MediaError(f"A float {kind} is already preprocessed and must be {shape}; this is {_describe(x)}.")


def _describe(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
