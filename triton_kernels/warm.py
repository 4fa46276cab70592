"""Compile here what a GPU machine would compile at its first launches, into a folder that Triton takes for its cache.

    python -m llava_mini_fast.triton_kernels.compiled --warm DIR --arch 90
    python -m llava_mini_fast.triton_kernels.compiled --place DIR      # there, wherever the folder has been moved to
    TRITON_CACHE_DIR=DIR ...

Triton finds a binary by its own files, the kernels' source and line numbers, and each launch's types and settings: a
folder serves one commit, and both machines must have the same wheel of Triton (for the same Python).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build

from llava_mini_fast import triton_kernels
from llava_mini_fast.bench import baselines, tune
from llava_mini_fast.bench.shapes import HIDDEN, MODELS, SHAPES, Shape
from llava_mini_fast.config import GRID, LlavaMiniConfig
from llava_mini_fast.model.compressor import Compressor
from llava_mini_fast.model.prefusion import PreFusion
from llava_mini_fast.ops.frame_mean import add_frames
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.testing.checkpoints import recipes
from llava_mini_fast.triton_kernels import (
    compressor_attention,
    frame_mean,
    launch,
    prefix_attention,
    rms_norm,
    rope,
    swiglu,
)
from llava_mini_fast.triton_kernels.compiled import DTYPES, SHARED_LIMIT, compiling

Job = tuple[str, Callable[[], object]]
"""A launch in words, and the call that launches it on meta tensors."""
RUNS = {
    "add_frames": frame_mean.run,
    "causal_attention": prefix_attention.run_causal,
    "compressor_attention": compressor_attention.run,
    "prefix_attention": prefix_attention.run_prefix,
    "rms_norm": rms_norm.run,
    "rope": rope.run,
    "swiglu": swiglu.run,
}
"""The wrappers behind `triton_kernels.OPS`: library ops launch nothing on meta tensors."""
LENGTHS = (1, 4, 8, 16, 20, 32, 59, 60, 64, 128, 500)
"""Rows of a question: with each of them every tile that attention takes for groups of 1, 2 and 4 heads, and the largest both
alone and among others."""
MOST_FRAMES = 64
"""Frames that run together at most (`fusion.MAX_CHUNK_VIEWS`): the compressor's splits depend on their number."""
KEPT = (".json", ".cubin", ".so")
"""What Triton's loader reads: what is known of a binary, the binary, and the C function that launches it."""


def benchmarks(dtypes: Sequence[torch.dtype] = DTYPES, shapes: Sequence[Shape] = SHAPES) -> Iterator[Job]:
    """Every shape that the benchmarks measure, and the compressor's weights for heat maps."""
    for shape, dtype in product(shapes, dtypes):
        yield f"{shape.op} {shape.name} {dtype}", partial(_measured, shape, dtype)


def tuning(dtypes: Sequence[torch.dtype] = (torch.bfloat16,), shapes: Sequence[Shape] = tune.DAY) -> Iterator[Job]:
    """Every setting that tuning tries in the rows that matter most. The compiler may refuse some."""
    for shape, dtype in product(shapes, dtypes):
        for settings in tune.candidates(shape.op):
            yield f"{shape.op} {shape.name} {dtype} {settings}", partial(_tried, shape, dtype, settings)


def seeded_checkpoints(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Job]:
    """The front end of every seeded checkpoint: what the goldens launch."""
    for (name, recipe), dtype in product(recipes().items(), dtypes):
        yield f"checkpoint {name} {dtype}", partial(_front_end, _config(recipe), dtype)


def published_checkpoints(dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> Iterator[Job]:
    """The front end at the widths of Llama-3.1-8B and Vicuna-7B, and of the first in high resolution."""
    recipe = {"llama": recipes()["llama31"], "vicuna": recipes()["vicuna"], "hd": recipes()["llama31_hd"]}
    for model, kind, dtype in [(m, k, d) for m in MODELS for k in (m.name, "hd") for d in dtypes]:
        widths = {
            "hidden_size": HIDDEN, "intermediate_size": model.inner, "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
        }  # fmt: skip
        yield f"front end {model.name} {kind} {dtype}", partial(_front_end, _config(recipe[kind], **widths), dtype)


def _config(recipe: dict[str, Any], **changes: int) -> LlavaMiniConfig:
    return LlavaMiniConfig.from_dict(recipe["config"] | {"mm_vision_tower": "none"} | changes)


def _measured(shape: Shape, dtype: torch.dtype) -> None:
    inputs = shape.make(dtype, "meta")
    baselines.call(shape.op, inputs, "triton")
    if shape.op == "compressor_attention":
        baselines.call(shape.op, inputs | {"return_weights": True}, "triton")


class _Always(dict):
    """A table of settings that has one row under every name."""

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self)


def _tried(shape: Shape, dtype: torch.dtype, settings: tune.Settings) -> None:
    with mock.patch.object(launch, "TABLE", _Always(settings)):
        baselines.call(shape.op, shape.make(dtype, "meta"), "triton")


