"""Compile every kernel for GPUs that are not here, through its own wrapper, and read the machine code.

    python -m llava_mini_fast.triton_kernels.compiled [--out bench/results/triton-compiled-3.9.json]
    python -m llava_mini_fast.triton_kernels.compiled --warm DIR --arch 90      # fills a cache instead (warm.py)

The wrappers run on meta tensors under a driver that only names a target; what they launch is compiled, not run.
Registers, shared memory and instructions come from the binary by the tools that Triton's wheel brings.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from llava_mini_fast.triton_kernels import (
    compressor_attention,
    frame_mean,
    launch,
    prefix_attention,
    rms_norm,
    rope,
    swiglu,
)

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VERSION = ".".join(triton.__version__.split(".")[:2])
"""Triton's, as the results' files are named: each version compiles to other registers and instructions."""
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that one program may have."""
SHARED_PROCESSOR = {80: 167936, 90: 233472, 100: 233472}
"""Bytes of a multiprocessor, of which each program takes 1 KiB more than it asks for."""
WATCHED = {
    "spills": r"STL|LDL",
    "tensor_cores": r"HMMA|HGMMA|UTCHMMA",
    "async_copies": r"LDGSTS|UTMALDG|UBLKCP",
}
ALLOWED: dict[str, frozenset[tuple[str, str, int]]] = {
    "3.6": frozenset(
        {(f"prefix_attention: {n} rows, 8/2 heads of 32", "float32", 80) for n in (8, 15, 60, 500)}
        | {("prefix_attention: 60 rows, 32/32 heads of 128", dtype, 80) for dtype in ("bfloat16", "float16")}
        | {(f"causal_attention: {n} rows, 32/8 heads of 128", "float32", 90) for n in ("577 of 577", "64 of 2944")}
        | {("compressor_attention: 8 frames, Q = 64", dtype, 80) for dtype in ("bfloat16", "float16")}
    )
}
"""Triton's version -> (case, dtype, architecture) of binaries that may spill outside loops. That version's ptxas puts up
to 8 bytes a thread, which are needed behind the loops only, into local memory: stored once before them and loaded once
after them, however many rows there are. Other tiles only move that to other cases. In a loop nothing may spill."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """One way to call a wrapper; `call` is given a maker of meta tensors."""

    op: str
    name: str
    call: Callable
    quick: bool = False
    """Among the few that `make test` compiles."""
    tensor_cores: bool = False
    async_copies: bool = False
    """What 16-bit code of this case has to show."""


@dataclass(frozen=True)
class Compiled:
    """One binary."""

    kernel: str
    case: str
    dtype: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    occupancy: float
    """Warps on a multiprocessor over the 64 it can hold, by registers, shared memory and programs."""
    spills: int
    spills_in_loops: int
    tensor_cores: int
    async_copies: int


def _rms(rows, width, residual):
    def call(make):
        x = make(rows, width)
        rms_norm.run(x, make(width), 1e-5, x if residual else None)

    return call


def _rope(rows, heads, kv_heads, d):
    return lambda make: rope.run(
        make(rows, (heads + 2 * kv_heads) * d), make(rows, dtype=torch.int64), make(4096, d, dtype=torch.float32),
        heads, kv_heads,
    )  # fmt: skip


def _prefix(length, segments, heads, kv_heads, d, prefix=577):
    def call(make):
        rows = length * segments
        state = make(2, 2, 2, prefix, kv_heads, d)
        prefix_attention.run_prefix(
            make(rows, heads, d), make(rows, kv_heads, d), make(rows, kv_heads, d), state[:, 0, 0], state[:, 0, 1],
            make(segments + 1, dtype=torch.int32), make(segments, dtype=torch.int32), length,
        )  # fmt: skip

    return call


def _causal(queries, keys, heads, kv_heads, d):
    return lambda make: prefix_attention.run_causal(
        make(2, queries, heads, d), make(2, keys, kv_heads, d), make(2, keys, kv_heads, d)
    )


def _compressor(frames, queries, rows, width, weights=False):
    return lambda make: compressor_attention.run(
        make(frames, rows, width), make(queries, width, dtype=torch.float32),
        make(queries, rows, dtype=torch.float32), 1e-5, weights,
    )  # fmt: skip


def _add_frames(make):
    f32 = torch.float32
    frame_mean.run(make(20, 4096, dtype=f32), make(160, 4096), make(20, dtype=torch.int64), make(8, dtype=f32))


CASES = [
    Case("rms_norm", "4096, residual", _rms(640, 4096, True), quick=True),
    Case("rms_norm", "4096", _rms(640, 4096, False)),
    Case("rms_norm", "5120", _rms(640, 5120, True)),
    Case("rms_norm", "256", _rms(640, 256, True)),
    Case("rms_norm", "16384", _rms(8, 16384, True)),
    Case("rope", "32 + 2 x 8 heads of 128", _rope(640, 32, 8, 128), quick=True),
    Case("rope", "32 + 2 x 32 heads of 128", _rope(640, 32, 32, 128)),
    Case("rope", "2 x 8 heads of 128", _rope(640, 0, 8, 128)),
    Case("rope", "4 + 2 x 2 heads of 64", _rope(640, 4, 2, 64)),
    Case("rope", "4 + 2 x 2 heads of 32", _rope(640, 4, 2, 32)),
    Case("swiglu", "14336", lambda make: swiglu.run(make(640, 2 * 14336)), quick=True),
    Case("swiglu", "11008", lambda make: swiglu.run(make(640, 2 * 11008))),
    Case("swiglu", "512", lambda make: swiglu.run(make(640, 1024))),
    Case("add_frames", "8 x 20 x 4096", _add_frames, quick=True),
    *(
        Case(
            "prefix_attention", f"{length} rows, {heads}/{kv_heads} heads of {d}",
            _prefix(length, 4, heads, kv_heads, d),
            quick=length == 60 and kv_heads == 8 and d == 128, tensor_cores=True, async_copies=True,
        )
        for heads, kv_heads, d in ((32, 8, 128), (32, 32, 128), (8, 2, 64), (8, 2, 32))
        for length in (1, 8, 15, 60, 500)
    ),
    *(
        Case(
            "causal_attention", f"{queries} of {keys} rows, {heads}/{kv_heads} heads of {d}",
            _causal(queries, keys, heads, kv_heads, d), tensor_cores=True, async_copies=True,
        )
        for heads, kv_heads, d in ((32, 8, 128), (32, 32, 128), (8, 2, 64))
        for queries, keys in ((577, 577), (1, 577), (64, 2944))
    ),
    Case("compressor_attention", "1 frame, Q = 1", _compressor(1, 8, 576, 1024), async_copies=True),
    Case("compressor_attention", "64 frames, Q = 1", _compressor(200, 8, 576, 1024), async_copies=True),
    Case(
        "compressor_attention", "1 frame, Q = 64", _compressor(1, 512, 2304, 1024),
        quick=True, tensor_cores=True, async_copies=True,
    ),
    Case(
        "compressor_attention", "8 frames, Q = 64", _compressor(8, 512, 2304, 1024),
        tensor_cores=True, async_copies=True,
    ),
    Case("compressor_attention", "weights, Q = 4", _compressor(1, 32, 576, 1024, weights=True), tensor_cores=True),
    Case("compressor_attention", "width 64, Q = 1", _compressor(1, 8, 576, 64)),
    Case("compressor_attention", "width 576, Q = 4", _compressor(2, 32, 576, 576), tensor_cores=True),
]  # fmt: skip


class _Driver:
    """Names a target; there is nothing behind it."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Launches within are compiled for sm_`arch` and appended, as (kernel name, compiled kernel), to the list given."""
    launches, run, active = [], JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(_Driver(arch))
    launch._hardware.cache_clear()
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = active  # `reset_active` looks for a real driver
        launch._hardware.cache_clear()


