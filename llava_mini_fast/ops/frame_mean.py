"""frame_mean: the mean over frames of fused text rows, summed in float32 while frames stream by."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_mini_fast.ops.backend import pick


def add_frames(total: Tensor, rows: Tensor, target: Tensor, times: Tensor, *, backend: str = "torch") -> None:
    """Add one prompt's rows of many frames to its running sum, in place and in float32, frame by frame.

    total[target[l]] += times[t] * rows[t * L + l] for t = 0, 1, ...

    Args:
        total: (N, H) float32, the sums so far; divide by the number of frames at the end.
        rows: (T * L, H), any float dtype: L rows of each of T frames.
        target: (L,) int64, the row of `total` that each of the L rows belongs to; no two alike.
        times: (T,) float32, how often each frame counts.
        backend: as `backend.resolve` gives it.

    Raises:
        ValueError: shapes don't fit, or total or times is not float32.
    """
    frames, length = times.shape[0], target.shape[0]
    if {total.dtype, times.dtype} != {torch.float32} or rows.shape != (frames * length, total.shape[1]):
        raise ValueError(
            f"add_frames takes total (N, H) and times (T,) float32, rows (T * L, H) and target (L,); got {tuple(total.shape)} "
            f"{total.dtype}, {tuple(times.shape)} {times.dtype}, {tuple(rows.shape)} and {tuple(target.shape)}."
        )
    kernel = pick("add_frames", backend, rows, width=total.shape[1])
    if kernel is not None:
        return kernel(total, rows, target, times)
    sums = total[target]
    for frame, count in zip(rows.unflatten(0, (frames, length)), times):
        sums += frame.float() * count
    total[target] = sums
