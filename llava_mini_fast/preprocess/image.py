"""Pictures: loading, padding to a square, CLIP's resize and crop, tiles for HD. All on uint8."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_mini_fast.config import CLIP_MEAN, IMAGE_SIZE
from llava_mini_fast.preprocess.limits import Limits, MediaError

if TYPE_CHECKING:
    from llava_mini_fast.config import LlavaMiniConfig

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "SGI", "TIFF", "WEBP")
"""Raster formats that Pillow decodes itself. Left out: what it hands to other programs (EPS, WMF), icons, whose header
doesn't tell the size of the picture inside, and formats without a signature (TGA), as which any file may pass."""
PAD_COLOR = tuple(int(255 * mean) for mean in CLIP_MEAN)
MAX_THINNESS = 1024
"""Without padding, the longer side over the shorter: the resized picture has 336 pixels on its shorter side."""
_BAND_PIXELS = 1 << 22
_TALL = 16
"""Height over width from which `_tall_strip` is faster than rows padded to the height's length."""
_PRECISION = 22
"""Bits behind the point in Pillow's 8-bit resampling weights."""


def load_rgb(
    source: str | Path | bytes | Image.Image | np.ndarray | torch.Tensor,
    as_published: bool = False,
    limits: Limits | None = None,
) -> Image.Image:
    """Any picture as an RGB PIL image; of an animated one the first frame.

    By default the pixels are those of vLLM's own loader: upright by EXIF, transparency laid on white, every other mode
    by Pillow's `convert("RGB")` (which clips 16-bit gray at 255). With `as_published`: `convert("RGB")` alone.

    Args:
        source: a path, bytes, a PIL image, or uint8 (h, w, 3).
        limits: default `Limits()`. The size is checked before the pixels are decoded.

    Raises:
        FileNotFoundError: there is no such file.
        MediaError: not a picture, damaged, or too large.
    """
    limits = limits or Limits()
    if isinstance(source, (np.ndarray, torch.Tensor)):
        limits.check_size(source.shape[1], source.shape[0], "picture")
        pixels = source.cpu().numpy() if isinstance(source, torch.Tensor) else source
        return Image.fromarray(np.ascontiguousarray(pixels))
    if isinstance(source, Image.Image):
        return _rgb(source, as_published, limits)
    with limits.open(source, "picture") as file:
        return _rgb(_identify(file, limits), as_published, limits)


def open_header(file: BinaryIO, formats: Iterable[str]) -> Image.Image:
    """Pillow's lazy `open`, for those of `formats` that this build of Pillow knows."""
    Image.init()
    return Image.open(file, formats=[name for name in formats if name in Image.OPEN])