def compile_case(case: Case, dtype: torch.dtype, arch: int) -> list[Compiled]:
    """Every kernel that the case launches in `dtype` on sm_`arch`."""

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with compiling(arch) as launches:
        case.call(make)
    return [_read(name, kernel, case, dtype, arch) for name, kernel in launches]


def _read(name: str, kernel, case: Case, dtype: torch.dtype, arch: int) -> Compiled:
    usage, code = _inspect(kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    counts = {what: len(re.findall(rf"\b(?:{names})\b", code)) for what, names in WATCHED.items()}
    occupied = occupancy(warps, registers, shared, arch)
    return Compiled(
        name, f"{case.op}: {case.name}", str(dtype).removeprefix("torch."), arch, warps, registers, stack, shared,
        occupied, spills_in_loops=spills_in_loops(code), **counts,
    )  # fmt: skip


def spills_in_loops(code: str) -> int:
    """Local loads and stores between a label and a jump back to it."""
    lines, labels, looping = code.splitlines(), {}, set()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            looping.update(range(labels[jump[1]], number))
    return sum(re.search(rf"\b(?:{WATCHED['spills']})\b", lines[number]) is not None for number in looping)


def occupancy(warps: int, registers: int, shared: int, arch: int) -> float:
    """Of the 64 warps of a multiprocessor with 65536 registers, given out a warp at a time in units of 256."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED_PROCESSOR[arch] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def problems(case: Case, compiled: Compiled) -> list[str]:
    """What is wrong with one binary: sentences, none when all is well."""
    wrong = []
    allowed = (compiled.case, compiled.dtype, compiled.arch) in ALLOWED.get(VERSION, ())
    if compiled.spills_in_loops or ((compiled.spills or compiled.stack) and not allowed):
        where = f"{compiled.spills_in_loops} of them in loops, {compiled.stack} bytes of stack"
        wrong.append(f"spills: {compiled.spills} local loads and stores, {where}")
    if compiled.shared > SHARED_LIMIT[compiled.arch]:
        wrong.append(f"{compiled.shared} bytes of shared memory; the limit is {SHARED_LIMIT[compiled.arch]}")
    main = compiled.kernel in ("prefix_attention_kernel", "compressor_attention_kernel")
    if main and compiled.dtype != "float32":
        if case.tensor_cores and not compiled.tensor_cores:
            wrong.append("no tensor core instruction")
        if case.async_copies and not compiled.async_copies:
            wrong.append("no asynchronous copy: the loop is not pipelined")
    return [f"{compiled.kernel} ({compiled.case}, {compiled.dtype}, sm_{compiled.arch}): {text}" for text in wrong]


def table(rows: list[Compiled]) -> str:
    """The binaries as text, a line each."""
    header = ("kernel", "case", "dtype", "sm", "warps", "regs", "shared", "occupancy", "spills", "mma", "async")
    lines = [header] + [
        (
            r.kernel, r.case, r.dtype, str(r.arch), str(r.warps), str(r.registers), str(r.shared), f"{r.occupancy:.0%}",
            str(r.spills), str(r.tensor_cores), str(r.async_copies),
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def write(rows: list[Compiled], path: Path) -> None:
    """The binaries as JSON, with the compiler's version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "compiled": [\n  {lines}\n]}}\n', encoding="utf-8")


