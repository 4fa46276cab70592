"""What an op must give: its maths by reference.py in any dtype, and the numerics law over candidates and baselines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_mini_fast import reference as spec
from llava_mini_fast.bench.baselines import values_of
from llava_mini_fast.bench.shapes import Inputs, copied
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.terminal import sentence
from llava_mini_fast.testing.numerics import assert_law

Run = Callable[[Inputs], Any]
BASELINE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Relative to the largest value: a baseline that differs by more computes something else and is no baseline."""
FEW_SCORES = 2**21
"""Attention scores of one frame or segment up to which all its heads are judged."""


class Judge:
    """The numerics law for one op and its inputs; the reference is computed once."""

    def __init__(self, op: str, inputs: Inputs, dtype: torch.dtype):
        self.op, self.inputs, self.dtype = op, inputs, dtype
        # what sums in float32 whatever its inputs is held to float32's own rounding
        wide = (
            torch.float64 if dtype == torch.float32 or op in ("compressor_attention", "add_frames") else torch.float32
        )
        self.expected = maths(op, inputs, wide)
        self.plain = maths(op, inputs, dtype)

    def red(self, run: Run) -> str | None:
        """Why a candidate's numbers don't count, or None."""
        try:
            results = self._results(run)
        except Exception as error:  # a kernel that can't be launched must not end the run: its row is red
            return f"{self.op} failed: {sentence(error)}"
        try:
            for index, (result, expected, plain) in enumerate(zip(results, self.expected, self.plain, strict=True)):
                assert_law(result, expected, plain, f"{self.op}, result {index}")
        except AssertionError as error:
            return str(error)
        return None

    def differs(self, name: str, run: Run) -> str | None:
        """Why a baseline is none, or None: it gives other numbers, or fails (another library may refuse any shape)."""
        try:
            error = self._difference(name, run)
        except Exception as reason:
            return f"it failed: {sentence(reason)}"
        return None if error < BASELINE_TOLERANCE[self.dtype] else f"it differs from the op by {error:.1e} (relative)"

    def _difference(self, name: str, run: Run) -> float:
        if self.op == "compressor_attention" and name == "published":
            module = self.inputs["module"]
            results = [run(copied(self.inputs, self.inputs["weight"].device))[:1]]
            expected = [values_of(self.expected[0][:1].float(), module)]
        else:
            results, expected = self._results(run), self.expected
        pairs = zip(results, expected)
        return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)

    def _results(self, run: Run) -> tuple[Tensor, ...]:
        # copies, because add_frames writes into its arguments
        inputs = copied(self.inputs, next(iter(self.inputs.values())).device)
        result = run(inputs)
        for x in result if isinstance(result, tuple) else (result,):
            if x is not None and not x.isfinite().all():
                return tuple(torch.full_like(e, math.nan) for e in self.expected)
        return sample(self.op, inputs, result)


