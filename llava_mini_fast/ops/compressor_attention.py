"""compressor_attention: LayerNorm, folded scores, softmax and weighted sum in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mini_fast.ops.backend import pick


def compressor_attention(
    features: Tensor, weight: Tensor, bias: Tensor, *, eps: float, return_weights: bool = False, backend: str = "torch"
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool the LayerNormed rows of each frame with folded queries.

    With y = LayerNorm(features) without weights: softmax over N of (weight @ y.T + bias), times y.

    Args:
        features: (F, N, D), any float dtype.
        weight: (M, D) float32, folded queries (M = 8Q).
        bias: (M, N) float32, folded positions.
        eps: LayerNorm's epsilon.
        return_weights: give the attention weights too.
        backend: as `backend.resolve` gives it.

    Returns: (F, M, D) float32, and with return_weights (F, M, N) float32.

    Raises:
        ValueError: shapes don't fit, or weight or bias is not float32.
    """
    if features.dim() != 3 or weight.dim() != 2 or weight.shape[1] != features.shape[2]:
        raise ValueError(
            f"compressor_attention takes features (F, N, D) and weight (M, D); got {tuple(features.shape)} and {tuple(weight.shape)}."
        )
    if bias.shape != (weight.shape[0], features.shape[1]):
        raise ValueError(
            f"compressor_attention: bias must be (M, N) = {(weight.shape[0], features.shape[1])}; got {tuple(bias.shape)}."
        )
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"compressor_attention: weight and bias must be float32; got {weight.dtype} and {bias.dtype}.")
    kernel = pick(
        "compressor_attention",
        backend,
        features,
        queries=weight.shape[0],
        width=features.shape[2],
        rows=features.shape[1],
    )
    if kernel is not None:
        pooled, weights = kernel(features, weight, bias, eps, return_weights)
        return (pooled, weights) if return_weights else pooled
    rows = F.layer_norm(features.float(), features.shape[-1:], eps=eps)
    weights = torch.add(bias, weight @ rows.mT).softmax(dim=-1)
    pooled = weights @ rows
    return (pooled, weights) if return_weights else pooled
