"""What nvcc makes of the kernels: code for every device without a spilled register, tensor-core and asynchronous-copy
instructions where they are meant; and a library that says politely that no device is there."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llava_mini_fast.ops import cuda

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]


def cuobjdump():
    """CUDA's disassembler, or the one that Triton's wheel brings."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(tmp_path, source, architecture):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    cubin = tmp_path / "kernels.cubin"
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]
    done = subprocess.run(["nvcc", *flags, "-cubin", "-o", cubin, CSRC / source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if source not in ("attention/attention.cu", "compressor/compressor.cu") or cuobjdump() is None:
        return
    listing = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : ", listing)[1:]
    fast = [text for text in functions if "tensor_core" in text.split(maxsplit=1)[0]]
    # attention has three head dims in two dtypes, the compressor two tiles of queries at two widths in two dtypes
    assert len(fast) == (6 if source.startswith("attention") else 8)
    for text in fast:
        for instruction in ("HMMA.16816.F32", "LDGSTS", "LDSM"):
            assert instruction in text, f"{text.split(maxsplit=1)[0]} has no {instruction}"


def test_no_kernel_includes_torch():
    for path in CSRC.rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_the_library_without_a_device_says_so():
    if find_spec("llava_mini_fast._cuda") is None:
        assert "were not built" in cuda.missing()
        pytest.skip(cuda.missing())
    # in a process that sees no device even where there is one
    program = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from llava_mini_fast import _cuda
found = _cuda.capabilities()
assert found["architectures"] and found["cuda"] >= 12000 and found["devices"] == 0
assert "device" in found["missing"], found
try:
    _cuda.swiglu(0, 0, 0, 0, 1, 8, 0)
except RuntimeError as error:
    assert str(error).startswith("the CUDA kernel of swiglu could not be started: ") and str(error).endswith(")."), error
else:
    raise AssertionError("a launch without a device went through")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_runs_where():
    built = "80-real,90a-real,100-real"
    assert [cuda.runs_on(built, *device) for device in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3))] == [True] * 5
    assert not any(cuda.runs_on(built, *device) for device in ((7, 5), (12, 0)))
    assert cuda.runs_on("80", 12, 0) and not cuda.runs_on("90a", 12, 0) and not cuda.runs_on("100-real", 9, 0)


def test_unfit_shapes_are_named():
    half = torch.float16
    assert "head_dim must be one of" in cuda.unfit("causal_attention", half, queries=1, keys=1, head_dim=96, group=1)
    assert "multiple of 64" in cuda.unfit("compressor_attention", half, queries=8, width=1088, rows=4)
    assert "no rows" in cuda.unfit("compressor_attention", half, queries=8, width=64, rows=0)
    assert "not torch.float64" in cuda.unfit("swiglu", torch.float64, width=8)
    assert cuda.unfit("prefix_attention", half, head_dim=128, group=4) is None


@pytest.mark.parametrize(
    ("frames", "queries", "rows"), [(1, 8, 576), (1, 512, 2304), (64, 8, 576), (1, 8, 3), (2, 40, 65)]
)
def test_splits_fill_the_device_and_have_rows(frames, queries, rows):
    for dtype in (torch.float32, torch.bfloat16):
        step = cuda.rows_per_split(frames, queries, rows, dtype, processors=132)
        splits = -(-rows // step)
        assert step > 0 and step % 8 == 0 and splits >= 1
        assert splits == 1 or (step >= 32 and splits * frames <= 132)
