"""Every kernel and dtype at awkward shapes: against the specification, NaN-poisoned, in the bounds and race checker."""

import checks
import pytest
import torch
from checks import DTYPES

from llava_mini_fast.triton_kernels import DTYPES as SUPPORTED
from llava_mini_fast.triton_kernels import OPS, unsupported

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def table(op, *rows, slow=()):
    """Parametrise a test by keyword arguments of the op's check, each with every dtype; `slow` ones for `make check`."""
    marked = [pytest.param(op, row, marks=pytest.mark.slow) for row in slow]
    return [*(pytest.param(op, row) for row in rows), *marked]


@dtypes
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        *table("rms_norm", {}, dict(rows=0), dict(rows=1, width=4096, add=False), dict(rows=2, width=1),
               slow=[dict(rows=7, width=5120), dict(rows=2, width=16384)]),
        *table("swiglu", {}, dict(rows=0), dict(rows=1, width=2049), dict(rows=2, width=1),
               slow=[dict(rows=2, width=14336)]),
        *table("rope", {}, dict(rows=0), dict(heads=0), dict(heads=3, kv_heads=3, d=64), dict(heads=17, kv_heads=1, d=128, rows=1),
               slow=[dict(heads=32, kv_heads=8, d=128, rows=7)]),
        *table("add_frames", {}, dict(frames=1, length=1, width=1), dict(frames=5, length=5, width=513), dict(frames=0),
               slow=[dict(frames=5, length=5, width=4096)]),
        *table("prefix_attention", {}, dict(prefix=0), dict(lengths=(1,), used=(2,), prefix=1), dict(lengths=(0, 0), used=(0, 1)),
               dict(heads=3, kv_heads=3, d=64, prefix=64, lengths=(65,), used=(0,)),
               dict(heads=4, kv_heads=1, d=128, prefix=129, lengths=(33, 2), used=(2, 1)),
               slow=[dict(heads=6, kv_heads=2, d=128, prefix=577, lengths=(60, 7, 60), used=(0, 2, 1)),
                     dict(heads=2, kv_heads=2, d=128, prefix=65, lengths=(200,), used=(1,)),
                     dict(heads=8, kv_heads=1, d=64, prefix=3, lengths=(17, 40), used=(0, 0))]),
        *table("causal_attention", {}, dict(last=1), dict(last=11), dict(heads=3, kv_heads=1, d=64, last=33, rows=70),
               slow=[dict(heads=4, kv_heads=4, d=128, last=130, rows=130), dict(d=128, last=4, rows=577)]),
        *table("compressor_attention", {}, dict(rows=1, queries=3), dict(frames=0), dict(rows=37, width=192, weights=True),
               dict(queries=72, rows=36, width=128, frames=1), dict(rows=576, width=256, frames=1),
               slow=[dict(rows=576, width=1024), dict(queries=512, rows=144, width=256), dict(queries=32, rows=65, width=576, weights=True),
                     dict(queries=40, rows=2304, width=64, frames=1)]),
    ],
)  # fmt: skip
def test_obeys_the_law(op, shape, dtype):
    getattr(checks, op)(OPS[op], dtype, **shape)


@dtypes
@pytest.mark.parametrize("op", ["swiglu", "rope", "causal_attention"])
def test_takes_views_whose_last_dimension_is_strided(op, dtype):
    """The wrappers copy these; the result is that of the contiguous tensor."""
    arguments = {
        "swiglu": [checks.draw(3, 64)],
        "rope": [checks.draw(3, 6 * 32), torch.arange(3), checks.draw(9, 32).float(), 2, 2],
        "causal_attention": [checks.draw(1, n, 2, 32) for n in (2, 4, 4)],
    }[op]
    cast = [x.to(dtype) if torch.is_tensor(x) and x.dtype == torch.float64 else x for x in arguments]
    turned = [x.mT.contiguous().mT if torch.is_tensor(x) and x.dim() > 1 else x for x in cast]
    assert any(torch.is_tensor(x) and not x.is_contiguous() for x in turned)
    expected, result = (torch.cat([r.flatten() for r in _tuple(OPS[op](*x))]) for x in (cast, turned))
    assert torch.equal(result, expected)


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_a_mean_of_four_deviations_cancels():
    """LayerNorm is folded around the products: features far from zero
    must not cost digits beyond those that torch's own float32 loses there."""
    for dtype in (torch.float32, torch.bfloat16):
        features = (checks.draw(1, 40, 128) * 3 + 12).to(dtype)
        weight, bias = checks.draw(8, 128, seed=1).float() / 8, checks.draw(8, 40, seed=2).float()
        pooled, _ = OPS["compressor_attention"](features, weight, bias, 1e-5, False)
        y = torch.nn.functional.layer_norm(features.double(), (128,), eps=1e-5)
        expected = (weight.double() @ y.mT + bias.double()).softmax(-1) @ y
        y = torch.nn.functional.layer_norm(features, (128,), eps=1e-5)
        plain = (weight.to(dtype) @ y.mT + bias.to(dtype)).softmax(-1) @ y
        checks.assert_law(pooled, expected, plain)


@pytest.mark.parametrize(
    ("op", "dtype", "shape", "words"),
    [
        ("swiglu", torch.float64, dict(width=4), "float32, float16 and bfloat16, not float64"),
        ("rope", torch.float32, dict(head_dim=48), "head_dim must be 32, 64 or 128; it is 48"),
        ("prefix_attention", torch.float32, dict(head_dim=256, group=1), "head_dim must be"),
        ("rms_norm", torch.float32, dict(width=20000), "width must be at most 16384"),
        ("compressor_attention", torch.float32, dict(queries=8, width=96, rows=4), "a multiple of 64"),
        ("compressor_attention", torch.float32, dict(queries=8, width=1088, rows=4), "up to 1024"),
        ("compressor_attention", torch.float32, dict(queries=8, width=1024, rows=4), None),
        ("add_frames", torch.float16, dict(width=7), None),
    ],
)
def test_unsupported_says_why(op, dtype, shape, words):
    reason = unsupported(op, dtype, **shape)
    assert reason is None if words is None else words in reason
    assert set(SUPPORTED) == set(DTYPES)
