"""The numerics law of docs/numerics.md, as one function that kernel tests and benchmarks share."""

from __future__ import annotations

from torch import Tensor


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
