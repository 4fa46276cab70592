"""A Triton cache filled here is found by another process in another folder, and nothing is compiled again."""

import os
import shutil
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

from llava_mini_fast import triton_kernels
from llava_mini_fast.bench import shapes, tune
from llava_mini_fast.triton_kernels import OPS, frame_mean, launch, prefix_attention, rms_norm, swiglu, warm
from llava_mini_fast.triton_kernels.compiled import compiling

JOBS = """
import sys
from pathlib import Path
import torch
from llava_mini_fast.bench import shapes
from llava_mini_fast.triton_kernels import warm
small = [shapes.swiglu("swiglu", 512, 60), shapes.compressor_attention("compressor", 1, 64, 1, 64)]
jobs, folder = list(warm.benchmarks([torch.bfloat16], small)), Path(sys.argv[1])
"""
FILL = 'counts = warm.fill(folder, 90, jobs); print(counts); assert counts["kernels"] == 5 and not counts["refused"]'
USE = """
from unittest import mock
from llava_mini_fast import triton_kernels
from llava_mini_fast.triton_kernels.compiled import compiling
with mock.patch.dict(triton_kernels.OPS, warm.RUNS), compiling(90) as launches:
    for _, call in jobs:
        call()
assert len({kernel.hash for _, kernel in launches}) == 5
"""


def process(code, folder):
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_moved_cache_is_found(tmp_path):
    made, moved, elsewhere = (tmp_path / name for name in ("made", "moved", "elsewhere"))
    process(JOBS + FILL, made)
    kept = files(made)
    assert {path.suffix for path in kept} <= set(warm.KEPT) and len([p for p in kept if p.suffix == ".cubin"]) == 5
    shutil.copytree(made, elsewhere)
    made.rename(moved)
    process(JOBS + "assert warm.place(folder) == 5" + USE, moved)
    assert files(moved) == kept  # nothing was compiled
    process(JOBS + USE, elsewhere)
    assert files(elsewhere) != kept  # and it is `place` that does it: paths are whole


def launched(op, *inputs):
    with compiling(90) as launches:
        op(*inputs)
    return [kernel.hash for _, kernel in launches]


def test_meta_tensors_are_compiled_for_as_real_ones():
    """Triton's key depends on whether a pointer is a multiple of 16; where a meta tensor begins is its offset."""

    def make(device):
        state = torch.empty(3, 2, 2, 577, 8, 128, dtype=torch.bfloat16, device=device)
        q, k = (torch.empty(60, heads, 128, dtype=torch.bfloat16, device=device) for heads in (32, 8))
        starts, slots = (torch.zeros(n, dtype=torch.int32, device=device) for n in (2, 1))
        return q, k, k, state[:, 1, 0], state[:, 1, 1], starts, slots, 60

    assert launched(prefix_attention.run_prefix, *make("meta")) == launched(prefix_attention.run_prefix, *make("cpu"))
    wide = {device: torch.empty(4 * 1024 + 8, dtype=torch.bfloat16, device=device) for device in ("meta", "cpu")}
    keys = {
        (device, offset): launched(swiglu.run, x[offset : offset + 4096].view(4, 1024))[0]
        for device, x in wide.items()
        for offset in (0, 1, 8)
    }
    assert keys["meta", 0] == keys["cpu", 0] == keys["cpu", 8] == keys["meta", 8]
    assert keys["meta", 1] == keys["cpu", 1] != keys["cpu", 0]


def test_one_binary_runs_any_number_of_rows():
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")

    def norm(rows):
        return launched(rms_norm.run, empty(rows, 256), empty(256), 1e-5, None)

    def text(length, segments=1):
        rows, state = length * segments, empty(32, 2, 577, 8, 128)
        starts, slots = (torch.empty(n, dtype=torch.int32, device="meta") for n in (segments + 1, segments))
        q, k = empty(rows, 32, 128), empty(rows, 8, 128)
        return launched(prefix_attention.run_prefix, q, k, k, state[:, 0], state[:, 1], starts, slots, length)

    def mean(frames, length):
        total, times = (torch.empty(*size, device="meta") for size in ((length, 256), (frames,)))
        target = torch.empty(length, dtype=torch.int64, device="meta")
        return launched(frame_mean.run, total, empty(frames * length, 256), target, times)

    assert norm(1) == norm(59) == norm(64)
    assert text(59) == text(60) == text(500) == text(60, 32) != text(1)  # one row is a smaller tile
    assert mean(1, 1) == mean(1, 60) == mean(16, 59) == mean(32, 64)


@pytest.fixture
def recorded(monkeypatch):
    """Launches are noted, not compiled."""
    seen = []

    def note(self, *args, grid, warmup, **kwargs):
        seen.append((self.__name__, kwargs))

    with compiling(90), mock.patch.object(JITFunction, "run", note), mock.patch.dict(triton_kernels.OPS, warm.RUNS):
        yield seen


@torch.no_grad()
def test_the_front_end_launches_every_op(recorded):
    assert set(warm.RUNS) == set(OPS)
    names = [name for name, call in warm.published_checkpoints() if call() is None]
    assert names == [f"front end {m} {kind} torch.bfloat16" for m in ("vicuna", "llama") for kind in (m, "hd")]
    kernels = {name for name, _ in recorded}
    assert kernels == {
        "add_frames_kernel", "combine_kernel", "compressor_attention_kernel", "prefix_attention_kernel",
        "rms_norm_kernel", "rope_kernel", "softmax_kernel", "swiglu_kernel",
    }  # fmt: skip
    tiles = {kwargs["BLOCK_M"] for name, kwargs in recorded if name == "prefix_attention_kernel"}
    assert tiles == {16, 32, 64, 128}
    recorded.clear()
    for _, call in warm.seeded_checkpoints([torch.float32]):
        call()
    assert kernels == {name for name, _ in recorded}


def test_tuning_tries_every_setting_of_the_day(recorded):
    assert {shape.op for shape in tune.DAY} == set(tune._DAY) and len(tune.DAY) == sum(map(len, tune._DAY.values()))
    for op in ("prefix_attention", "compressor_attention"):
        assert len(list(tune.candidates(op))) <= 12
    (shape,) = shapes.select(["swiglu"], ["text60-llama"])
    table = dict(launch.TABLE)
    for _, call in warm.tuning(shapes=[shape]):
        call()
    tried = [{name: kwargs[name] for name in ("BLOCK", "num_warps")} for _, kwargs in recorded]
    assert tried == list(tune.candidates("swiglu")) and table == launch.TABLE


def test_what_a_compiler_refuses_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def refuse():
        raise RuntimeError("too many registers")

    assert warm.fill(tmp_path, 90, [], [("a", refuse), ("b", lambda: None)])["refused"] == 1
    with pytest.raises(RuntimeError, match="too many registers"):
        warm.fill(tmp_path, 90, [("a", refuse)])
