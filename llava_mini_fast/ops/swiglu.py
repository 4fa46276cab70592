"""swiglu: the gate of Llama's MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llava_mini_fast.ops.backend import pick


def swiglu(gate_up: Tensor, *, backend: str = "torch") -> Tensor:
    """gate_up (R, 2I), gate and up side by side -> silu(gate) * up, (R, I), same dtype. backend: of `backend.resolve`.

    Raises:
        ValueError: not two-dimensional, or an odd width.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"swiglu takes (R, 2I); got {tuple(gate_up.shape)}.")
    kernel = pick("swiglu", backend, gate_up, width=gate_up.shape[1] // 2)
    if kernel is not None:
        return kernel(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
