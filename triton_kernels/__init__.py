"""Triton kernels, one file an op; installed as `llava_mini_fast.triton_kernels`. Nothing else imports triton.

A backend of `llava_mini_fast.ops`: `OPS` holds the ops, `unsupported` says what they can't run. Host checks are the
public functions'; the wrappers here allocate, choose tiles and launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llava_mini_fast.triton_kernels import compressor_attention, frame_mean, prefix_attention, rms_norm, rope, swiglu

OPS: dict[str, Callable] = {
    "add_frames": frame_mean.add_frames,
    "causal_attention": prefix_attention.causal_attention,
    "compressor_attention": compressor_attention.compressor_attention,
    "prefix_attention": prefix_attention.prefix_attention,
    "rms_norm": rms_norm.rms_norm,
    "rope": rope.rope,
    "swiglu": swiglu.swiglu,
}
HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(op: str, dtype: torch.dtype, **shape: int) -> str | None:
    """Why these kernels can't run `op` on these shapes, or None. `shape` has the names of `ops.backend.pick`."""
    if dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if "head_dim" in shape and shape["head_dim"] not in HEAD_DIMS:
        return f"head_dim must be 32, 64 or 128; it is {shape['head_dim']}"
    if op == "rms_norm" and shape["width"] > rms_norm.MAX_WIDTH:
        return f"width must be at most {rms_norm.MAX_WIDTH}, a row in registers; it is {shape['width']}"
    if op == "compressor_attention" and (
        shape["width"] % 64 or not 64 <= shape["width"] <= compressor_attention.MAX_WIDTH
    ):
        return f"width must be a multiple of 64 up to {compressor_attention.MAX_WIDTH}; it is {shape['width']}"
    return None
