"""The torch implementations against the specification in float64, at awkward shapes, by the numerics law."""

import pytest
import torch

from llava_mini_fast import reference as spec
from llava_mini_fast.ops.compressor_attention import compressor_attention
from llava_mini_fast.ops.frame_mean import add_frames
from llava_mini_fast.ops.prefix_attention import causal_attention, prefix_attention
from llava_mini_fast.ops.rms_norm import rms_norm
from llava_mini_fast.ops.rope import rope
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.ops.swiglu import swiglu
from llava_mini_fast.testing.numerics import assert_attention, assert_law, assert_prefix_attention, draw, oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rms_norm(dtype, rows):
    x, residual, weight = (draw(*s, seed=i).to(dtype) for i, s in enumerate([(rows, 96), (rows, 96), (96,)]))
    wide = oracle(dtype)
    added, summed = rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(summed, x + residual)
    if rows:
        expected = spec.rms_norm(summed.to(wide), weight.to(wide), 1e-5)
        assert_law(added, expected, spec.rms_norm(summed, weight, 1e-5))
    assert torch.equal(rms_norm(summed, weight, 1e-5), added)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    x = draw(5, 64).to(dtype)
    gate, up = x.to(oracle(dtype)).chunk(2, dim=-1)
    assert_law(swiglu(x), spec.swiglu(gate, up), spec.swiglu(*x.chunk(2, dim=-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (0, 2)])
def test_rope(dtype, heads, kv_heads):
    d, rows = 16, 9
    packed = draw(rows, (heads + 2 * kv_heads) * d).to(dtype)
    positions = torch.tensor([0, 1, 5, 5, 576, 2, 3000, 7, 8])
    frequencies = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(4000)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    q, k, v = rope(packed, positions, table, heads, kv_heads)
    qs, ks, vs = packed.split([heads * d, kv_heads * d, kv_heads * d], dim=1)
    assert torch.equal(v.flatten(1), vs)
    wide = oracle(dtype)
    for result, source, count in ((q, qs, heads), (k, ks, kv_heads)):
        if count:
            expected = spec.rotate(spec.heads(source.to(wide), count), positions, frequencies.to(wide))
            plain = spec.rotate(spec.heads(source, count), positions, frequencies.float()).to(dtype)
            assert_law(result.transpose(0, 1), expected, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_prefix_attention_over_ragged_segments(dtype, heads, kv_heads):
    d, prefix, lengths, used = 32, 13, [3, 0, 1, 1, 5], [1, 0, 2, 0, 1]
    rows = sum(lengths)
    q, k, v = (draw(rows, n, d, seed=i).to(dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))
    pk, pv = (draw(3, prefix, kv_heads, d, seed=8 + i).to(dtype) for i in range(2))
    result = prefix_attention(q, k, v, pk, pv, Segments.of(lengths, used, "cpu"))
    assert_prefix_attention(result, (q, k, v), (pk, pv), lengths, used)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [1, 4, 11])
def test_causal_attention_of_the_last_rows(dtype, last):
    q, k, v = (draw(2, n, h, 32, seed=h).to(dtype) for n, h in ((last, 4), (11, 2), (11, 2)))
    result = causal_attention(q, k, v)
    for frame in range(2):
        assert_attention(result[frame], q[frame], k[frame], v[frame])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "patches", "width"), [(1, 576, 64), (64, 36, 128)])
def test_compressor_attention(dtype, queries, patches, width):
    features = (draw(2, patches, width) * 3 + 1).to(dtype)
    weight, bias = draw(8 * queries, width, seed=1).float() / 8, draw(8 * queries, patches, seed=2).float()
    pooled, weights = compressor_attention(features, weight, bias, eps=1e-5, return_weights=True)
    assert torch.equal(pooled, compressor_attention(features, weight, bias, eps=1e-5))

    def plain(x, w, b):
        one, zero = torch.ones(width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
        rows = spec.layer_norm(x, one, zero, 1e-5)
        return (w @ rows.mT + b).softmax(-1) @ rows

    expected = plain(features.double(), weight.double(), bias.double())
    assert_law(pooled, expected, plain(features, weight.to(dtype), bias.to(dtype)))
    assert weights.shape == (2, 8 * queries, patches) and torch.allclose(weights.sum(-1), torch.ones(2, 8 * queries))


def test_add_frames_sums_in_float32():
    total = torch.zeros(3, 8)
    rows = torch.full((4000, 8), 0.1, dtype=torch.bfloat16)
    add_frames(total, rows, torch.tensor([1]), torch.ones(4000))
    assert torch.allclose(total[1], 4000 * rows[0].float()) and not total[[0, 2]].any()


def test_add_frames_counts_frames_and_puts_rows_in_their_places():
    total, rows = torch.ones(4, 8), draw(3 * 2, 8).float()
    add_frames(total, rows, torch.tensor([3, 0]), torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(total[[1, 2]], torch.ones(2, 8))
    assert torch.allclose(total[[3, 0]], 1 + rows[:2] + 2 * rows[4:])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: rms_norm(x, x[0, :3], 1e-5), r"rms_norm takes x \(R, H\)"),
        (lambda x: rms_norm(x, x[0], 1e-5, residual=x[:1]), "residual must be like x"),
        (lambda x: swiglu(x[:, :3]), r"swiglu takes \(R, 2I\)"),
        (lambda x: rope(x, torch.arange(2), torch.zeros(9, 4), 3, 1), "rope takes packed"),
        (lambda x: causal_attention(x[None, :, None], x[None, :2, None], x[None, :2, None]), "causal_attention takes q"),
        (lambda x: prefix_attention(*[x[:, None]] * 3, x[None, :, None], x[None, :, None], Segments.of([3], [0], "cpu")), "lengths must sum"),
        (lambda x: prefix_attention(*[x[:, None]] * 3, x[None, :, None], x[None, :, None], Segments.of([4], [1], "cpu")), r"frames must lie in 0\.\.0"),
        (lambda x: compressor_attention(x[None], x, x[:, :3], eps=1e-5), r"bias must be \(M, N\)"),
        (lambda x: compressor_attention(x[None], x.half(), x[:, :4], eps=1e-5), "must be float32"),
        (lambda x: add_frames(x.half(), x, torch.arange(4), torch.ones(1)), "add_frames takes total"),
        (lambda x: Segments.of([4, 1], [0], "cpu"), "one frame a length"),
    ],
)  # fmt: skip
def test_host_checks_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.ones(4, 8))
