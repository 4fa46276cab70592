"""Every kernel and dtype at awkward shapes: against the specification, NaN-poisoned, in the bounds and race checker."""

import checks
import pytest
import torch
from cases import CASES
from checks import DTYPES

from llava_mini_fast.triton_kernels import DTYPES as SUPPORTED
from llava_mini_fast.triton_kernels import OPS, unsupported

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@dtypes
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.slow else []) for case in CASES]
)
def test_obeys_the_law(case, dtype):
    getattr(checks, case.op)(OPS[case.op], dtype, **case.shape)


@dtypes
@pytest.mark.parametrize("op", checks.STRIDED)
def test_takes_views_whose_last_dimension_is_strided(op, dtype):
    checks.strided_views(OPS[op], op, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_mean_of_four_deviations_cancels(dtype):
    checks.far_from_zero(OPS["compressor_attention"], dtype)


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