def _front_end(config: LlavaMiniConfig, dtype: torch.dtype) -> None:
    """Compressor, both parts of pre-fusion and the sum over frames, as `FusionFrontEnd` calls them."""
    empty = partial(torch.empty, dtype=dtype, device="meta")
    with torch.device("meta"):
        compressor = Compressor(config.compressor_size, config.mm_hidden_size, "triton").to(dtype)
        layers = PreFusion(config, "triton").to(dtype)
    grid, hidden = GRID**2 * config.resolution_ratio**2, config.hidden_size
    for frames in range(1, MOST_FRAMES + 1):
        compressor(empty(frames, grid, config.mm_hidden_size))
    compressor.attention_map(empty(1, grid, config.mm_hidden_size))
    state = empty(32, *layers.slot_shape())
    for frames in (1, 2):
        patches, compressed = (empty(frames, n, hidden) for n in (config.num_patch_rows, config.num_compressed))
        layers.image_part(patches, compressed, state, range(frames))
    for length, frames in [(n, 1) for n in LENGTHS] + [(59, 32), (60, 32)]:
        segments = Segments.of([length] * frames, range(frames), "meta")
        rows = layers.text_part(empty(length * frames, hidden), segments, state)
        total = torch.empty(length, hidden, device="meta")
        target, times = torch.arange(length, device="meta"), torch.ones(frames, device="meta")
        add_frames(total, rows, target, times, backend="triton")


def fill(folder: Path, arch: int, jobs: Sequence[Job], doubtful: Sequence[Job] = ()) -> dict[str, int]:
    """Compile every job's launches for sm_`arch` into the folder, prune it, and count.

    Args:
        doubtful: jobs that may fail, as settings to try do. Those that take too much shared memory are kept: a launch
            refuses them at once, where without them it would compile first.
    """
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())  # Triton reads it at each compilation
    began, refused = time.monotonic(), 0
    with mock.patch.dict(triton_kernels.OPS, RUNS), torch.no_grad(), compiling(arch) as launches:
        for number, (name, call) in enumerate([*jobs, *doubtful], start=1):
            try:
                call()
            except Exception as error:  # whatever a compiler says of settings that it can't have
                if number <= len(jobs):
                    raise
                print(f"refused: {name}: {type(error).__name__}")
                refused += 1
            if number % 50 == 0:
                seconds = time.monotonic() - began
                print(
                    f"{number} of {len(jobs) + len(doubtful)} jobs, {len(launches)} launches, {seconds:.0f} s",
                    flush=True,
                )
    kernels = {kernel.hash: kernel for _, kernel in launches}
    launchers = build_launchers(list(kernels.values()))
    prune(folder)
    return {
        "jobs": len(jobs) + len(doubtful), "launches": len(launches), "kernels": len(kernels), "launchers": launchers,
        "refused": refused,
        "too much shared memory": sum(k.metadata.shared > SHARED_LIMIT[arch] for k in kernels.values()),
        "seconds": round(time.monotonic() - began),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }  # fmt: skip


def everything(folder: Path, arch: int, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Fill the folder with all that benchmarks, tuning, goldens and the published models launch, and say how much it is."""
    jobs = [*published_checkpoints(), *seeded_checkpoints(dtypes), *benchmarks(dtypes)]
    for what, count in fill(folder, arch, jobs, list(tuning())).items():
        print(f"{what}: {count:,}")


def build_launchers(kernels: Sequence[Any]) -> int:
    """Build the C functions that Triton 3.6 makes for each signature, and count them; 0 where there is no C compiler or
    no Python.h. Later versions have one for all, whose name in the cache holds the machine's own paths: it can only be
    built there."""
    if not hasattr(nvidia, "make_launcher"):
        return 0
    made = set()
    with (
        tempfile.TemporaryDirectory() as stub,
        mock.patch.dict(os.environ, CC=f"{stub}/cc"),
        mock.patch.object(nvidia, "library_dirs", lambda: [stub]),
        mock.patch.object(build, "_load_module_from_path", lambda name, path: made.add(path) or mock.MagicMock()),
    ):
        # the driver's library is not here: launchers are linked against an empty one of its name, and keep the name
        compiler = Path(stub) / "cc"
        compiler.write_text('#!/bin/sh\nexec gcc -Wl,--no-as-needed "$@"\n')
        compiler.chmod(0o755)
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", f"{stub}/libcuda.so.1"]
        try:
            subprocess.run(command, check=True)
            nvidia.CudaUtils()
            for kernel in kernels:
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"launchers are left to the device: {error}")
    return len(made)


def prune(folder: Path) -> None:
    """Delete what no launch reads: sources and the compiler's intermediate texts."""
    for path in folder.glob("*/*"):
        if path.suffix not in KEPT:
            path.unlink()
    place(folder)


def place(folder: Path) -> int:
    """Tell Triton where the folder's files are now, as it keeps whole paths. Returns the number of kernels."""
    groups = list(folder.resolve().glob("*/__grp__*.json"))
    for group in groups:
        name = group.name.removeprefix("__grp__").removesuffix("json")
        paths = {path.name: str(path) for path in group.parent.iterdir() if path.name.startswith(name)}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    return len(groups)
