"""Where the compressor looked, drawn over the picture (the paper's figures of its attention)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_mini_fast import checkpoint
from llava_mini_fast.config import IMAGE_SIZE, LlavaMiniConfig
from llava_mini_fast.device import choose_device
from llava_mini_fast.media import Media
from llava_mini_fast.model.front_end import FrontEnd
from llava_mini_fast.model.vision_tower import grid_of_tiles
from llava_mini_fast.preprocess.views import normalize, stream

MOST_FRAMES = 12
"""Of a clip; the strip would grow too wide to look at."""
_STRENGTH = 0.65
_HEAT = np.array([[0, 0, 0], [90, 0, 110], [220, 50, 40], [255, 170, 0], [255, 255, 200]], dtype=np.float64)
"""From no attention to the most."""


@dataclass(frozen=True)
class Front:
    """As much of a loaded model as a heat map needs."""

    front: FrontEnd
    config: LlavaMiniConfig


def load_front(path: str, device: str | torch.device = "cpu") -> Front:
    """A checkpoint's front end without its language model, in float32. `device` and errors as in `llava_mini_fast.load`."""
    where = choose_device(device)
    directory = checkpoint.resolve(path)
    config = checkpoint.read_config(directory)
    with where:
        front = FrontEnd(config, lambda ids: torch.zeros(len(ids), config.hidden_size))
    front.requires_grad_(False).eval()
    front.load_weights(checkpoint.front_end_weights(directory, config))
    return Front(front, config)


@torch.inference_mode()
def attention(model: Any, media: Media) -> tuple[Tensor, Tensor]:
    """The compressor's weights for each of the first `MOST_FRAMES` frames.

    Args:
        model: of `llava_mini_fast.load` or `load_front`.

    Returns:
        Weights (F, Q, g, g) float32, each grid of which sums to 1 (g is 24, in HD 48), and the frames as the model sees
        them whole, uint8 (F, 3, 336, 336).

    Raises:
        ValueError: unusable media, or media given as floats, which are no picture any more.
    """
    front, weights, seen = model.front, [], []
    for pixels, _ in islice(stream(media, model.config), MOST_FRAMES):
        if pixels.dtype != torch.uint8:
            raise ValueError("a heat map is drawn over a picture; give the picture or clip itself, not floats.")
        parameter = next(front.vision_tower.parameters())
        features = front.vision_tower(normalize(pixels.to(parameter.device), parameter.dtype))
        grid = features if len(pixels) == 1 else grid_of_tiles(features[None, :-1])
        side = math.isqrt(grid.shape[1])
        weights.append(front.compressor.attention_map(grid)[0].float().cpu().unflatten(-1, (side, side)))
        seen.append(pixels[-1])
    return torch.stack(weights), torch.stack(seen)


def heatmap(model: Any, media: Media) -> Image.Image:
    """The picture as the model sees it (336 x 336, padding included) under the mean of the compressed rows' weights.

    Of a clip, up to `MOST_FRAMES` frames side by side. Arguments and errors as in `attention`.
    """
    weights, seen = attention(model, media)
    drawn = [_drawn(grid.mean(0), pixels) for grid, pixels in zip(weights, seen)]
    strip = Image.new("RGB", (IMAGE_SIZE * len(drawn), IMAGE_SIZE))
    for place, one in enumerate(drawn):
        strip.paste(one, (IMAGE_SIZE * place, 0))
    return strip


def _drawn(grid: Tensor, pixels: Tensor) -> Image.Image:
    """One frame (3, 336, 336) uint8 under a grid of weights, the largest of which is brightest."""
    share = Image.fromarray((grid / grid.max()).numpy()).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    level = np.clip(np.asarray(share, dtype=np.float64), 0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(level, steps, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    picture = pixels.permute(1, 2, 0).numpy().astype(np.float64)
    return Image.fromarray(((1 - _STRENGTH) * picture + _STRENGTH * colour).round().astype(np.uint8))
