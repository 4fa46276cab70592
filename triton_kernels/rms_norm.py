"""rms_norm: a row a program (narrow ones together), in registers: everything is read once and written once."""

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

MAX_WIDTH = 16384


# the number of rows decides nothing: one binary runs any
@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, residual, weight, out, total, stride_x, stride_residual, rows, width, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    value = tl.load(x + row * stride_x + columns, mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual + row * stride_residual + columns, mask=inside, other=0.0)
        # rounded to the dtype before anything else sees it, as `x + residual` is
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + row * width + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    normed = (wide * scale[:, None]).to(value.dtype)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0)
    tl.store(out + row * width + columns, (normed.to(tl.float32) * factor.to(tl.float32)).to(value.dtype), mask=inside)


def config(width: int, dtype: torch.dtype, arch: int, card: str = NO_CARD) -> dict[str, int]:
    """A row is one block, and narrow rows share a program; warps so that a thread holds 16 elements, which two or four
    16-byte loads bring."""
    block = power_of_2(width, 32)
    rows = max(1, 2048 // block)
    defaults = {"ROWS": rows, "BLOCK": block, "num_warps": min(16, rows * block // 512)}
    return tuned(defaults, "rms_norm", card, dtype, width=width)


def run(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, residual (R, H), rows of any stride; weight (H,) -> normed (R, H), x + residual (R, H) or nothing (0,)."""
    out, total = fake(x, weight, eps, residual)
    rows, width = x.shape
    if not rows:
        return out, total
    # within a row a copy is cheap to avoid: rows of the model's tensors are contiguous, and this makes sure
    x, weight = _rows(x), weight.contiguous()
    residual = x if residual is None else _rows(residual)
    settings = config(width, x.dtype, *hardware(x, rms_norm_kernel))
    with on_device(x.device):
        rms_norm_kernel[(cdiv(rows, settings["ROWS"]),)](
            x, residual, weight, out, total, x.stride(0), residual.stride(0), rows, width, eps,
            ADD=total.dim() == 2, **settings, **FUSION,
        )  # fmt: skip
    return out, total


def fake(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


rms_norm = define(
    NAMESPACE, "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor)", run, fake
)
