"""compressor_attention: one pass over a frame's features with LayerNorm folded around the two products.

With rows x_n, mean u_n and inverse deviation r_n, LayerNorm's y_n = r_n (x_n - u_n) is never formed: with g_m the sum
of query m's weights
    score_mn  = r_n (w_m . x_n - u_n g_m) + bias_mn
    pooled_m  = sum_n p_mn r_n x_n  -  sum_n p_mn r_n u_n
so the features go to the tensor cores as they were loaded. Both identities hold for the *rounded* weights and
probabilities too, where g_m and the second sum use the rounded values: a large mean cancels to float32's rounding.
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
    processors,
    tuned,
)

MAX_WIDTH = 1024


# one binary for any number of frames, which decides the splits
@triton.jit(do_not_specialize=["splits"])
def compressor_attention_kernel(
    features, weight, bias, pooled, partial, partial_top, partial_total, scores,
    stride_xf, stride_xn, stride_wm, stride_bm, queries, rows, width, eps, split_rows, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr, SPLIT: tl.constexpr, KEEP_SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, split of rows, frame); with SPLIT the sums go to partial, unnormalised."""
    split, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = query < queries
    column = tl.arange(0, BLOCK_D)
    inside = tl.full((BLOCK_D,), True, tl.int1) if WHOLE else column < width
    features += frame * stride_xf

    dtype: tl.constexpr = features.dtype.element_ty
    w = tl.load(
        weight + query[:, None] * stride_wm + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
    ).to(dtype)
    w_sum = tl.sum(w.to(tl.float32), 1)
    if CHUNKS > 1:
        # the width in chunks, one a warp, as a batch of products: in a single product every warp would hold all of w
        w = tl.permute(tl.reshape(w, (BLOCK_M, CHUNKS, BLOCK_D // CHUNKS)), (1, 0, 2))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    shift, total = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    first = split * split_rows
    stop = tl.minimum(first + split_rows, rows)
    for start in tl.range(first, stop, BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        present = row < stop
        x = tl.load(
            features + row[:, None] * stride_xn + column[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        wide = x.to(tl.float32)
        mean = tl.sum(wide, 1) / width
        centred = tl.where(inside[None, :], wide - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)

        if CHUNKS > 1:
            chunks = tl.permute(tl.reshape(x, (BLOCK_N, CHUNKS, BLOCK_D // CHUNKS)), (1, 2, 0))
            score = tl.sum(tl.dot(w, chunks, input_precision=PRECISION), 0)
        else:
            score = tl.dot(w, tl.trans(x), input_precision=PRECISION)
        score = (score - w_sum[:, None] * mean[None, :]) * inverse[None, :]
        where = real[:, None] & present[None, :]
        score = (
            score + tl.load(bias + query[:, None] * stride_bm + row[None, :], mask=where, other=0.0)
        ) * 1.4426950408889634
        if KEEP_SCORES:
            tl.store(scores + (frame * queries + query[:, None]) * rows + row[None, :], score, mask=where)
        # a split is never empty, so every query sees a row in its first tile and the maximum is finite
        score = tl.where(present[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        probability = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        scaled = (probability * inverse[None, :]).to(dtype)
        total = total * shrink + tl.sum(probability, 1)
        shift = shift * shrink + tl.sum(scaled.to(tl.float32) * mean[None, :], 1)
        acc = tl.dot(scaled, x, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    acc -= shift[:, None]
    if SPLIT:
        place = (frame * splits + split) * queries + query
        tl.store(partial_top + place, top, mask=real)
        tl.store(partial_total + place, total, mask=real)
        target = partial
    else:
        place = frame * queries + query
        acc = acc / total[:, None]
        target = pooled
    tl.store(target + place[:, None] * width + column[None, :], acc, mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial, partial_top, partial_total, pooled, queries, width, splits,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """pooled (F, M, D) from unnormalised sums (F, splits, M, D): program (query, frame, piece of the width)."""
    query, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, BLOCK_S)
    present = split < splits
    place = (frame * splits + split) * queries + query
    top = tl.load(partial_top + place, mask=present, other=float("-inf"))
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(partial_total + place, mask=present, other=0.0), 0)
    sums = tl.load(
        partial + place[:, None] * width + column[None, :],
        mask=present[:, None] & (column < width)[None, :],
        other=0.0,
    )
    tl.store(
        pooled + (frame * queries + query) * width + column,
        tl.sum(sums * share[:, None], 0) / total,
        mask=column < width,
    )


@triton.jit
def softmax_kernel(scores, rows, BLOCK: tl.constexpr):
    """Scores in base 2 to attention weights, in place: a query of a frame a program. For heat maps only."""
    place = scores + tl.program_id(0).to(tl.int64) * rows + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < rows
    score = tl.load(place, mask=inside, other=float("-inf"))
    weight = tl.exp2(score - tl.max(score, 0))
    tl.store(place, weight / tl.sum(weight, 0), mask=inside)


def config(
    frames: int,
    queries: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    arch: int,
    card: str = NO_CARD,
    return_weights: bool = False,
) -> dict[str, int]:
    """Tiles, and the rows of a split.

    Queries: 16, the least that the tensor cores take, and as much as 8 warps can hold at width 1024: 16 x 1024 float32
    sums are 64 of a thread's 255 registers, the weights 32, the features being normalised 64 more; 32 queries spill
    (the compile gate showed it). Up to width 512 there is room for 32.
    Rows: 16 a tile, 32 KiB of features at width 1024 in 16 bits. For M = 8, where only memory counts, four stages in
    flight, three on sm_80 with its smaller shared memory; two where the weights are the bottleneck or float32 doubles
    the bytes, and no pipeline where scores are kept in 16 bits (heat maps alone), which would spill with Triton 3.6.
    Splits: enough programs for two on every multiprocessor, but two tiles each at the least, or partial sums
    (M x D float32 a split) would outweigh the features.
    """
    block_m = 32 if queries > 16 and width <= 512 and dtype != torch.float32 else 16
    block_n = 16
    stages = 2 if dtype == torch.float32 or queries > 16 else (3 if arch < 90 else 4)
    if return_weights and dtype != torch.float32:
        stages = 1
    tiles = cdiv(rows, block_n)
    others = frames * cdiv(queries, block_m)
    splits = max(1, min(cdiv(2 * processors(arch), others), tiles // 2, 64))
    defaults = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "num_warps": 8,
        "split_rows": cdiv(tiles, splits) * block_n,
    }  # fmt: skip
    return tuned(defaults, "compressor_attention", card, dtype, queries=queries, rows=rows, width=width)


def run(features: Tensor, weight: Tensor, bias: Tensor, eps: float, return_weights: bool) -> tuple[Tensor, Tensor]:
    """features (F, N, D), any strides but the last; weight (M, D), bias (M, N) float32 -> pooled (F, M, D)
    float32 and the attention weights (F, M, N) float32, or an empty tensor."""
    pooled, weights = fake(features, weight, bias, eps, return_weights)
    frames, rows, width = features.shape
    queries = weight.shape[0]
    if not pooled.numel():
        return pooled, weights
    if not rows:  # a softmax over nothing, as torch's product over no rows gives it
        return pooled.zero_(), weights
    features, weight, bias = (x if x.stride(-1) == 1 else x.contiguous() for x in (features, weight, bias))
    target = hardware(features, compressor_attention_kernel)
    settings = config(frames, queries, rows, width, features.dtype, *target, return_weights)
    split_rows = settings.pop("split_rows")
    splits, block_d = cdiv(rows, split_rows), power_of_2(width)
    # a chunk is at least one step of the tensor cores; float32 has none
    chunks = 1 if features.dtype == torch.float32 else min(settings["num_warps"], block_d // 16)
    partial = pooled.new_empty((frames, splits, queries, width) if splits > 1 else 0)
    top, total = (pooled.new_empty((frames, splits, queries) if splits > 1 else 0) for _ in range(2))
    with on_device(features.device):
        compressor_attention_kernel[(cdiv(queries, settings["BLOCK_M"]), splits, frames)](
            features, weight, bias, pooled, partial, top, total, weights,
            features.stride(0), features.stride(1), weight.stride(0), bias.stride(0),
            queries, rows, width, eps, split_rows, splits,
            BLOCK_D=block_d, CHUNKS=chunks, SPLIT=splits > 1, KEEP_SCORES=return_weights,
            WHOLE=return_weights and block_d == width,  # no masks along the width, or what the scores need would spill
            PRECISION="ieee" if features.dtype == torch.float32 else "tf32", **settings, **FUSION,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(queries, frames, cdiv(width, 128))](
                partial, top, total, pooled, queries, width, splits,
                BLOCK_S=power_of_2(splits), BLOCK_D=128, num_warps=4, **FUSION,
            )  # fmt: skip
        if return_weights:
            softmax_kernel[(frames * queries,)](weights, rows, BLOCK=power_of_2(rows), num_warps=4, **FUSION)
    return pooled, weights


def fake(features: Tensor, weight: Tensor, bias: Tensor, eps: float, return_weights: bool) -> tuple[Tensor, Tensor]:
    frames, rows, width = features.shape
    queries = weight.shape[0]
    pooled = weight.new_empty(frames, queries, width)
    return pooled, weight.new_empty((frames, queries, rows) if return_weights else 0)


compressor_attention = define(
    NAMESPACE,
    "compressor_attention(Tensor features, Tensor weight, Tensor bias, float eps, bool return_weights) "
    "-> (Tensor, Tensor)",
    run,
    fake,
)
