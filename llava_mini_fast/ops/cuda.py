"""The CUDA kernels of csrc/ as ops: what the compiled module leaves to Python.

The module takes pointers, strides and a stream and knows nothing of torch (csrc/README.md says why); here are allocation, layout
and torch library ops. `ops/cuda_cpu.py` makes the same ops of the same sources built for the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from llava_mini_fast.ops.library import define

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Codes of element types in csrc/common/types.h."""
HEAD_DIMS = (32, 64, 128)
MODULE = "llava_mini_fast._cuda"


@cache
def load() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built.
    """
    return importlib.import_module(MODULE)


def missing() -> str | None:
    """Why the kernels can't run here, or None."""
    try:
        module = load()
    except ModuleNotFoundError:
        return "the CUDA kernels were not built: nvcc was not found, or failed, when the package was installed"
    except ImportError as error:
        return f"the CUDA kernels do not load: {error}"
    found = module.capabilities()
    if found["missing"]:
        return found["missing"]
    capability = torch.cuda.get_device_capability()
    if not runs_on(found["architectures"], *capability):
        return f"the CUDA kernels were built for {found['architectures']}, and this device is {'.'.join(map(str, capability))}"
    return None


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code built for architectures ("80-real,90a-real", named as CMake names them) runs on a device.

    Machine code runs within its major version on the same or a later minor one; with an `a` or `f`, as counted here, on its
    own alone; PTX (without "-real") on everything later.
    """
    device = 10 * major + minor
    for name in architectures.split(","):
        number, _, kind = name.partition("-")
        exact, built = number[-1:] in ("a", "f"), int(number.rstrip("af"))
        if device == built or (not exact and built < device and (built // 10 == major or kind != "real")):
            return True
    return False


def unsupported(op: str, dtype: torch.dtype, **shape: int) -> str | None:
    """Why the kernels can't run `op` on these shapes, or None. shape: as `ops.backend.pick` gets it."""
    reason = unfit(op, dtype, **shape)
    if reason is None and op == "compressor_attention":
        needed = load().compressor_shared_bytes(DTYPES[dtype], shape["queries"], shape["width"])
        limit = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin
        if needed > limit:
            return f"at width {shape['width']} it takes {needed} bytes of shared memory, and this device has {limit}"
    return reason


def unfit(op: str, dtype: torch.dtype, **shape: int) -> str | None:
    """What of `unsupported` no device can change."""
    if dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if op in ("causal_attention", "prefix_attention") and shape["head_dim"] not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}; got {shape['head_dim']}"
    if op == "rope" and shape["head_dim"] % 2:
        return f"head_dim must be even; got {shape['head_dim']}"
    if op == "compressor_attention":
        if shape["width"] % 64 or not 64 <= shape["width"] <= 1024:
            return f"the width must be a multiple of 64 up to 1024; got {shape['width']}"
        if shape["rows"] == 0:
            return "there are no rows"
    return None


