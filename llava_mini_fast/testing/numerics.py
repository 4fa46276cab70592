"""The numerics law of docs/numerics.md, which kernel tests and benchmarks share, and what the tests judge by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_mini_fast import reference as spec


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers in float64, in a storage of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the reference that a result of `dtype` is judged by."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def law_bound(reference: Tensor, plain: Tensor) -> float:
    """The largest error that a fast result may have.

    Twice the error of the same maths in plain torch at the working dtype, plus the rounding of the reference itself, seen by
    adding and taking away 0.3 (float32's own granularity around the values at hand).

    Args:
        reference: float64 for float32 results, float32 or wider otherwise.
        plain: the same maths by plain torch in the working dtype.
    """
    reference = reference.detach()
    rounding = ((reference.float() + 0.3) - 0.3 - reference.float()).abs().max().item()
    return 2 * (plain.to(reference.dtype) - reference).abs().max().item() + 2 * rounding


def assert_law(result: Tensor, reference: Tensor, plain: Tensor, what: str = "result") -> None:
    """AssertionError, with both numbers, when a result breaks the law; NaN (an unwritten buffer) always breaks it."""
    error = (result.to(reference.dtype) - reference).abs().max().item()
    bound = law_bound(reference, plain)
    assert error <= bound, f"{what}: error {error:.3e} is above the law's bound {bound:.3e}"


def assert_attention(result: Tensor, q: Tensor, k: Tensor, v: Tensor, what: str = "result") -> None:
    """The law for the last rows of a sequence, which see everything up to themselves.

    Args:
        result, q: (rows, heads, d).
        k, v: (keys, kv_heads, d).
    """
    rows, keys = len(q), len(k)
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)

    def attend(*inputs: Tensor) -> Tensor:
        return spec.attention(*(x.transpose(0, 1) for x in inputs), visible).view(q.shape)

    assert_law(result, attend(*(x.to(oracle(result.dtype)) for x in (q, k, v))), attend(q, k, v), what)


def assert_prefix_attention(
    result: Tensor,
    qkv: Sequence[Tensor],
    prefix: Sequence[Tensor],
    lengths: Sequence[int],
    used: Sequence[int],
) -> None:
    """The law for text segments that see their frame's rows and their own earlier ones.

    Args:
        qkv: q (rows, heads, d), k and v (rows, kv_heads, d).
        prefix: k and v (frames, prefix rows, kv_heads, d).
        lengths, used: rows of each segment, and its frame.
    """
    start = 0
    for length, frame in zip(lengths, used):
        part = slice(start, start + length)
        q, k, v = (x[part] for x in qkv)
        if length:
            keys, values = (torch.cat([before[frame], own]) for before, own in zip(prefix, (k, v)))
            assert_attention(result[part], q, keys, values, f"{length} rows over frame {frame}")
        start += length
