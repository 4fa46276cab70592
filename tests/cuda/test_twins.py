"""Kernels with one mistake each: the checks of the other files must catch every one, or they prove nothing."""

import os
import shutil
import subprocess

import pytest
import torch

from llava_mini_fast.ops import cuda, cuda_cpu
from llava_mini_fast.ops.compressor_attention import compressor_attention
from llava_mini_fast.ops.prefix_attention import causal_attention
from llava_mini_fast.ops.rms_norm import rms_norm
from llava_mini_fast.ops.rope import rope
from llava_mini_fast.testing.numerics import assert_law

ATTENTION, COMPRESSOR = "attention/attention.cu", "compressor/compressor.cu"


def broken(build, tmp_path, flavour, compiled, file, right, wrong):
    """A copy of csrc/ with `wrong` in the place of the first `right` of a file: {compiled: its object}."""
    root = tmp_path / tmp_path.name
    shutil.copytree(build.root, root)
    text = (root / file).read_text()
    assert right in text, f"{file} no longer says {right!r}: write this twin anew"
    (root / file).write_text(text.replace(right, wrong, 1))
    return {compiled: build.compile(flavour, compiled, root)}


LANDED = """    wait_copies<0>();
    // This tile is there for all, and all are done with the buffer that the next one goes to.
    __syncthreads();
"""

SANITIZED = {
    "rms_norm without its barrier": (
        "tsan", "rms_norm.cu", "rms_norm.cu", "  __syncthreads();\n", "", "data race"),
    "attention without the barrier before a tile": (
        "tsan", ATTENTION, "attention/tensor_core.cuh", "    __syncthreads();\n", "", "data race"),
    "attention that waits for no copies": (
        "tsan", ATTENTION, "attention/tensor_core.cuh", "    wait_copies<0>();\n", "", "without waiting for its asynchronous copies"),
    "attention that waits for its copies after the barrier": (
        "tsan", ATTENTION, "attention/tensor_core.cuh", LANDED, "    __syncthreads();\n    wait_copies<0>();\n", "data race"),
    "float32 attention without __syncwarp": (
        "tsan", ATTENTION, "attention/fma.cuh", "    __syncwarp();\n", "", "data race"),
    "float32 attention that overwrites keys in use": (
        "tsan", ATTENTION, "attention/fma.cuh", "    __syncthreads();\n  }\n", "  }\n", "data race"),
    "compressor without the barrier before the softmax": (
        "tsan", COMPRESSOR, "compressor/tensor_core.cuh", "      }\n    }\n    __syncthreads();\n", "      }\n    }\n", "data race"),
    "add_frames without its bounds check": (
        "asan", "add_frames.cu", "add_frames.cu", "  if (column >= width) return;\n", "", "heap-buffer-overflow"),
    "swiglu with one item too many": (
        "asan", "swiglu.cu", "swiglu.cu", "item < work;", "item <= work;", "heap-buffer-overflow"),
    "attention that reads rows beyond the last": (
        "asan", ATTENTION, "attention/fma.cuh", "if (first + to < segment.packed) four", "four", "heap-buffer-overflow"),
    "attention that copies a row too many": (
        "asan", ATTENTION, "attention/tensor_core.cuh", "const bool real = j < total;", "const bool real = j <= total;", "heap-buffer-overflow"),
    "wide accesses at any address": (
        "asan", "swiglu.cu", "swiglu.cu", "{row, width}", "{}", "misaligned address"),
}  # fmt: skip


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizer_catches(build, tmp_path, name):
    flavour, compiled, file, right, wrong, words = SANITIZED[name]
    driver = build.link(
        flavour, f"driver-{tmp_path.name}", broken(build, tmp_path, flavour, compiled, file, right, wrong)
    )
    said = ""
    for seed in range(4):
        environment = {"LMF_SEED": str(seed), "TSAN_OPTIONS": "halt_on_error=1"}
        op = {ATTENTION: "attention", COMPRESSOR: "compressor_attention"}.get(compiled, compiled.removesuffix(".cu"))
        done = subprocess.run([driver, op], env=os.environ | environment, capture_output=True, text=True, timeout=120)
        said += done.stderr
        if done.returncode and words in done.stderr:
            return
    pytest.fail(f"{name} was not caught; the sanitizer said {said[-2000:]!r}")


def attention_error():
    q, k, v = (torch.randn(1, n, 2, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (20, 80, 80))
    wide = [x.float() for x in (q, k, v)]
    assert_law(causal_attention(q, k, v, backend="cuda-cpu"), causal_attention(*wide), causal_attention(q, k, v))


def compressor_error():
    features = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0)).half() + 3
    weight, bias = torch.ones(8, 64).cumsum(1) / 64, torch.zeros(8, 50)
    wide = compressor_attention(features, weight, bias, eps=1e-5)
    y = torch.nn.functional.layer_norm(features, (64,), eps=1e-5)
    plain = (weight.half() @ y.mT + bias.half()).softmax(-1) @ y
    assert_law(compressor_attention(features, weight, bias, eps=1e-5, backend="cuda-cpu"), wide, plain)


def rms_norm_error():
    x = torch.randn(2, 77, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_law(
        rms_norm(x, x[0], 1e-5, backend="cuda-cpu"), rms_norm(x.float(), x[0].float(), 1e-5), rms_norm(x, x[0], 1e-5)
    )


def rope_error():
    x, table, positions = torch.randn(3, 48), torch.randn(4, 16), torch.arange(3)
    for a, b in zip(rope(x, positions, table, 1, 1, backend="cuda-cpu"), rope(x, positions, table, 1, 1)):
        assert_law(a, b.double(), b)


WRONG = {
    "a causal mask that is off by one": (
        ATTENTION, "attention/tensor_core.cuh", "<= last[half]", "< last[half]", attention_error),
    "a last tile of keys left out": (
        ATTENTION, "attention/tensor_core.cuh", "(total + KEYS - 1) / KEYS", "total / KEYS", attention_error),
    "results not scaled by the new maximum": (
        ATTENTION, "attention/tensor_core.cuh", "result[n][2 * half] *= shrink;", "", attention_error),
    "the mean not taken off": (
        COMPRESSOR, "compressor/tensor_core.cuh", "- shifts[query]", "", compressor_error),
    "rows beyond the last counted": (
        COMPRESSOR, "compressor/tensor_core.cuh", "score = -INFINITY;", "score = 0;", compressor_error),
    "a mean over too many columns": (
        "rms_norm.cu", "rms_norm.cu", "squares / width", "squares / (width + 1)", rms_norm_error),
    "a rotation the other way": (
        "rope.cu", "rope.cu", "a * cosine - b * sine", "a * cosine + b * sine", rope_error),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_law_catches(build, cuda_cpu_library, poisoned, tmp_path, monkeypatch, name):
    compiled, file, right, wrong, check = WRONG[name]
    check()
    module = cuda_cpu.load_from(
        str(build.link("plain", tmp_path.name, broken(build, tmp_path, "plain", compiled, file, right, wrong)))
    )
    monkeypatch.setattr(cuda_cpu, "OPS", cuda.make_ops("llava_mini_twin_" + tmp_path.name, lambda: module))
    with pytest.raises(AssertionError, match="above the law's bound"):
        check()
