"""From CLIP's width to the language model's (published: `mm_projector`, `mlp2x_gelu`)."""

from torch import nn


def projector(width: int, hidden_size: int) -> nn.Sequential:
    """Linear, exact GELU, Linear: rows (..., D) -> (..., H); the same weights for patch and compressed rows."""
    return nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
