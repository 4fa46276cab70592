"""What every kernel's launch shares: the device, its architecture, and the table of tuned settings."""

from __future__ import annotations

import json
import re
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
INTERPRETER, NO_CARD = "interpreter", "no-card"
"""What stands for the card where Triton interprets, and where code is compiled for a target that is not here."""


def key(op: str, card: str, dtype: torch.dtype, **shape: int) -> str:
    """The name of one row of the table: "swiglu nvidia-h200 bfloat16 width=14336"."""
    names = " ".join(f"{name}={value}" for name, value in shape.items())
    return f"{op} {card} {str(dtype).removeprefix('torch.')} {names}".rstrip()


def tuned(defaults: dict[str, int], op: str, card: str, dtype: torch.dtype, **shape: int) -> dict[str, int]:
    """A kernel's own choice, with what the table says about these shapes on this card written over it."""
    return defaults | TABLE.get(key(op, card, dtype, **shape), {})


def hardware(x: Tensor, kernel: Any) -> tuple[int, str]:
    """Architecture and card of x's own device, whatever the current one is: (90, "nvidia-h200").

    The architecture is 80 in the interpreter, and where the compiler's target is another maker's. The card is what the
    table's rows are named after: H100 and H200 are both sm_90, and differ in bandwidth.
    """
    if isinstance(kernel, InterpretedFunction):
        return 80, INTERPRETER
    return _hardware(x.device)


@cache
def _hardware(device: torch.device) -> tuple[int, str]:
    # the driver is asked, not torch: tests compile for machines that are not here
    with on_device(device):
        arch = driver.active.get_current_target().arch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else NO_CARD
    return arch if isinstance(arch, int) else 80, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processors(arch: int) -> int:
    """Streaming multiprocessors of the architecture's data-centre card (A100, H100 and H200, B200), for filling it."""
    return {80: 108, 90: 132, 100: 148}.get(arch, 108)


def on_device(device: torch.device):
    """Triton launches on the current device, whatever its arguments; this makes it theirs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of 2 that is at least n, and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
