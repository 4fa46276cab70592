"""Per op: the published structure, and other libraries' kernels, to be compared with.

Functions take an op's keyword arguments as `shapes.Shape.make` gives them. A baseline gives what the op gives, so the check
judges it too. FlashAttention and FlashInfer are called where they are installed; no machine with them has run this yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mini_fast.config import COMPRESSOR_HEADS, COMPRESSOR_LN_EPS
from llava_mini_fast.model.compressor import Compressor, resized_positions
from llava_mini_fast.ops.compressor_attention import compressor_attention
from llava_mini_fast.ops.frame_mean import add_frames
from llava_mini_fast.ops.prefix_attention import causal_attention, prefix_attention
from llava_mini_fast.ops.rms_norm import rms_norm
from llava_mini_fast.ops.rope import rope
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.ops.swiglu import swiglu

PUBLIC: dict[str, Callable] = {
    op.__name__: op
    for op in (compressor_attention, prefix_attention, causal_attention, rms_norm, rope, swiglu, add_frames)
}


def call(op: str, inputs: dict[str, Any], backend: str) -> Any:
    """The public op, without the arguments that are for baselines alone."""
    return PUBLIC[op](**{name: x for name, x in inputs.items() if name != "module"}, backend=backend)


def values_of(pooled: Tensor, module: Compressor) -> Tensor:
    """Pooled rows (F, 8Q, D) -> values (F, Q, D): what folding moves from every feature to behind the softmax."""
    d, h = module.width, COMPRESSOR_HEADS
    pooled = (pooled * module.ln_kv.weight.float() + module.ln_kv.bias.float()).to(module.query.dtype)
    weight, bias = module.attn.in_proj_weight[2 * d :], module.attn.in_proj_bias[2 * d :]
    return torch.einsum("fqhd,hed->fqhe", pooled.unflatten(1, (-1, h)), weight.view(h, d // h, d)).flatten(2) + bias


def published_compressor(features: Tensor, module: Compressor, **_: Any) -> Tensor:
    """Multi-head attention with K and V of every feature, up to the output projection: (F, N, D) -> (F, Q, D)."""
    d, grid = module.width, math.isqrt(features.shape[1])
    query = F.layer_norm(module.query, (d,), module.ln_q.weight, module.ln_q.bias, COMPRESSOR_LN_EPS) + module.pos_embed
    rows = F.layer_norm(features, (d,), module.ln_kv.weight, module.ln_kv.bias, COMPRESSOR_LN_EPS)
    positions = resized_positions(module.pos_embed, grid).to(rows.dtype)
    pairs = zip(module.attn.in_proj_weight.chunk(3), module.attn.in_proj_bias.chunk(3))
    q, k, v = (F.linear(x, *pair) for x, pair in zip((query[None], rows + positions, rows), pairs))
    q, k, v = (x.unflatten(-1, (COMPRESSOR_HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """transformers' eager attention: q (F, n, heads, d), k and v (F, S, kv_heads, d), additive mask (n, S)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    weights = q @ k.mT / math.sqrt(q.shape[-1]) + mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def additive(queries: int, keys: int, like: Tensor) -> Tensor:
    """(queries, keys): 0 where the last `queries` of `keys` rows may look, the dtype's lowest number elsewhere."""
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=like.device).triu(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(
        hidden, torch.finfo(like.dtype).min
    )


def published_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager_attention(q, k, v, additive(q.shape[1], k.shape[1], q))


def joined(
    k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, segments: Segments
) -> list[tuple[slice, Tensor, Tensor]]:
    """Per segment with rows: which they are, and its K and V behind its frame's, (P + length, kv_heads, d)."""
    parts, start = [], 0
    for length, frame in zip(segments.lengths, segments.frames):
        rows = slice(start, start + length)
        start += length
        if length:
            parts.append((rows, torch.cat([prefix_k[frame], k[rows]]), torch.cat([prefix_v[frame], v[rows]])))
    return parts


def published_prefix(q: Tensor, segments: Segments, **state: Tensor) -> Tensor:
    """One segment after another, as the published code runs one (frame, prompt) pair after another."""
    out = torch.empty_like(q)
    for rows, keys, values in joined(segments=segments, **state):
        mask = additive(rows.stop - rows.start, len(keys), q)
        out[rows] = eager_attention(q[None, rows], keys[None], values[None], mask)[0]
    return out


def published_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The residual add of LlamaDecoderLayer, then LlamaRMSNorm."""
    total = x + residual
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype), total


def published_rope(packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int):
    """apply_rotary_pos_emb over q and k, cos and sin of both halves, v as it is."""
    d = table.shape[1]
    q, k, v = (x.unflatten(1, (-1, d)) for x in packed.split([heads * d, kv_heads * d, kv_heads * d], dim=1))
    # transformers makes cos and sin in float32 once for all layers and casts them
    cos, sin = (x.repeat(1, 2)[:, None].to(packed.dtype) for x in table[positions].chunk(2, dim=-1))

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    return rotated(q), rotated(k), v


def published_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def published_add_frames(total: Tensor, rows: Tensor, target: Tensor, times: Tensor) -> None:
    """Every frame's rows kept, stacked and summed at the end, in float32."""
    total[target] += (torch.stack(rows.chunk(len(times))).float() * times[:, None, None]).sum(0)


PUBLISHED: dict[str, Callable] = {
    "compressor_attention": published_compressor,
    "prefix_attention": published_prefix,
    "causal_attention": published_causal,
    "rms_norm": published_rms_norm,
    "rope": published_rope,
    "swiglu": published_swiglu,
    "add_frames": published_add_frames,
}


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' sdpa attention: heads of K and V repeated, one call."""
    n, rows, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = None if n == rows else torch.ones(n, rows, dtype=torch.bool, device=q.device).tril(rows - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n == rows).transpose(1, 2)


def sdpa_prefix(q: Tensor, segments: Segments, **state: Tensor) -> Tensor:
    """One call over all segments, padded to the longest, K and V concatenated and padded as well."""
    parts = joined(segments=segments, **state)
    prefix, longest = state["prefix_k"].shape[1], segments.max_length
    queries = q.new_zeros(len(parts), longest, *q.shape[1:])
    keys = q.new_zeros(len(parts), prefix + longest, *state["k"].shape[1:])
    values = torch.zeros_like(keys)
    for index, (rows, k, v) in enumerate(parts):
        queries[index, : rows.stop - rows.start] = q[rows]
        keys[index, : len(k)], values[index, : len(v)] = k, v
    mask = torch.ones(longest, prefix + longest, dtype=torch.bool, device=q.device).tril(prefix)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (queries, keys, values)), attn_mask=mask, enable_gqa=True
    )
    return torch.cat([x[:, : rows.stop - rows.start] for x, (rows, _, _) in zip(out, parts)], dim=1).transpose(0, 1)


