"""CLIP's vision transformer, cut after the layer whose output is used (published: `CLIPVisionTower`)."""

from __future__ import annotations

from torch import Tensor, nn


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
