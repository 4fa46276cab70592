"""From media to pixels: the one door that the engine, the command line and vLLM go through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from llava_mini_fast.config import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, LlavaMiniConfig
from llava_mini_fast.media import Media
from llava_mini_fast.preprocess.image import image_views, load_rgb
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.preprocess.video import frame_views, frames


@dataclass(frozen=True, eq=False)
class Views:
    """The crops of one image or clip."""

    kind: str
    """`"image"` or `"video"`."""
    pixels: torch.Tensor
    """(T, V, 3, 336, 336) on the CPU: uint8, or float32 where the caller gave floats. An image has T = 1."""
    digests: tuple[bytes, ...]
    """One blake2b digest (16 bytes) a frame, of its dtype, shape and pixels; never of a name or id."""

    @property
    def num_frames(self) -> int:
        return self.pixels.shape[0]

    @property
    def num_views(self) -> int:
        return self.pixels.shape[1]


def views(media: Media, config: LlavaMiniConfig, limits: Limits | None = None) -> Views:
    """Load, choose, resize and cut media into the crops that the vision tower sees.

    Args:
        media: from `image` or `video`.
        config: of the checkpoint: decides on padding and on the number of views.
        limits: default `Limits.from_env()`.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: the media can't be used; the message says why.
    """
    limits = Limits.from_env() if limits is None else limits
    floats = _floats(media, config, limits)
    pixels = _stack(_crops(media, config, limits)) if floats is None else floats
    return Views(media.kind, pixels, tuple(map(_digest, pixels)))


def stream(
    media: Media | Views, config: LlavaMiniConfig, limits: Limits | None = None
) -> Iterator[tuple[torch.Tensor, bytes]]:
    """What `views` gives, frame by frame as it is decoded: (pixels (V, 3, 336, 336), digest). Errors as in `views`."""
    if isinstance(media, Views):
        yield from zip(media.pixels, media.digests)
        return
    limits = Limits.from_env() if limits is None else limits
    floats = _floats(media, config, limits)
    for crops in _crops(media, config, limits) if floats is None else floats:
        yield crops, _digest(crops)


def _crops(media: Media, config: LlavaMiniConfig, limits: Limits) -> Iterator[torch.Tensor]:
    if media.kind == "image":
        yield image_views(load_rgb(media.source, media.as_published, limits), config)
    else:
        for frame in frames(media.source, limits, media.as_published):
            yield frame_views(frame, config)


def normalize(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What CLIP's processor does with pixel values: (x / 255 - mean) / std in float32, bit for bit, then `dtype`.

    Args:
        pixels: (..., 3, h, w) on any device; uint8, or floats that are normalised already and are only cast.
    """
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)

    # Divisors are tensors on the device: a division by a Python number may become a multiplication, which rounds
    # otherwise. The processor divides by 255 in float64; rounded to float32 the 256 quotients are the same.
    def constant(values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=pixels.device)[:, None, None]

    scaled = pixels.to(torch.float32).div_(constant([255.0] * 3))
    return scaled.sub_(constant(CLIP_MEAN)).div_(constant(CLIP_STD)).to(dtype)


def _floats(media: Media, config: LlavaMiniConfig, limits: Limits) -> torch.Tensor | None:
    """The caller's own floats (T, V, 3, 336, 336), or None where there is something to load."""
    source, kind = media.source, media.kind
    if getattr(source, "ndim", 0) < 4 or _is_uint8(source):
        return None
    pixels = torch.from_numpy(source) if isinstance(source, np.ndarray) else source
    pixels = pixels.detach().to("cpu", torch.float32)
    pixels = pixels[None] if kind == "image" else pixels
    count, expected = pixels.shape[1], config.views_per_frame
    if count != expected:
        raise MediaError(
            f"The float {kind} has {count} views a frame; this checkpoint takes {expected} "
            f"({'one 336 x 336 crop' if expected == 1 else 'the tiles, then the whole'})."
        )
    limits.check_frames(pixels.shape[0])
    return pixels.contiguous()


def _stack(crops: Iterable[torch.Tensor]) -> torch.Tensor:
    # One growing buffer instead of a list and its copy: a long clip would need the memory twice.
    buffer = bytearray()
    count = 0
    for crop in crops:
        buffer += crop.numpy().data
        count = crop.shape[0]
    return torch.frombuffer(buffer, dtype=torch.uint8).view(-1, count, 3, IMAGE_SIZE, IMAGE_SIZE)


def _digest(frame: torch.Tensor) -> bytes:
    state = blake2b(f"{frame.dtype} {tuple(frame.shape)} ".encode(), digest_size=16)
    state.update(frame.numpy().data)
    return state.digest()


def _is_uint8(source: Any) -> bool:
    return str(source.dtype).removeprefix("torch.") == "uint8"
