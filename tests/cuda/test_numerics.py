"""Every CUDA kernel against the specification by the numerics law, at awkward shapes: on the CPU under several schedules of its
threads, and marked `gpu` on a device. The kernels of test_twins.py must fail the same checks.
"""

import pytest
import torch

from llava_mini_fast import reference as spec
from llava_mini_fast.ops import cuda, cuda_cpu
from llava_mini_fast.ops.compressor_attention import compressor_attention
from llava_mini_fast.ops.frame_mean import add_frames
from llava_mini_fast.ops.prefix_attention import causal_attention, prefix_attention
from llava_mini_fast.ops.rms_norm import rms_norm
from llava_mini_fast.ops.rope import rope
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.ops.swiglu import swiglu
from llava_mini_fast.testing.numerics import assert_attention, assert_law, assert_prefix_attention, draw, oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda-cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, poisoned):
    """(backend, device)."""
    if request.param == "cuda-cpu":
        request.getfixturevalue("cuda_cpu_library")
        return "cuda-cpu", "cpu"
    if reason := cuda.missing():
        pytest.fail(f"{reason}.", pytrace=False)
    return "cuda", "cuda"


@pytest.fixture(params=[1, 2])
def seed(request, monkeypatch):
    """The schedule of threads, on the CPU."""
    monkeypatch.setenv("LMF_SEED", str(request.param))
    return request.param


