"""swiglu: gate and up are read once from the packed projection and their product written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_mini_fast.ops.library import define
from llava_mini_fast.triton_kernels.launch import (
    FUSION,
    NAMESPACE,
    NO_CARD,
    cdiv,
    hardware,
    on_device,
    power_of_2,
    tuned,
)


# the number of rows decides nothing: one binary runs any
@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(gate_up, out, stride, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (columns < width)
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    # for very negative gates exp2 gives infinity and the quotient 0, as it should
    product = gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up
    tl.store(out + row * width + columns, product.to(out.dtype.element_ty), mask=inside)


def config(width: int, dtype: torch.dtype, arch: int, card: str = NO_CARD) -> dict[str, int]:
    """16 elements a thread, as in rms_norm; 2048 columns a program, so that even one row of 14336 fills seven of them.
    Narrow rows share a program."""
    block = min(2048, power_of_2(width, 32))
    defaults = {"ROWS": 2048 // block, "BLOCK": block, "num_warps": 4}
    return tuned(defaults, "swiglu", card, dtype, width=width)


def run(gate_up: Tensor) -> Tensor:
    """gate_up (R, 2I), rows of any stride -> (R, I)."""
    out = fake(gate_up)
    rows, width = out.shape
    if not out.numel():
        return out
    if gate_up.stride(1) != 1:  # the projection that makes it gives contiguous rows
        gate_up = gate_up.contiguous()
    settings = config(width, gate_up.dtype, *hardware(gate_up, swiglu_kernel))
    with on_device(gate_up.device):
        swiglu_kernel[(cdiv(rows, settings["ROWS"]), cdiv(width, settings["BLOCK"]))](
            gate_up, out, gate_up.stride(0), rows, width, **settings, **FUSION
        )
    return out


def fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


swiglu = define(NAMESPACE, "swiglu(Tensor gate_up) -> Tensor", run, fake)
