"""One check an op, for the kernels and their broken twins: the specification by the numerics law.

`run` is an op of a backend's `OPS`, or a twin's wrapper of the same signature. On the CPU it is Triton's interpreter that
runs it, under `watch`; on a device it runs with `poisoned` allocations. Inputs are drawn and results judged on the CPU.
Every check raises AssertionError, or Triton's InterpreterError for a lane out of bounds, when something is wrong.
"""

from contextlib import contextmanager
from unittest import mock

import torch

from llava_mini_fast import reference as spec
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.testing.numerics import assert_attention, assert_law, assert_prefix_attention, draw, oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spread(x, device, gap=3):
    """x on a device, with `gap` NaN elements behind each of its rows (the last dimension): another stride, same values."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide.to(device)[..., : x.shape[-1]]


@contextmanager
def poisoned():
    """torch.empty and new_empty give NaN: what a kernel leaves unwritten shows, and so does scratch that is read too early."""

    def filled(allocate):
        def run(*args, **kwargs):
            made = allocate(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return run

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
    ):
        yield


@contextmanager
def guarded(device, **tensors):
    """Launches within run under the interpreter's `watch`, which it gives, or on a device with `poisoned` allocations.

    tensors: all that the launches may touch, by name.
    """
    if device == "cpu":
        from llava_mini_fast.triton_kernels.interpreted import watch

        with watch(**tensors) as seen:
            yield seen
        return
    with poisoned():
        yield None
    torch.cuda.synchronize()  # a kernel that fails does so here


def rms_norm(run, dtype, rows=3, width=96, add=True, *, device="cpu"):
    x, residual = (draw(rows, width, seed=n).to(dtype) for n in range(2))
    weight = draw(1, width, seed=2).to(dtype)
    given = dict(x=spread(x, device), residual=spread(residual, device), weight=spread(weight, device).flatten())
    with guarded(device, **given):
        normed, total = run(given["x"], given["weight"], 1e-5, given["residual"] if add else None)
    normed, total, weight = normed.cpu(), total.cpu(), weight.flatten()
    summed = x + residual if add else x
    assert torch.equal(total, summed) if add else total.shape == (0,)
    if rows:
        expected = spec.rms_norm(summed.to(oracle(dtype)), weight.to(oracle(dtype)), 1e-5)
        assert_law(normed, expected, spec.rms_norm(summed, weight, 1e-5), "rms_norm")


def swiglu(run, dtype, rows=3, width=96, *, device="cpu"):
    x = draw(rows, 2 * width).to(dtype) * 4
    given = spread(x, device)
    with guarded(device, x=given):
        result = run(given)
    result = result.cpu()
    assert result.shape == (rows, width)
    if rows:
        expected = spec.swiglu(*x.to(oracle(dtype)).chunk(2, dim=-1))
        assert_law(result, expected, spec.swiglu(*x.chunk(2, dim=-1)), "swiglu")


def rope(run, dtype, heads=4, kv_heads=2, d=32, rows=5, *, device="cpu"):
    packed = draw(rows, (heads + 2 * kv_heads) * d).to(dtype)
    positions = torch.tensor([0, 1, 576, 576, 3000, 2, 7])[:rows]
    frequencies = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(3001)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    given = dict(packed=spread(packed, device), positions=positions.to(device), table=table.to(device))
    with guarded(device, **given):
        results = run(*given.values(), heads, kv_heads)
    q, k, v = (result.cpu() for result in results)
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


def add_frames(run, dtype, frames=3, length=2, width=96, *, device="cpu"):
    total, rows = draw(5, width, seed=1).float(), draw(frames * length, width).to(dtype)
    target = torch.tensor([3, 0, 4, 1, 2])[:length]
    times = torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0])[:frames]
    expected = total.double()
    added = (rows.double().view(frames, length, width) * times.double().view(-1, 1, 1)).sum(0)
    expected[target] += added
    plain = total.clone()
    plain[target] += (rows.float().view(frames, length, width) * times.view(-1, 1, 1)).sum(0)
    given = {name: x.to(device) for name, x in dict(total=total, rows=rows, target=target, times=times).items()}
    with guarded(device, **given):
        run(*given.values())
    assert_law(given["total"].cpu(), expected, plain, "add_frames")


def prefix_attention(
    run, dtype, heads=4, kv_heads=2, d=32, prefix=13, lengths=(3, 0, 1, 1, 5), used=(1, 0, 2, 0, 1), *, device="cpu"
):
    rows = sum(lengths)
    q, k, v = (draw(rows, n, d, seed=i).to(dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))
    # as in the image state: frames, layers, K and V, rows
    state = draw(3, 2, 2, prefix, kv_heads, d, seed=9).to(dtype)
    segments = Segments.of(lengths, used, device)
    own, kept, places = [x.to(device) for x in (q, k, v)], state.to(device), (segments.starts, segments.slots)
    with guarded(device, **dict(zip("qkv", own)), state=kept, starts=places[0], slots=places[1]) as seen:
        result = run(*own, kept[:, 1, 0], kept[:, 1, 1], *places, segments.max_length)
    assert_prefix_attention(result.cpu(), (q, k, v), (state[:, 1, 0], state[:, 1, 1]), lengths, used)
    return seen


def causal_attention(run, dtype, heads=4, kv_heads=2, d=32, last=4, rows=11, *, device="cpu"):
    q, k, v = (draw(2, n, h, d, seed=h + n).to(dtype) for n, h in ((last, heads), (rows, kv_heads), (rows, kv_heads)))
    given = {name: x.to(device) for name, x in zip("qkv", (q, k, v))}
    with guarded(device, **given) as seen:
        result = run(*given.values())
    result = result.cpu()
    for frame in range(2):
        assert_attention(result[frame], q[frame], k[frame], v[frame], f"the last {last} of {rows} rows")
    return seen


def compressor_attention(run, dtype, frames=2, queries=8, rows=70, width=64, weights=False, *, device="cpu"):
    features = (draw(frames, rows, width) * 3 + 1).to(dtype)
    weight, bias = draw(queries, width, seed=1).float() / 8, draw(queries, rows, seed=2).float()
    given = {name: x.to(device) for name, x in dict(features=features, weight=weight, bias=bias).items()}
    with guarded(device, **given) as seen:
        results = run(*given.values(), 1e-5, weights)
    pooled, attention = (result.cpu() for result in results)

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


def far_from_zero(run, dtype, *, device="cpu"):
    """compressor_attention of features whose mean is four deviations off zero: LayerNorm is folded around the products, and
    that must not cost digits beyond those that torch's own float32 loses there."""
    features = (draw(1, 40, 128) * 3 + 12).to(dtype)
    weight, bias = draw(8, 128, seed=1).float() / 8, draw(8, 40, seed=2).float()
    pooled, _ = run(features.to(device), weight.to(device), bias.to(device), 1e-5, False)
    y = torch.nn.functional.layer_norm(features.double(), (128,), eps=1e-5)
    expected = (weight.double() @ y.mT + bias.double()).softmax(-1) @ y
    y = torch.nn.functional.layer_norm(features, (128,), eps=1e-5)
    plain = (weight.to(dtype) @ y.mT + bias.to(dtype)).softmax(-1) @ y
    assert_law(pooled.cpu(), expected, plain)