def square_view(picture: Image.Image, pad: bool) -> torch.Tensor:
    """One view: `picture` (RGB) padded to a square if asked, then resized and cropped as CLIP's processor does.

    The result is bit for bit that of padding with the CLIP mean colour, of Pillow's bicubic resize of the shorter side
    to 336 and of the centre crop; but neither the square nor the resized picture is ever formed at full size. Pillow's
    resize is a horizontal pass, a rounding to uint8 and a vertical pass, so rows, then columns, can go in bands.

    Returns:
        uint8 (3, 336, 336).

    Raises:
        MediaError: without padding, the picture is more than `MAX_THINNESS` times as long as wide.
    """
    width, height = picture.size
    short, long = sorted(picture.size)
    if pad:
        canvas_width = canvas_height = long
        out_width = out_height = IMAGE_SIZE
    else:
        if long > MAX_THINNESS * short:
            raise MediaError(
                f"The picture is {width} x {height}; its longer side may be at most {MAX_THINNESS:,} times the shorter."
            )
        canvas_width, canvas_height = width, height
        resized = int(IMAGE_SIZE * long / short)
        out_width, out_height = (IMAGE_SIZE, resized) if width <= height else (resized, IMAGE_SIZE)
    paste_x, paste_y = (canvas_width - width) // 2, (canvas_height - height) // 2
    crop_x, crop_y = (out_width - IMAGE_SIZE) // 2, (out_height - IMAGE_SIZE) // 2

    if pad and height > _TALL * width:
        strip = _tall_strip(picture)
    else:
        # Rows of padding alone are left out: weights that sum to one keep a constant row constant.
        strip = Image.new("RGB", (IMAGE_SIZE, canvas_height), PAD_COLOR)
        band = max(1, _BAND_PIXELS // max(canvas_width, out_width))
        for top in range(0, height, band):
            count = min(band, height - top)
            rows = picture.crop((0, top, width, top + count))
            if canvas_width != width:
                canvas = Image.new("RGB", (canvas_width, count), PAD_COLOR)
                canvas.paste(rows, (paste_x, 0))
                rows = canvas
            rows = rows.resize((out_width, count), Image.Resampling.BICUBIC)
            strip.paste(rows.crop((crop_x, 0, crop_x + IMAGE_SIZE, count)), (0, paste_y + top))

    view = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    band = max(1, _BAND_PIXELS // max(canvas_height, out_height))
    for left in range(0, IMAGE_SIZE, band):
        count = min(band, IMAGE_SIZE - left)
        columns = strip.crop((left, 0, left + count, canvas_height))
        columns = columns.resize((count, out_height), Image.Resampling.BICUBIC)
        view.paste(columns.crop((0, crop_y, count, crop_y + IMAGE_SIZE)), (left, 0))
    return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()


def _tall_strip(picture: Image.Image) -> Image.Image:
    """The horizontal pass over a tall picture padded to a square, without the padding: (336, height).

    Padded rows would cost height * height pixels, 4 billion for a strip of one by 65,535. Pillow sums pixels times
    integer weights; so do we, bit for bit, over the few pixels that are not padding. The weights are asked of Pillow:
    resized as 32-bit integers, a single pixel of 2**22 among zeros gives its weight, rounded as the 8-bit weights are.
    """
    width, side = picture.size
    scale = side / IMAGE_SIZE
    # Pixels further apart than an output pixel sees (two source pixels either way, scaled) can share a row of probes.
    spacing = 2 * math.ceil(2 * max(scale, 1)) + 3
    probed = np.empty((spacing, IMAGE_SIZE))
    for first in range(spacing):
        probe = np.zeros((1, side), np.int32)
        probe[0, first::spacing] = 1 << _PRECISION
        probed[first] = np.asarray(Image.fromarray(probe).resize((IMAGE_SIZE, 1), Image.Resampling.BICUBIC))

    columns = (side - width) // 2 + np.arange(width)
    centers = (np.arange(IMAGE_SIZE) + 0.5) * scale
    seen = np.abs(columns[:, None] + 0.5 - centers) < spacing / 2
    weights = np.where(seen, probed[columns % spacing], 0)  # (width, 336)
    padding = (probed.sum(axis=0) - weights.sum(axis=0))[:, None] * PAD_COLOR + (1 << _PRECISION - 1)  # (336, 3)
    touched = np.flatnonzero(seen.any(axis=0))
    start, stop = touched[0], touched[-1] + 1

    strip = np.empty((side, IMAGE_SIZE, 3), np.uint8)
    strip[:] = PAD_COLOR
    band = max(1, (_BAND_PIXELS >> 4) // width)
    for top in range(0, side, band):
        rows = np.asarray(picture.crop((0, top, width, min(top + band, side))), dtype=np.float64)
        # Sums stay below 2**53, so float64 holds them exactly.
        sums = np.einsum("ywc,wo->yoc", rows, weights[:, start:stop], optimize=True) + padding[start:stop]
        strip[top : top + band, start:stop] = np.clip(sums.astype(np.int64) >> _PRECISION, 0, 255)
    return Image.fromarray(strip)


def image_views(picture: Image.Image, config: LlavaMiniConfig) -> torch.Tensor:
    """The views of one frame: the picture; in HD its 2x2 tiles, row by row, and then the picture.

    Tiles are cut from the picture as it is, by floor division (an odd last row or column belongs to none), and each is
    padded on its own. A side of one pixel can't be divided: both tiles then show that pixel.

    Args:
        picture: RGB.

    Returns:
        uint8 (V, 3, 336, 336), V = `config.views_per_frame`.
    """
    pad = config.image_aspect_ratio == "pad"
    ratio = config.resolution_ratio
    crops = [picture]
    if ratio > 1:
        columns, rows = (_cuts(side, ratio) for side in picture.size)
        crops = [picture.crop((left, top, right, low)) for top, low in rows for left, right in columns] + crops
    return torch.stack([square_view(crop, pad) for crop in crops])


def _cuts(side: int, ratio: int) -> list[tuple[int, int]]:
    step = max(1, side // ratio)
    starts = [min(step * i, side - 1) for i in range(ratio)]
    return [(start, start + step) for start in starts]


def _identify(file: BinaryIO, limits: Limits) -> Image.Image:
    try:
        return open_header(file, FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit comes first for the largest pictures, and its message has only the number of pixels.
        count = re.search(r"\((\d+) pixels\)", str(error))
        size = f"{int(count[1]):,} pixels" if count else "far too many pixels"
        allowed = min(limits.max_pixels or 1 << 62, 2 * (Image.MAX_IMAGE_PIXELS or 1 << 61))
        raise MediaError(f"The picture has {size}; at most {allowed:,} pixels are allowed.") from None
    except UnidentifiedImageError:
        raise MediaError(
            f"The data is not a picture that can be read; readable formats are {', '.join(FORMATS)}."
        ) from None
    except Exception as error:
        raise MediaError(f"The picture is damaged: {_reason(error)}.") from None


def _rgb(picture: Image.Image, as_published: bool, limits: Limits) -> Image.Image:
    limits.check_size(*picture.size, "picture")
    try:
        picture.load()
        # Decoding may correct the header's size.
        limits.check_size(*picture.size, "picture")
        if as_published:
            return picture.convert("RGB")
        # Broken EXIF is no reason to refuse a picture.
        with contextlib.suppress(Exception):
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "RGB":
            return picture
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGB", picture.size, (255, 255, 255))
            white.paste(picture, mask=picture.getchannel("A"))
            return white
        return picture.convert("RGB")
    except MediaError:
        raise
    except Exception as error:
        # A decoder meets hostile data here and may raise anything.
        raise MediaError(f"The picture is truncated or damaged: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
