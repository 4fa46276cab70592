"""The CUDA kernels of csrc/ as ops."""

from __future__ import annotations

from collections.abc import Callable

OPS: dict[str, Callable] = {}


def missing() -> str | None:
    """Why the kernels can't run here, or None."""
    return "this version ships no CUDA kernels"