def maths(op: str, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The op by reference.py in `dtype`, on the part of the result that `sample` takes."""
    return _MATHS[op](dtype, **inputs)


def sample(op: str, inputs: dict[str, Any], result: Any) -> tuple[Tensor, ...]:
    """The part of an op's result that is judged: all of it where that is small.

    Of large ones the first and last rows and frames, the first, last and longest segment, and in attentions the first and
    last KV head: the reference in float64 would otherwise take longer than the measurement. That all of it is finite is
    checked apart from this.
    """
    if op == "causal_attention":
        heads, _ = _heads(inputs["q"][0], inputs["k"][0])
        return (result[_ends(len(result), 1)][:, :, heads],)
    if op == "prefix_attention":
        q, k, prefix = inputs["q"], inputs["k"], inputs["prefix_k"]
        return tuple(
            result[rows][:, _heads(q[rows], torch.cat([prefix[frame], k[rows]]))[0]]
            for rows, frame in _segments(inputs["segments"])
        )
    if op == "add_frames":
        return (inputs["total"],)
    ends = 1 if op == "compressor_attention" else 256
    results = result if isinstance(result, tuple) else (result,)
    return tuple(x[_ends(len(x), ends)] for x in results)


def _ends(count: int, each: int) -> list[int]:
    return list(range(count)) if count <= 2 * each else [*range(each), *range(count - each, count)]


def _heads(q: Tensor, k: Tensor) -> tuple[list[int], list[int]]:
    """Query heads and their KV heads that are judged, for q (n, heads, d) and k (S, kv_heads, d).

    All where there are few scores: the largest error of few numbers is too much of a chance to bound another by.
    """
    (queries, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    used = list(range(kv_heads)) if queries * keys * heads <= FEW_SCORES else sorted({0, kv_heads - 1})
    return [h * group + g for h in used for g in range(group)], used


def _segments(segments: Segments) -> list[tuple[slice, int]]:
    """(rows, frame) of the first, the last and the longest segment that have rows."""
    starts = segments.starts.tolist()
    full = [i for i, n in enumerate(segments.lengths) if n]
    chosen = {full[0], full[-1], max(full, key=lambda i: segments.lengths[i])} if full else set()
    return [(slice(starts[i], starts[i + 1]), segments.frames[i]) for i in sorted(chosen)]


def _attend(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """One frame or segment by the specification, a KV head at a time so that the scores stay small."""
    heads, used = _heads(q, k)
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q[:, heads], k[:, used], v[:, used]))
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    parts = [
        spec.attention(q[i * group : (i + 1) * group], k[i : i + 1], v[i : i + 1], visible) for i in range(len(used))
    ]
    return torch.cat(parts, dim=1).view(q.shape[1], len(heads), -1)


def _maths_causal(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (torch.stack([_attend(q[f], k[f], v[f], dtype) for f in _ends(len(q), 1)]),)


def _maths_prefix(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, segments: Segments
) -> tuple[Tensor, ...]:
    return tuple(
        _attend(q[rows], torch.cat([prefix_k[frame], k[rows]]), torch.cat([prefix_v[frame], v[rows]]), dtype)
        for rows, frame in _segments(segments)
    )


def _maths_compressor(
    dtype: torch.dtype, features: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: Any
) -> tuple[Tensor, ...]:
    one = torch.ones(features.shape[-1], dtype=dtype, device=features.device)
    x = features[_ends(len(features), 1)].to(dtype)
    rows = spec.layer_norm(x, one, torch.zeros_like(one), eps)
    return ((weight.to(dtype) @ rows.mT + bias.to(dtype)).softmax(-1) @ rows,)


def _maths_rms_norm(
    dtype: torch.dtype, x: Tensor, weight: Tensor, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]:
    rows = _ends(len(x), 256)
    # the sum is rounded to x's dtype by definition, whatever the norm is computed in
    total = (x[rows] + residual[rows]).to(dtype)
    return spec.rms_norm(total, weight.to(dtype), eps), total


def _maths_rope(
    dtype: torch.dtype, packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, ...]:
    rows, d = _ends(len(packed), 256), table.shape[1]
    q, k, v = (x.unflatten(1, (-1, d)) for x in packed[rows].split([n * d for n in (heads, kv_heads, kv_heads)], dim=1))
    cos, sin = table[positions[rows]].to(dtype)[:, None].chunk(2, dim=-1)

    def rotated(x: Tensor) -> Tensor:
        low, high = x.to(dtype).chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    return rotated(q), rotated(k), v.to(dtype)


def _maths_swiglu(dtype: torch.dtype, gate_up: Tensor) -> tuple[Tensor, ...]:
    return (spec.swiglu(*gate_up[_ends(len(gate_up), 256)].to(dtype).chunk(2, dim=-1)),)


def _maths_add_frames(
    dtype: torch.dtype, total: Tensor, rows: Tensor, target: Tensor, times: Tensor
) -> tuple[Tensor, ...]:
    # sums are float32 at every input dtype, and in wider dtypes for the reference
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = total.to(wide).clone()
    for frame, count in zip(rows.chunk(len(times)), times):
        sums[target] += frame.to(wide) * count.to(wide)
    return (sums,)


_MATHS: dict[str, Callable] = {
    "causal_attention": _maths_causal,
    "prefix_attention": _maths_prefix,
    "compressor_attention": _maths_compressor,
    "rms_norm": _maths_rms_norm,
    "rope": _maths_rope,
    "swiglu": _maths_swiglu,
    "add_frames": _maths_add_frames,
}
