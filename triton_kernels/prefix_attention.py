"""prefix_attention and causal_attention: one kernel, flash attention over a segment's prefix and then over the segment.

A program takes one tile of queries of one segment and one key head. The tile packs the group's query heads, so that
each key and value is read once a tile, whatever the group. Prefix and own rows are two loops over two sets of pointers:
nothing is concatenated. In causal_attention a frame is a segment whose prefix are its first rows.
"""

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

LOG2_E = 1.4426950408889634


@triton.jit
def attend(
    query, keys, values, stride_k, stride_v, first, stop, own, limit, scale, acc, top, total,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax, base 2, of one query tile over rows first .. stop of keys and values."""
    column = tl.arange(0, HEAD_DIM)
    for start in tl.range(first, stop, BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        inside = row < limit
        # int32 within one frame: rows times stride stay far below 2^31
        key = tl.load(keys + row[None, :] * stride_k + column[:, None], mask=inside[None, :], other=0.0)
        value = tl.load(values + row[:, None] * stride_v + column[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(query, key, input_precision=PRECISION) * scale
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (row[None, :] <= own[:, None])
        score = tl.where(visible, score, float("-inf"))
        # never -inf: whichever loop runs first starts at row 0, which every query sees
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


# one binary for any number of rows; as a constant, a single row is unrolled into what spills in float32
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["tiles"])
def prefix_attention_kernel(
    q, k, v, prefix_k, prefix_v, out, starts, slots, scale,
    stride_qf, stride_qr, stride_qh, stride_kf, stride_kr, stride_kh, stride_vf, stride_vr, stride_vh,
    stride_pkf, stride_pkr, stride_pkh, stride_pvf, stride_pvr, stride_pvh, stride_of, stride_or, stride_oh,
    prefix, rows, tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment, tile, kv_head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    if RAGGED:
        begin = tl.load(starts + segment)
        length = tl.load(starts + segment + 1) - begin
        q += begin.to(tl.int64) * stride_qr
        k += begin.to(tl.int64) * stride_kr
        v += begin.to(tl.int64) * stride_vr
        out += begin.to(tl.int64) * stride_or
        frame = tl.load(slots + segment).to(tl.int64)
    else:
        length = rows
        frame = segment.to(tl.int64)
        q += frame * stride_qf
        k += frame * stride_kf
        v += frame * stride_vf
        out += frame * stride_of
    # the image state of many frames is larger than 2^31 elements
    prefix_k += frame * stride_pkf + kv_head * stride_pkh
    prefix_v += frame * stride_pvf + kv_head * stride_pvh
    if tile * BLOCK_M >= length * GROUP:
        return

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    own, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    asked = (own < length)[:, None]
    column = tl.arange(0, HEAD_DIM)[None, :]
    query = tl.load(q + (own * stride_qr + head * stride_qh)[:, None] + column, mask=asked, other=0.0)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = attend(
        query, prefix_k, prefix_v, stride_pkr, stride_pvr, 0, prefix, own, prefix, scale, acc, top, total,
        HEAD_DIM, BLOCK_N, STAGES, False, PRECISION,
    )  # fmt: skip
    last = tl.minimum(length, (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    acc, top, total = attend(
        query, k + kv_head * stride_kh, v + kv_head * stride_vh, stride_kr, stride_vr, 0, last, own, length,
        scale, acc, top, total, HEAD_DIM, BLOCK_N, STAGES, True, PRECISION,
    )  # fmt: skip
    place = out + (own * stride_or + head * stride_oh)[:, None] + column
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=asked)


def config(
    queries: int, group: int, head_dim: int, dtype: torch.dtype, arch: int, card: str = NO_CARD
) -> dict[str, int]:
    """Tiles for segments of at most `queries` rows.

    16-bit: up to 128 packed queries, so that K and V are read from the L2 as seldom as the registers allow (a tile's
    sums are 128 x 128 float32, a quarter of what 8 warps have); fewer where a segment has fewer, since empty rows cost
    as much as full ones. 64 keys, three stages deep, from Hopper on, but on Hopper two for 128 queries of head_dim 64,
    where the third takes registers from a second program; on sm_80 two stages, for its smaller shared memory, 32 keys
    of head_dim 128, as 64 spill, and 8 warps for 64 queries, as 4 spill.
    float32: plain fused multiply-adds, as TF32 breaks the numerics law; small tiles and no pipeline, or the operands
    spill.
    """
    packed = power_of_2(queries * group, 16)
    if dtype == torch.float32:
        defaults = {"BLOCK_M": 16, "BLOCK_N": 32, "STAGES": 1, "num_warps": 8}
    else:
        block = min(128, packed)
        if arch < 90:
            keys, stages = 32 if head_dim == 128 else 64, 2
        else:
            keys, stages = 64, 2 if (block, head_dim) == (128, 64) and arch < 100 else 3
        warps = 8 if block == 128 or (block == 64 and arch < 90) else 4
        defaults = {"BLOCK_M": block, "BLOCK_N": keys, "STAGES": stages, "num_warps": warps}
    return tuned(defaults, "prefix_attention", card, dtype, packed=min(packed, 256), head_dim=head_dim)


def run_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor, slots: Tensor, max_length: int
) -> Tensor:
    """q (R, heads, d), k and v (R, kv_heads, d); prefix_k, prefix_v (F, P, kv_heads, d); starts (S + 1,) and slots (S,)
    int32; any strides but the last -> (R, heads, d).
    """
    out = q.new_empty(q.shape)
    if out.numel():
        q, k, v, prefix_k, prefix_v = (_rows(x) for x in (q, k, v, prefix_k, prefix_v))
        own = (x.unsqueeze(0) for x in (q, k, v))
        segments = (starts.contiguous(), slots.contiguous())
        _launch(*own, prefix_k, prefix_v, out.unsqueeze(0), segments, slots.shape[0], max_length)
    return out


def run_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (F, n, heads, d), the last n of S rows; k, v (F, S, kv_heads, d); any strides but the last -> like q."""
    out = q.new_empty(q.shape)
    if out.numel():
        q, k, v = (_rows(x) for x in (q, k, v))
        prefix, frames, rows = k.shape[1] - q.shape[1], q.shape[0], q.shape[1]
        _launch(q, k[:, prefix:], v[:, prefix:], k[:, :prefix], v[:, :prefix], out, None, frames, rows)
    return out


def _launch(q, k, v, prefix_k, prefix_v, out, segments, count: int, rows: int) -> None:
    """Tensors (frames, rows, heads, d): one frame of many `segments`, (starts, slots), or a segment a frame."""
    heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    group = heads // kv_heads
    settings = config(rows, group, head_dim, q.dtype, *hardware(q, prefix_attention_kernel))
    tiles = cdiv(rows * group, settings["BLOCK_M"])
    starts, slots = segments or (q, q)  # not read
    strides = [x.stride(n) for x in (q, k, v, prefix_k, prefix_v, out) for n in range(3)]
    with on_device(q.device):
        prefix_attention_kernel[(count * tiles, kv_heads)](
            q, k, v, prefix_k, prefix_v, out, starts, slots, head_dim**-0.5 * LOG2_E, *strides,
            prefix_k.shape[1], rows, tiles,
            GROUP=group, HEAD_DIM=head_dim, RAGGED=segments is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **settings, **FUSION,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Heads with contiguous elements, which q, k, v and the image state have; a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fake_prefix(q, k, v, prefix_k, prefix_v, starts, slots, max_length: int) -> Tensor:
    return q.new_empty(q.shape)


def fake_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


prefix_attention = define(
    NAMESPACE,
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor starts, Tensor slots, "
    "int max_length) -> Tensor",
    run_prefix,
    fake_prefix,
)
causal_attention = define(
    NAMESPACE, "causal_attention(Tensor q, Tensor k, Tensor v) -> Tensor", run_causal, fake_causal
)
