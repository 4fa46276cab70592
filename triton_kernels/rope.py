"""rope: a row a program (some of its heads): q, k, v are read once from the packed projection and written once."""

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


# the number of rows decides nothing: one binary runs any
@triton.jit(do_not_specialize=["rows"])
def rope_kernel(
    packed, positions, table, q, k, v, stride_packed, stride_table, rows, heads, kv_heads,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    position = tl.load(positions + row, mask=real, other=0)
    row, real = row[:, None, None], real[:, None, None]
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    angle = table + position[:, None, None] * stride_table + column
    cos, sin = tl.load(angle), tl.load(angle + HALF)

    source = packed + row * stride_packed + head * 2 * HALF + column
    inside = real & (head < heads + 2 * kv_heads)
    low, high = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    turned_low = (wide_low * cos - wide_high * sin).to(low.dtype)
    turned_high = (wide_high * cos + wide_low * sin).to(low.dtype)

    # heads lie [q | k | v]: each store is for those of a program's heads that are its own
    place = q + (row * heads + head) * 2 * HALF + column
    mine = real & (head < heads)
    tl.store(place, turned_low, mask=mine)
    tl.store(place + HALF, turned_high, mask=mine)
    place = k + (row * kv_heads + head - heads) * 2 * HALF + column
    mine = real & (head >= heads) & (head < heads + kv_heads)
    tl.store(place, turned_low, mask=mine)
    tl.store(place + HALF, turned_high, mask=mine)
    place = v + (row * kv_heads + head - heads - kv_heads) * 2 * HALF + column
    mine = inside & (head >= heads + kv_heads)
    tl.store(place, low, mask=mine)
    tl.store(place + HALF, high, mask=mine)


def config(head_dim: int, total_heads: int, dtype: torch.dtype, arch: int, card: str = NO_CARD) -> dict[str, int]:
    """Up to 16 heads a program, or the angles would be read more often: 2048 elements of head_dim 128, 16 a thread.
    Rows with fewer elements share a program."""
    block = min(16, power_of_2(total_heads))
    rows = 2048 // (block * head_dim)
    defaults = {"ROWS": max(1, rows), "BLOCK_HEADS": block, "num_warps": 4}
    return tuned(defaults, "rope", card, dtype, head_dim=head_dim, total_heads=total_heads)


def run(packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """packed (R, (heads + 2 kv_heads) * d), rows of any stride; positions (R,) int64; table (P, d) float32 [cos | sin]
    -> q (R, heads, d), k and v (R, kv_heads, d)."""
    q, k, v = fake(packed, positions, table, heads, kv_heads)
    rows, head_dim = packed.shape[0], table.shape[1]
    total = heads + 2 * kv_heads
    if not rows or not total:
        return q, k, v
    packed, table = (x if x.stride(1) == 1 else x.contiguous() for x in (packed, table))
    settings = config(head_dim, total, packed.dtype, *hardware(packed, rope_kernel))
    with on_device(packed.device):
        rope_kernel[(cdiv(rows, settings["ROWS"]), cdiv(total, settings["BLOCK_HEADS"]))](
            packed, positions.contiguous(), table, q, k, v, packed.stride(0), table.stride(0), rows, heads, kv_heads,
            HALF=head_dim // 2, **settings, **FUSION,
        )  # fmt: skip
    return q, k, v


def fake(packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, head_dim = packed.shape[0], table.shape[1]
    return tuple(packed.new_empty(rows, n, head_dim) for n in (heads, kv_heads, kv_heads))


rope = define(
    NAMESPACE,
    "rope(Tensor packed, Tensor positions, Tensor table, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    run,
    fake,
)
