"""One check an op, for the kernels and their broken twins: the specification by the numerics law, under `watch`.

`run` is an op of `triton_kernels.OPS`, or a twin's wrapper of the same signature. Every check raises AssertionError, or
Triton's InterpreterError for a lane out of bounds, when something is wrong.
"""

import torch

from llava_mini_fast import reference as spec
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.testing.numerics import assert_attention, assert_law, assert_prefix_attention, draw, oracle
from llava_mini_fast.triton_kernels.interpreted import watch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spread(x, gap=3):
    """x again, with `gap` NaN elements behind each of its rows (the last dimension): another stride, same values."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def rms_norm(run, dtype, rows=3, width=96, add=True):
    x, residual, weight = (spread(draw(rows, width, seed=n).to(dtype)) for n in range(3))
    weight = weight[:1].flatten() if rows else draw(width).to(dtype)
    with watch(x=x, residual=residual, weight=weight):
        normed, total = run(x, weight, 1e-5, residual if add else None)
    summed = x + residual if add else x
    assert torch.equal(total, summed) if add else total.shape == (0,)
    if rows:
        expected = spec.rms_norm(summed.to(oracle(dtype)), weight.to(oracle(dtype)), 1e-5)
        assert_law(normed, expected, spec.rms_norm(summed, weight, 1e-5), "rms_norm")


def swiglu(run, dtype, rows=3, width=96):
    x = spread(draw(rows, 2 * width).to(dtype) * 4)
    with watch(x=x):
        result = run(x)
    assert result.shape == (rows, width)
    if rows:
        expected = spec.swiglu(*x.to(oracle(dtype)).chunk(2, dim=-1))
        assert_law(result, expected, spec.swiglu(*x.chunk(2, dim=-1)), "swiglu")


def rope(run, dtype, heads=4, kv_heads=2, d=32, rows=5):
    packed = spread(draw(rows, (heads + 2 * kv_heads) * d).to(dtype))
    positions = torch.tensor([0, 1, 576, 576, 3000, 2, 7])[:rows]
    frequencies = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(3001)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    with watch(packed=packed, positions=positions, table=table):
        q, k, v = run(packed, positions, table, heads, kv_heads)
    sources = packed.split([heads * d, kv_heads * d, kv_heads * d], dim=1)
    assert torch.equal(v.flatten(1), sources[2])
    for result, source, count in zip((q, k), sources, (heads, kv_heads)):
        assert result.shape == (rows, count, d)
        if result.numel():
            expected = spec.rotate(
                spec.heads(source.to(oracle(dtype)), count), positions, frequencies.to(oracle(dtype))
            )
            plain = spec.rotate(spec.heads(source, count), positions, frequencies.float()).to(dtype)
            assert_law(result.transpose(0, 1), expected, plain, "rope")


def add_frames(run, dtype, frames=3, length=2, width=96):
    total, rows = draw(5, width, seed=1).float(), draw(frames * length, width).to(dtype)
    target = torch.tensor([3, 0, 4, 1, 2])[:length]
    times = torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0])[:frames]
    expected = total.double()
    added = (rows.double().view(frames, length, width) * times.double().view(-1, 1, 1)).sum(0)
    expected[target] += added
    plain = total.clone()
    plain[target] += (rows.float().view(frames, length, width) * times.view(-1, 1, 1)).sum(0)
    with watch(total=total, rows=rows, target=target, times=times):
        run(total, rows, target, times)
    assert_law(total, expected, plain, "add_frames")


def prefix_attention(run, dtype, heads=4, kv_heads=2, d=32, prefix=13, lengths=(3, 0, 1, 1, 5), used=(1, 0, 2, 0, 1)):
    rows = sum(lengths)
    q, k, v = (draw(rows, n, d, seed=i).to(dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))
    # as in the image state: frames, layers, K and V, rows
    state = draw(3, 2, 2, prefix, kv_heads, d, seed=9).to(dtype)
    prefix_k, prefix_v = state[:, 1, 0], state[:, 1, 1]
    segments = Segments.of(lengths, used, "cpu")
    with watch(q=q, k=k, v=v, state=state, starts=segments.starts, slots=segments.slots) as seen:
        result = run(q, k, v, prefix_k, prefix_v, segments.starts, segments.slots, segments.max_length)
    assert_prefix_attention(result, (q, k, v), (prefix_k, prefix_v), lengths, used)
    return seen


def causal_attention(run, dtype, heads=4, kv_heads=2, d=32, last=4, rows=11):
    q, k, v = (draw(2, n, h, d, seed=h + n).to(dtype) for n, h in ((last, heads), (rows, kv_heads), (rows, kv_heads)))
    with watch(q=q, k=k, v=v) as seen:
        result = run(q, k, v)
    for frame in range(2):
        assert_attention(result[frame], q[frame], k[frame], v[frame], f"the last {last} of {rows} rows")
    return seen


def compressor_attention(run, dtype, frames=2, queries=8, rows=70, width=64, weights=False):
    features = (draw(frames, rows, width) * 3 + 1).to(dtype)
    weight, bias = draw(queries, width, seed=1).float() / 8, draw(queries, rows, seed=2).float()
    with watch(features=features, weight=weight, bias=bias) as seen:
        pooled, attention = run(features, weight, bias, 1e-5, weights)

    def plain(x, w, b):
        one, zero = torch.ones(width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
        y = spec.layer_norm(x, one, zero, 1e-5)
        shares = (w @ y.mT + b).softmax(-1)
        return shares @ y, shares

    if frames:
        expected = plain(features.double(), weight.double(), bias.double())
        simple = plain(features, weight.to(dtype), bias.to(dtype))
        assert_law(pooled, expected[0], simple[0], "pooled")
        if weights:
            assert_law(attention, expected[1], simple[1], "weights")
    assert pooled.shape == (frames, queries, width)
    assert attention.shape == ((frames, queries, rows) if weights else (0,))
    return seen
