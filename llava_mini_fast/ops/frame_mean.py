"""frame_mean: the mean over frames of fused text rows, summed in float32 while frames stream by."""

from __future__ import annotations

import torch
from torch import Tensor


def add_frames(total: Tensor, rows: Tensor, target: Tensor) -> None:
    """Add packed rows to running sums, in place: total[target[r]] += rows[r], in float32.

    Args:
        total: (N, H) float32, the sums so far; divide by the number of frames at the end.
        rows: (R, H), any float dtype.
        target: (R,) int64, the row of `total` that each row belongs to.

    Raises:
        ValueError: shapes don't fit or total is not float32.
    """
    if total.dtype != torch.float32 or rows.shape != (target.shape[0], total.shape[1]):
        raise ValueError(
            f"add_frames takes total (N, H) float32, rows (R, H) and target (R,); got {tuple(total.shape)} {total.dtype}, "
            f"{tuple(rows.shape)} and {tuple(target.shape)}."
        )
    total.index_add_(0, target, rows.float())
