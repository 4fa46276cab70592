"""add_frames: a piece of a text row a program, which walks over the frames; no atomics, so one order of sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_mini_fast.ops.library import define
from llava_mini_fast.triton_kernels.launch import (
    FUSION,
    NAMESPACE,
    NO_CARD,
    cdiv,
    hardware,
    on_device,
    power_of_2,
    tuned,
)


# how many frames and rows there are decides nothing: one binary runs any
@triton.jit(do_not_specialize=["frames", "length"])
def add_frames_kernel(
    total, rows, target, times, stride_total, stride_rows, frames, length, width,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = total + tl.load(target + row) * stride_total + columns
    sums = tl.load(place, mask=inside, other=0.0)
    for frame in tl.range(0, frames, num_stages=STAGES):
        source = rows + (frame * length + row) * stride_rows + columns
        sums += tl.load(times + frame) * tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, sums, mask=inside)


def config(width: int, dtype: torch.dtype, arch: int, card: str = NO_CARD) -> dict[str, int]:
    """512 columns a program, 4 a thread: 20 text rows of 4096 give 160 programs, one for each SM of an H100 and a few
    more. Four frames in flight, since each program waits for memory alone."""
    block = min(512, power_of_2(width, 32))
    defaults = {"BLOCK": block, "STAGES": 4, "num_warps": max(1, block // 128)}
    return tuned(defaults, "add_frames", card, dtype, width=width)


def run(total: Tensor, rows: Tensor, target: Tensor, times: Tensor) -> None:
    """total (N, H) float32, in place; rows (T * L, H); target (L,) int64; times (T,) float32."""
    frames, length, width = times.shape[0], target.shape[0], total.shape[1]
    if not rows.numel():
        return
    if total.stride(1) != 1:
        # a copy could not be written in place; the engine's sums are contiguous
        raise ValueError("add_frames: total must have contiguous rows.")
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    target, times = target.contiguous(), times.contiguous()
    settings = config(width, rows.dtype, *hardware(rows, add_frames_kernel))
    with on_device(rows.device):
        add_frames_kernel[(length, cdiv(width, settings["BLOCK"]))](
            total, rows, target, times, total.stride(0), rows.stride(0), frames, length, width, **settings, **FUSION
        )


def fake(total: Tensor, rows: Tensor, target: Tensor, times: Tensor) -> None:
    return None


add_frames = define(
    NAMESPACE, "add_frames(Tensor(a!) total, Tensor rows, Tensor target, Tensor times) -> ()", run, fake
)
