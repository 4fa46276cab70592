"""Which dtype to compute in, and int8 weights through torchao."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZATIONS = ("int8",)


def choose_dtype(name: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype for a name ("auto" included) on a device, and why, as a clause for people.

    "auto" is bfloat16 where the device multiplies it fast: CUDA from compute capability 8.0, a CPU with AMX or AVX512-BF16
    (through oneDNN). Elsewhere it is float16 on CUDA and float32 on a CPU.

    Raises:
        ValueError: an unknown name.
    """
    name = str(name).removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name], "as asked"
    if name != "auto":
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {name!r}.")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU has bfloat16 tensor cores"
        return torch.float16, "the GPU has no bfloat16 tensor cores"
    instructions = cpu_bfloat16()
    if instructions:
        return torch.bfloat16, f"the CPU has {instructions}, which oneDNN uses"
    return torch.float32, "the CPU has neither AMX nor AVX512-BF16"


def cpu_bfloat16() -> str | None:
    """The CPU's bfloat16 instructions that oneDNN would use ("AMX" or "AVX512-BF16"), or None."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return None


def quantize(modules: list[nn.Module], kind: str) -> None:
    """Replace the weights of every linear layer of `modules`, in place: int8 weights, activations quantized as they come.

    Raises:
        ValueError: an unknown kind. ImportError: torchao is missing; the message says how to get it.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, or None; got {kind!r}.")
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise ImportError("int8 weights need torchao: pip install 'llava-mini-fast[int8]'.") from None
    for module in modules:
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
