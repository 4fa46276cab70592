"""The CUDA kernels of csrc/ built for the CPU, as ops: for tests alone, thousands of times slower than torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from llava_mini_fast.ops.cuda import make_ops
from llava_mini_fast.ops.cuda import unfit as unsupported

__all__ = ["ENVIRONMENT", "OPS", "load", "load_from", "missing", "unsupported"]

ENVIRONMENT = "LLAVA_MINI_CUDA_CPU"
"""Where the library is that tests/cuda builds."""


def load_from(path: str) -> ModuleType:
    """The compiled module at a path, under a name made of the path: pybind11 gives modules of one name only once."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}._cuda_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def load() -> ModuleType:
    """The compiled module that the environment names."""
    return load_from(os.environ[ENVIRONMENT])


def missing() -> str | None:
    """Why the kernels can't run here, or None."""
    path = os.environ.get(ENVIRONMENT)
    if path is None:
        return f"{ENVIRONMENT} does not name the CUDA kernels built for the CPU, which only tests build"
    return None if os.path.exists(path) else f"{ENVIRONMENT} is {path!r}, and there is no such file"


OPS: dict[str, Callable] = make_ops("llava_mini_cuda_cpu", load)