def rows_per_split(frames: int, queries: int, rows: int, dtype: torch.dtype, processors: int) -> int:
    """How many of a frame's rows one block of compressor_attention goes through.

    As many splits as fill the device once, each of at least four tiles of rows: a split costs a write and a read of its sums.
    """
    tile, tile_queries = (8, 8) if dtype == torch.float32 else (16, 8 if queries <= 8 else 32)
    blocks = max(1, frames * -(-queries // tile_queries))
    splits = max(1, min(processors // blocks, rows // (4 * tile)))
    return -(-rows // (splits * tile)) * tile


@cache
def processors(device: torch.device) -> int:
    """How many blocks run at a time; 4 on a CPU, where the number is a matter of testing."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def rows_of(x: Tensor) -> Tensor:
    """x with neighbouring elements in its last dimension: x itself but for rare layouts, which are copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """x with every row at a multiple of 16 bytes: x itself but for rare layouts, which are copied."""
    x, step = rows_of(x), 16 // x.element_size()
    if x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def make_ops(namespace: str, load_module: Callable[[], ModuleType]) -> dict[str, Callable]:
    """The ops of a compiled module as torch library ops, by name.

    Args:
        namespace: of the torch ops.
        load_module: gives the module; called when an op first runs.
    """

    def start(launcher: str, x: Tensor, *arguments) -> None:
        """Call a launcher on x's device and current stream. arguments: tensors go as addresses, None as address 0."""
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.device != x.device:
                raise ValueError(f"{launcher}: all tensors must be on {x.device}; got one on {argument.device}.")
        given = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
        run = getattr(load_module(), launcher)
        if not x.is_cuda:
            run(DTYPES[x.dtype], *given, 0)
            return
        with torch.cuda.device(x.device):
            run(DTYPES[x.dtype], *given, torch.cuda.current_stream(x.device).cuda_stream)

    def rms_norm_outputs(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), total

    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, total = rms_norm_outputs(x, weight, eps, residual)
        if x.numel():
            x, residual = rows_of(x), None if residual is None else rows_of(residual)
            lent = (None, 0) if residual is None else (residual, residual.stride(0))
            summed = None if residual is None else total
            start("rms_norm", x, x, x.stride(0), *lent, weight.contiguous(), normed, summed, *x.shape, eps)
        return normed, total

    def rope_outputs(
        packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            torch.empty(packed.shape[0], count, table.shape[1], dtype=packed.dtype, device=packed.device)
            for count in (heads, kv_heads, kv_heads)
        )
        return q, k, v

    def rope(
        packed: Tensor, positions: Tensor, table: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = rope_outputs(packed, positions, table, heads, kv_heads)
        if packed.numel():
            packed, positions, table = rows_of(packed), positions.contiguous(), rows_of(table)
            places = positions, table, table.stride(0)
            shape = packed.shape[0], heads, kv_heads, table.shape[1]
            start("rope", packed, packed, packed.stride(0), *places, *outputs, *shape)
        return outputs

    def swiglu_output(gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        return torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)

    def swiglu(gate_up: Tensor) -> Tensor:
        out = swiglu_output(gate_up)
        if out.numel():
            gate_up = rows_of(gate_up)
            start("swiglu", gate_up, gate_up, gate_up.stride(0), out, *out.shape)
        return out

    def add_frames(total: Tensor, rows: Tensor, target: Tensor, times: Tensor) -> None:
        if not rows.numel():
            return
        sums, rows = rows_of(total), rows_of(rows)
        shape = times.shape[0], target.shape[0], total.shape[1]
        places = target.contiguous(), times.contiguous()
        start("add_frames", rows, sums, sums.stride(0), rows, rows.stride(0), *places, *shape)
        if sums is not total:
            total.copy_(sums)

    def like_contiguous(q: Tensor, *_) -> Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = like_contiguous(q)
        if out.numel():
            q, k, v = aligned(q), aligned(k), aligned(v)
            frames, queries, heads, d = q.shape
            prefix, kv_heads = k.shape[1] - queries, k.shape[2]
            own = [x[:, prefix:] for x in (k, v)]
            views = [part for x in (q, *own, k, v) for part in (x, *x.stride()[:3])]
            shape = d, heads // kv_heads, kv_heads, frames, queries, prefix
            start("attention", q, *shape, *views, out, None, None)
        return out

    def prefix_attention(
        q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor, slots: Tensor, longest: int
    ) -> Tensor:
        out = like_contiguous(q)
        if out.numel():
            q, k, v = aligned(q), aligned(k), aligned(v)
            prefix, (heads, d), kv_heads = prefix_k.shape[1], q.shape[1:], k.shape[1]
            views = [part for x in (q, k, v) for part in (x, 0, *x.stride()[:2])]
            for own, x in ((k, prefix_k), (v, prefix_v)):
                x = aligned(x)
                # without a prefix there is nothing to point at; some address must stand there
                views += (x, *x.stride()[:3]) if prefix else (own, 0, 0, 0)
            shape = d, heads // kv_heads, kv_heads, slots.shape[0], longest, prefix
            start("attention", q, *shape, *views, out, starts, slots)
        return out

    def compressor_outputs(
        features: Tensor, weight: Tensor, bias: Tensor, eps: float, return_weights: bool
    ) -> tuple[Tensor, Tensor]:
        (frames, rows, width), queries = features.shape, weight.shape[0]
        pooled = torch.empty(frames, queries, width, dtype=torch.float32, device=features.device)
        shape = (frames, queries, rows) if return_weights else (0,)
        return pooled, torch.empty(shape, dtype=torch.float32, device=features.device)

    def compressor_attention(
        features: Tensor, weight: Tensor, bias: Tensor, eps: float, return_weights: bool
    ) -> tuple[Tensor, Tensor]:
        pooled, weights = compressor_outputs(features, weight, bias, eps, return_weights)
        if pooled.numel():
            features = aligned(features)
            (frames, rows, width), queries = features.shape, weight.shape[0]
            step = rows_per_split(frames, queries, rows, features.dtype, processors(features.device))
            splits = -(-rows // step)
            statistics = torch.empty(frames, splits, queries, 2, dtype=torch.float32, device=features.device)
            shape = frames, splits, queries, width
            partial = torch.empty(shape, dtype=torch.float32, device=features.device) if splits > 1 else None
            inputs = features, *features.stride()[:2], aligned(weight.contiguous()), bias.contiguous()
            outputs = pooled, statistics, partial, weights if return_weights else None
            start("compressor_attention", features, *inputs, *outputs, frames, queries, rows, width, step, eps)
        return pooled, weights

    declared = [
        ("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor)", rms_norm, rms_norm_outputs),
        ("rope(Tensor packed, Tensor positions, Tensor table, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)", rope, rope_outputs),
        ("swiglu(Tensor gate_up) -> Tensor", swiglu, swiglu_output),
        ("add_frames(Tensor(a!) total, Tensor rows, Tensor target, Tensor times) -> ()", add_frames, lambda *_: None),
        ("causal_attention(Tensor q, Tensor k, Tensor v) -> Tensor", causal_attention, like_contiguous),
        (
            "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor starts, Tensor slots, int max_length) -> Tensor",
            prefix_attention,
            like_contiguous,
        ),
        (
            "compressor_attention(Tensor features, Tensor weight, Tensor bias, float eps, bool return_weights) -> (Tensor, Tensor)",
            compressor_attention,
            compressor_outputs,
        ),
    ]  # fmt: skip
    return {schema.partition("(")[0]: define(namespace, schema, run, fake) for schema, run, fake in declared}


OPS: dict[str, Callable] = make_ops("llava_mini_cuda", load)
