"""Which kernels run an op: torch's, Triton's (triton_kernels/) or CUDA's (csrc/).

A backend is a module with `OPS`, op name -> function, and `unsupported(op, dtype, **shape)`, a sentence on why it can't
run these shapes, or None. Public functions of `ops/` check their arguments, ask `pick`, and run their own torch
implementation where it gives None.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton", "cuda", "cuda-cpu")
"""What a caller may ask for. "cuda-cpu", the CUDA kernels built for the CPU, exists for tests."""
MODULES = {
    "triton": "llava_mini_fast.triton_kernels",
    "cuda": "llava_mini_fast.ops.cuda",
    "cuda-cpu": "llava_mini_fast.ops.cuda_cpu",
}
ENVIRONMENT = "LLAVA_MINI_BACKEND"


def resolve(backend: str, device: torch.device) -> str:
    """What a model is loaded with: `LLAVA_MINI_BACKEND` where it is set, else `backend`, checked to work on `device`.

    "auto" stays "auto", and is decided at each call: torch on a CPU; on CUDA Triton, or CUDA's kernels where Triton is
    missing, but for shapes that `torch_is_faster` names.

    Raises:
        ValueError: an unknown name, or one that can't work here; the message says why.
    """
    name, source = os.environ.get(ENVIRONMENT) or backend, ENVIRONMENT if os.environ.get(ENVIRONMENT) else "backend"
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}.")
    reason = unavailable(name, device)
    if reason:
        raise ValueError(f"{source} is {name!r}, which can't run on {device.type}: {reason}.")
    if name in MODULES:
        _kernels(name)
    return name


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend can't run on a device, or None."""
    if backend in ("auto", "torch"):
        return None
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels need a CUDA device (or TRITON_INTERPRET=1, for tests)"
        return None
    wanted = "cpu" if backend == "cuda-cpu" else "cuda"
    if device.type != wanted:
        return f"the {backend} kernels need a {wanted} device"
    return _kernels(backend).missing()


def pick(op: str, backend: str, x: torch.Tensor, **shape: int) -> Callable | None:
    """The kernel that runs `op` on x, or None where torch's own implementation does.

    Args:
        op: name of a public function of ops/.
        backend: as `resolve` gives it.
        x: the input that decides device and dtype.
        shape: what decides whether a kernel can run, and whether it is worth it; the names are the op's own.
    """
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return None
    if backend == "auto":
        if torch_is_faster(op, x.dtype, **shape):
            return None
        backend = default_for(x.device)
        if backend == "torch":
            return None
    kernels = _kernels(backend)
    reason = kernels.unsupported(op, x.dtype, **shape)
    if reason:
        _say_once(f"{op} runs on torch instead of {backend}: {reason}")
        return None
    return kernels.OPS[op]


def torch_is_faster(op: str, dtype: torch.dtype, **shape: int) -> str | None:
    """Why torch's own kernels are expected to win on CUDA for this shape, or None. The table behind "auto".

    Estimates, from the roofline in docs/kernels.md; a measurement on a device may overrule them.
    """
    if op == "causal_attention" and shape["queries"] == shape["keys"]:
        return (
            "every row asks: SDPA's FlashAttention uses Hopper's wgmma and TMA, which this project's kernels don't, and "
            "there is no ragged batch or prefix to save a copy of"
        )
    if op == "compressor_attention" and dtype == torch.float32 and shape["queries"] > 16:
        return "in float32 two cuBLAS GEMMs and a softmax beat one pass that would read the features 32 times"
    return None


def default_for(device: torch.device) -> str:
    """What "auto" means on a device, where `torch_is_faster` names nothing: torch on a CPU, else Triton, CUDA or torch."""
    return _default_on_cuda() if device.type == "cuda" else "torch"


@cache
def _default_on_cuda() -> str:
    cuda = torch.device("cuda")
    for backend in ("triton", "cuda"):
        reason = unavailable(backend, cuda)
        if reason is None:
            return backend
        _say_once(f"the {backend} kernels are not used: {reason}")
    return "torch"


_LOADED: dict[str, ModuleType] = {}
"""A plain dict: torch.compile looks through functools.cache, at an import that it can't trace. `resolve` fills it."""


def _kernels(backend: str) -> ModuleType:
    if backend not in _LOADED:
        _LOADED[backend] = importlib.import_module(MODULES[backend])
    return _LOADED[backend]


@cache
def _say_once(text: str) -> None:
    logger.warning(text)