@cache
def _inspect(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as text; cases often share a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/triton-compiled-{VERSION}.json"))
    parser.add_argument("--quick", action="store_true", help="the few cases of `make test`, sm_80 and sm_90 only")
    parser.add_argument("--warm", type=Path, metavar="DIR", help="fill a Triton cache for --arch and stop")
    parser.add_argument("--place", type=Path, metavar="DIR", help="make a moved cache's paths right and stop")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help="of --warm (default: 90)")
    parser.add_argument(
        "--dtype", action="append", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES],
        help="of --warm's benchmarks and seeded checkpoints; may be repeated (default: all)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.warm or options.place:
        from llava_mini_fast.triton_kernels import warm

        if options.place:
            print(f"{warm.place(options.place)} kernels in {options.place}")
        else:
            warm.everything(
                options.warm, options.arch, [getattr(torch, name) for name in options.dtype or ()] or DTYPES
            )
        return
    rows, wrong = [], []
    for case in CASES:
        if options.quick and not case.quick:
            continue
        for dtype in DTYPES:
            for arch in ARCHITECTURES[: 2 if options.quick else 3]:
                made = compile_case(case, dtype, arch)
                rows += made
                print(".", end="", flush=True)
                wrong += [text for one in made for text in problems(case, one)]
    print()
    print(table(rows))
    write(rows, options.out)
    print(
        "\n".join(wrong)
        or "no spills but those allowed, shared memory within its limits, tensor cores and copies where they must be"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