def strided(x, device):
    """x on a device as a view whose rows lie further apart than they are long, NaN between them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide.to(device)[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 96), (3, 77), (2, 2056)])
def test_rms_norm(place, seed, dtype, rows, width):
    backend, device = place
    x, residual, weight = (draw(*s, seed=i).to(dtype) for i, s in enumerate([(rows, width), (rows, width), (width,)]))
    views = strided(x, device), strided(residual, device)
    added, summed = rms_norm(views[0], weight.to(device), 1e-5, residual=views[1], backend=backend)
    assert torch.equal(summed.cpu(), x + residual)
    if rows:
        expected = spec.rms_norm(summed.cpu().to(oracle(dtype)), weight.to(oracle(dtype)), 1e-5)
        assert_law(added.cpu(), expected, spec.rms_norm(summed.cpu(), weight, 1e-5))
    assert torch.equal(rms_norm(summed, weight.to(device), 1e-5, backend=backend), added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (5, 64), (3, 33), (70, 128)])
def test_swiglu(place, seed, dtype, rows, width):
    backend, device = place
    x = (draw(rows, 2 * width) * 3).to(dtype)
    result = swiglu(strided(x, device), backend=backend)
    assert result.shape == (rows, width)
    if rows:
        gate, up = x.to(oracle(dtype)).chunk(2, dim=-1)
        assert_law(result.cpu(), spec.swiglu(gate, up), spec.swiglu(*x.chunk(2, dim=-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 16), (3, 3, 64), (0, 2, 128), (1, 1, 6)])
def test_rope(place, seed, dtype, heads, kv_heads, d):
    backend, device = place
    packed = draw(9, (heads + 2 * kv_heads) * d).to(dtype)
    positions = torch.tensor([0, 1, 5, 5, 576, 2, 3000, 7, 8])
    frequencies = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(4000)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(device)
    q, k, v = rope(strided(packed, device), positions.to(device), table, heads, kv_heads, backend=backend)
    qs, ks, vs = packed.split([heads * d, kv_heads * d, kv_heads * d], dim=1)
    assert q.shape == (9, heads, d) and torch.equal(v.flatten(1).cpu(), vs)
    wide = oracle(dtype)
    for result, source, count in ((q, qs, heads), (k, ks, kv_heads)):
        if count:
            expected = spec.rotate(spec.heads(source.to(wide), count), positions, frequencies.to(wide))
            plain = spec.rotate(spec.heads(source, count), positions, frequencies.float()).to(dtype)
            assert_law(result.transpose(0, 1).cpu(), expected, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 33])
def test_add_frames(place, seed, dtype, width):
    backend, device = place
    total, rows = draw(4, width).float(), draw(3 * 2, width, seed=1).to(dtype)
    target, times = torch.tensor([3, 0]), torch.tensor([1.0, 0.0, 2.0])
    expected, plain = total.double(), total.clone()
    for frame, count in zip(rows.unflatten(0, (3, 2)), times):
        expected[target] += frame.double() * count
        plain[target] += frame.float() * count
    sums = strided(total, device)
    add_frames(sums, strided(rows, device), target.to(device), times.to(device), backend=backend)
    assert_law(sums.cpu(), expected, plain)
    assert torch.equal(sums.cpu()[[1, 2]], total[[1, 2]])


ATTENTION = [(2, 2, 32, 13), (4, 1, 64, 70), (4, 2, 128, 0), (8, 2, 128, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d", "prefix"), ATTENTION)
def test_prefix_attention(place, seed, dtype, heads, kv_heads, d, prefix):
    backend, device = place
    lengths, used = [3, 0, 1, 37, 5], [1, 0, 2, 0, 1]
    rows = sum(lengths)
    q, k, v = (draw(rows, n, d, seed=i).to(dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))
    pk, pv = (draw(3, prefix, kv_heads, d, seed=8 + i).to(dtype) for i in range(2))
    segments = Segments.of(lengths, used, device)
    result = prefix_attention(*(strided(x, device) for x in (q, k, v, pk, pv)), segments, backend=backend).cpu()
    assert_prefix_attention(result, (q, k, v), (pk, pv), lengths, used)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("last", "rows", "d"), [(1, 11, 32), (4, 70, 64), (35, 35, 128), (0, 3, 32)])
def test_causal_attention(place, seed, dtype, last, rows, d):
    backend, device = place
    q, k, v = (draw(2, n, h, d, seed=h + n).to(dtype) for n, h in ((last, 4), (rows, 2), (rows, 2)))
    result = causal_attention(*(strided(x, device) for x in (q, k, v)), backend=backend).cpu()
    assert result.shape == q.shape
    for frame in range(2 if last else 0):
        assert_attention(result[frame], q[frame], k[frame], v[frame])


COMPRESSOR = [(8, 1, 64), (8, 150, 1024), (40, 67, 640), (64, 36, 128), (16, 17, 512)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "rows", "width"), COMPRESSOR)
def test_compressor_attention(place, seed, dtype, queries, rows, width):
    backend, device = place
    features = (draw(2, rows, width) * 3 + 1).to(dtype)
    weight, bias = draw(queries, width, seed=1).float() / 8, draw(queries, rows, seed=2).float()
    inputs = strided(features, device), weight.to(device), bias.to(device)
    pooled, weights = compressor_attention(*inputs, eps=1e-5, return_weights=True, backend=backend)
    assert torch.equal(pooled, compressor_attention(*inputs, eps=1e-5, backend=backend))

    def plain(x, w, b):
        one, zero = torch.ones(width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
        y = spec.layer_norm(x, one, zero, 1e-5)
        shares = (w @ y.mT + b).softmax(-1)
        return shares @ y, shares

    expected = plain(features.double(), weight.double(), bias.double())
    for result, exact, rounded in zip((pooled, weights), expected, plain(features, weight.to(dtype), bias.to(dtype))):
        assert_law(result.cpu(), exact, rounded)


def test_no_frames_and_no_rows(place):
    backend, device = place
    weight, bias = torch.ones(8, 64, device=device), torch.ones(8, 5, device=device)
    pooled = compressor_attention(torch.ones(0, 5, 64, device=device), weight, bias, eps=1e-5, backend=backend)
    assert pooled.shape == (0, 8, 64)
    empty = torch.ones(0, 2, 32, device=device)
    prefix = torch.ones(1, 3, 2, 32, device=device)
    segments = Segments.of([0], [0], device)
    assert prefix_attention(*[empty] * 3, prefix, prefix, segments, backend=backend).shape == (0, 2, 32)
    total = torch.ones(2, 8, device=device)
    add_frames(total, total[:0], torch.arange(2, device=device), torch.ones(0, device=device), backend=backend)
    assert torch.equal(total.cpu(), torch.ones(2, 8))


def test_torch_knows_the_ops(place):
    """Schemas say what is written to, and the fakes give what the ops give: torch.compile builds on both."""
    backend, device = place
    ops = (cuda if backend == "cuda" else cuda_cpu).OPS
    x, positions = torch.ones(3, 64, device=device), torch.arange(3, device=device)
    rows, prefix = torch.ones(3, 2, 32, device=device), torch.ones(1, 4, 2, 32, device=device)
    segments = Segments.of([3], [0], device)
    arguments = {
        "rms_norm": (x, x[0], 1e-5, None),
        "rope": (x, positions, torch.ones(9, 16, device=device), 2, 1),
        "swiglu": (x,),
        "add_frames": (torch.zeros(4, 64, device=device), x, positions, torch.ones(1, device=device)),
        "causal_attention": (prefix[:, 1:], prefix, prefix),
        "prefix_attention": (rows, rows, rows, prefix, prefix, segments.starts, segments.slots, 3),
        "compressor_attention": (
            x[None],
            torch.ones(8, 64, device=device),
            torch.ones(8, 3, device=device),
            1e-5,
            True,
        ),
    }
    assert set(arguments) == set(ops)
    for name, given in arguments.items():
        torch.library.opcheck(ops[name], given, test_utils=("test_schema", "test_faketensor"))
