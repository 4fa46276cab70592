"""rope: split packed q, k, v and rotate q and k (Llama's half-split rotary embedding, scaling included)."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_mini_fast.ops.backend import pick


def rope(
    packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int, *, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Split and rotate.

    Args:
        packed: (R, (heads + 2 * kv_heads) * d): q, k, v side by side. heads may be 0 (k and v alone).
        positions: (R,) int64, each row's position.
        table: (P, d) float32, [cos | sin] halves, from `rotary_table`; P beyond every position.
        backend: as `backend.resolve` gives it.

    Returns: q (R, heads, d), k (R, kv_heads, d), v (R, kv_heads, d), packed's dtype; the rotation is done in float32.

    Raises:
        ValueError: shapes don't fit.
    """
    d = table.shape[1]
    if packed.dim() != 2 or packed.shape[1] != (heads + 2 * kv_heads) * d or positions.shape != packed.shape[:1]:
        raise ValueError(
            f"rope takes packed (R, {(heads + 2 * kv_heads) * d}) for {heads} + 2 x {kv_heads} heads of {d}, and positions (R,); "
            f"got {tuple(packed.shape)} and {tuple(positions.shape)}."
        )
    kernel = pick("rope", backend, packed, head_dim=d)
    if kernel is not None:
        return kernel(packed, positions, table, heads, kv_heads)
    rotated, v = packed.unflatten(1, (-1, d)).split([heads + kv_heads, kv_heads], dim=1)
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    low, high = rotated.float().chunk(2, dim=-1)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(packed.dtype)
    q, k = rotated.split([heads, kv_heads], dim=1)
    return q, k, v


def rotary_table(llama_config, rows: int, device: torch.device | str) -> Tensor:
    """(rows, d) float32 [cos | sin] for positions 0.., from transformers' rotary embedding (Llama-3.1's scaling included)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(llama_config)
        cos, sin = rotary(torch.zeros(1, 1, dtype=torch.float32), torch.arange(rows)[None])
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).to(device)
