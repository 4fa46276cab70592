"""Pictures: loading, padding to a square, CLIP's resize and crop, tiles for HD. All on uint8."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    # Rows of padding alone are left out of the horizontal pass: weights that sum to one keep a constant row constant.
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
        width, height = (max(1, side // ratio) for side in picture.size)
        lefts, tops = (
            [min(step * i, side - 1) for i in range(ratio)] for step, side in zip((width, height), picture.size)
        )
        crops = [picture.crop((x, y, x + width, y + height)) for y in tops for x in lefts] + crops
    return torch.stack([square_view(crop, pad) for crop in crops])


def _identify(file: Any, limits: Limits) -> Image.Image:
    Image.init()
    try:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
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
