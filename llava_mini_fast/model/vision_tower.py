"""CLIP's vision transformer, cut after the layer whose output is used (published: `CLIPVisionTower`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """CLIP's patch convolution as a product, which it is: its stride is its kernel.

    In float32 on CUDA cuDNN's convolutions round to TF32 by default, products don't. The weight keeps the convolution's name
    and shape.
    """

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (V, 3, n * patch, n * patch) -> (V, width, n, n)."""
        patch = self.weight.shape[-1]
        patches = pixels.unflatten(-1, (-1, patch)).unflatten(2, (-1, patch))  # (V, 3, n, patch, n, patch)
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(rows, self.weight.flatten(1)).permute(0, 3, 1, 2)


class VisionTower(nn.Module):
    """transformers' CLIP vision model without the layers that nobody reads.

    `mm_vision_select_layer` -2 is the output of the last layer but one, so the last layer and the final norm are never
    built.
    """

    def __init__(self, clip_config, select_layer: int):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        layers = clip_config.num_hidden_layers
        used = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if not 0 < used <= layers:
            raise ValueError(f"mm_vision_select_layer {select_layer} is outside the vision tower's {layers} layers.")
        kept = CLIPVisionConfig(**clip_config.to_dict() | {"num_hidden_layers": used})
        kept._attn_implementation = "sdpa"
        self.clip = CLIPVisionModel(kept)
        self.clip.embeddings.patch_embedding = PatchEmbedding(kept.hidden_size, kept.patch_size)
        self.clip.post_layernorm = nn.Identity()  # feeds only the pooled output, which is not used
        self.width = kept.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (V, 3, 336, 336), normalised -> patch features (V, 576, D); the class token is dropped."""
        return self.clip(pixels).last_hidden_state[:, 1:]


def grid_of_tiles(features: Tensor) -> Tensor:
    """Tile features (..., n*n, 576, D), tiles row-major -> (..., n*n*576, D), row-major over the whole (24n)^2 grid."""
    *lead, tiles, patches, width = features.shape
    n, side = int(tiles**0.5), int(patches**0.5)
    grid = features.reshape(*lead, n, n, side, side, width)
    return grid.transpose(-4, -3).reshape(*lead, tiles * patches, width)