STRIDED = {
    "rms_norm": lambda: [draw(3, 64), draw(64, seed=1), 1e-5, draw(3, 64, seed=2)],
    "swiglu": lambda: [draw(3, 64)],
    "rope": lambda: [draw(3, 6 * 32), torch.arange(3), draw(9, 32).float(), 2, 2],
    "causal_attention": lambda: [draw(1, n, 2, 32) for n in (2, 4, 4)],
}
"""Ops whose wrappers copy what has no contiguous rows, and their arguments."""


def strided_views(run, op, dtype, *, device="cpu"):
    """Views whose last dimension is strided give what the contiguous tensors give."""
    cast = [x.to(dtype) if torch.is_tensor(x) and x.dtype == torch.float64 else x for x in STRIDED[op]()]
    cast = [x.to(device) if torch.is_tensor(x) else x for x in cast]
    turned = [x.mT.contiguous().mT if torch.is_tensor(x) and x.dim() > 1 else x for x in cast]
    assert any(torch.is_tensor(x) and not x.is_contiguous() for x in turned)
    expected, result = (torch.cat([r.flatten() for r in together(run(*x))]) for x in (cast, turned))
    assert torch.equal(result, expected)


def together(result):
    """An op's results as a tuple."""
    return () if result is None else result if isinstance(result, tuple) else (result,)
