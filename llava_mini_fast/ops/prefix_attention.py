"""prefix_attention: text rows over their frame's image state; causal_attention: the image part itself."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mini_fast.ops.backend import pick
from llava_mini_fast.ops.segments import Segments


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "torch") -> Tensor:
    """Causal attention of a frame's last rows over all its rows.

    Args:
        q: (F, n, heads, d), the last n of S rows. k, v: (F, S, kv_heads, d); heads is a multiple of kv_heads.
        backend: as `backend.resolve` gives it.

    Returns: (F, n, heads, d). Query i sees keys 0 .. S - n + i.

    Raises:
        ValueError: shapes don't fit.
    """
    n, rows = q.shape[1], k.shape[1]
    if q.dim() != 4 or k.shape != v.shape or n > rows or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"causal_attention takes q (F, n, heads, d), k and v (F, S >= n, kv_heads, d); got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    kernel = pick(
        "causal_attention", backend, q, queries=n, keys=rows, head_dim=q.shape[3], group=q.shape[2] // k.shape[2]
    )
    if kernel is not None:
        return kernel(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if n == rows:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        mask = torch.ones(n, rows, dtype=torch.bool, device=q.device).tril(rows - n)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, segments: Segments, *, backend: str = "torch"
) -> Tensor:
    """Attention of packed segments, each over one frame's prefix and causally over itself.

    Args:
        q: (R, heads, d). k, v: (R, kv_heads, d). Segments lie one after another.
        prefix_k, prefix_v: (F, P, kv_heads, d), every row visible to every query of a segment that uses the frame.
        segments: whose lengths sum to R.
        backend: as `backend.resolve` gives it.

    Returns: (R, heads, d).

    Raises:
        ValueError: shapes don't fit or a frame is out of range.
    """
    if segments.num_rows != q.shape[0] or k.shape != v.shape or k.shape[0] != q.shape[0]:
        raise ValueError(
            f"prefix_attention: the segments' lengths must sum to the rows of q, k and v; got {segments.num_rows}, "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if prefix_k.shape != prefix_v.shape or prefix_k.shape[2:] != k.shape[1:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"prefix_attention: prefix_k and prefix_v must be (F, P, kv_heads, d) with k's heads {tuple(k.shape[1:])}; "
            f"got {tuple(prefix_k.shape)} and {tuple(prefix_v.shape)}."
        )
    if max(segments.frames, default=-1) >= prefix_k.shape[0]:
        raise ValueError(
            f"prefix_attention: frames must lie in 0..{prefix_k.shape[0] - 1}; got {max(segments.frames)}."
        )
    kernel = pick("prefix_attention", backend, q, head_dim=q.shape[2], group=q.shape[1] // k.shape[1])
    if kernel is not None:
        return kernel(q, k, v, prefix_k, prefix_v, segments.starts, segments.slots, segments.max_length)
    out, start, prefix = torch.empty_like(q), 0, prefix_k.shape[1]
    # segments of one length (the frames of one video, mostly) go through SDPA as one batch
    for length, group in groupby(zip(segments.lengths, segments.frames), key=lambda pair: pair[0]):
        used = [frame for _, frame in group]
        stop = start + length * len(used)
        if length:
            rows = slice(start, stop)
            # not prefix_k[used]: its gradient on a CPU adds a frame's shares up in an order that changes between runs
            frames = torch.tensor(used, device=q.device)
            keys = torch.cat([prefix_k.index_select(0, frames), k[rows].unflatten(0, (-1, length))], dim=1)
            values = torch.cat([prefix_v.index_select(0, frames), v[rows].unflatten(0, (-1, length))], dim=1)
            mask = torch.ones(length, prefix + length, dtype=torch.bool, device=q.device).tril(prefix)
            queries = q[rows].unflatten(0, (-1, length))
            attended = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (queries, keys, values)), attn_mask=mask, enable_gqa=True
            )
            out[rows] = attended.transpose(1, 2).flatten(0, 1)
        start = stop
    return out
