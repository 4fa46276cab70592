"""What every kernel's launch shares: the device, its architecture, and the table of tuned settings."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

NAMESPACE = "llava_mini_triton"
FUSION = {"enable_fp_fusion": True}
"""Said at every launch: Triton 3.10 turns fused multiply-add off by default, and the rooflines count on it. It changes
rounding only downwards, so the numerics law holds either way."""
TUNED = Path(__file__).with_name("tuned.json")


def _read(path: Path) -> dict[str, dict[str, int]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


TABLE: dict[str, dict[str, int]] = _read(TUNED)
"""`key(...)` -> the settings that a measurement on a device found best. Tuning and tests set entries."""


def key(op: str, arch: int, dtype: torch.dtype, **shape: int) -> str:
    """The name of one row of the table: "swiglu sm90 bfloat16 width=14336"."""
    names = " ".join(f"{name}={value}" for name, value in shape.items())
    return f"{op} sm{arch} {str(dtype).removeprefix('torch.')} {names}".rstrip()


def tuned(defaults: dict[str, int], op: str, arch: int, dtype: torch.dtype, **shape: int) -> dict[str, int]:
    """A kernel's own choice, with what the table says about these shapes on this architecture written over it."""
    return defaults | TABLE.get(key(op, arch, dtype, **shape), {})


def architecture(x: Tensor, kernel: Any) -> int:
    """80, 90, 100, ... of x's device; 80 in the interpreter, and where the compiler's target is another maker's."""
    if isinstance(kernel, InterpretedFunction):
        return 80
    return _architecture(x.device.index)


@cache
def _architecture(index: int | None) -> int:
    # the driver is asked, not torch: tests compile for machines that are not here
    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 80


def processors(arch: int) -> int:
    """Streaming multiprocessors of the architecture's data-centre card (A100, H100 and H200, B200), for filling it."""
    return {80: 108, 90: 132, 100: 148}.get(arch, 108)


def on_device(x: Tensor):
    """Triton launches on the current device, whatever its arguments; this makes it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of 2 that is at least n, and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
