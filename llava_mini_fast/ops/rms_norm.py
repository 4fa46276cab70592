"""rms_norm: Llama's RMSNorm, with the residual add before it."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_mini_fast.ops.backend import pick


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str = "torch"
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm of rows, in Llama's cast order: float32 inside, cast to x's dtype, then times weight.

    Args:
        x: (R, H). weight: (H,), x's dtype. eps: added to the mean of squares.
        residual: (R, H) or None; when given, x + residual is normed and returned as the second value.
        backend: as `backend.resolve` gives it.

    Returns: (R, H), or (normed (R, H), x + residual (R, H)).

    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    if x.dim() != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm takes x (R, H) and weight (H,) of one dtype; got {tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual must be like x, {tuple(x.shape)} {x.dtype}; got {tuple(residual.shape)} {residual.dtype}."
        )
    kernel = pick("rms_norm", backend, x, width=x.shape[1])
    if kernel is not None:
        normed, total = kernel(x, weight, eps, residual)
        return normed if residual is None else (normed, total)
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if residual is None else (normed, x)