def flash_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def flash_prefix(q: Tensor, segments: Segments, **state: Tensor) -> Tensor:
    """FlashAttention's ragged kernel over concatenated K and V; its causal mask ends in the lower right corner, as ours."""
    from flash_attn import flash_attn_varlen_func

    _, keys, values = zip(*joined(segments=segments, **state))
    lengths = [n for n in segments.lengths if n]
    starts = [_starts(counts, q.device) for counts in (lengths, [len(k) for k in keys])]
    longest = max(lengths), max(map(len, keys))
    return flash_attn_varlen_func(q, torch.cat(keys), torch.cat(values), *starts, *longest, causal=True)


def flashinfer_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    return torch.stack([single_prefill_with_kv_cache(*frame, causal=True) for frame in zip(q, k, v)])


def flashinfer_prefix(q: Tensor, segments: Segments, **state: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    parts = joined(segments=segments, **state)
    return torch.cat([single_prefill_with_kv_cache(q[rows], k, v, causal=True) for rows, k, v in parts])


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32), (1, 0))


LIBRARIES: dict[str, dict[str, Callable]] = {
    "sdpa": {"causal_attention": sdpa_causal, "prefix_attention": sdpa_prefix},
    "flash-attn": {"causal_attention": flash_causal, "prefix_attention": flash_prefix},
    "flashinfer": {"causal_attention": flashinfer_causal, "prefix_attention": flashinfer_prefix},
}
"""Library -> op -> what it offers."""


def library_missing(library: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a library's kernels can't be measured here, or None."""
    if library == "sdpa":
        return None
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype == torch.float32:
        return "it takes float16 and bfloat16 alone"
    return None if find_spec(library.replace("-", "_")) else "it is not installed"
