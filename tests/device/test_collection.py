"""Which tests a machine with a GPU runs: every op with every backend, and the goldens; though vLLM and other extras are missing."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
BACKENDS = ("triton", "cuda")
ABSENT = (
    "accelerate", "aiohttp", "av", "fastapi", "gradio", "openai", "prometheus_client", "psutil", "selenium",
    "sentencepiece", "torchao", "vllm",
)  # fmt: skip
"""What a GPU machine may lack, and the child can't import."""


@pytest.fixture(scope="module")
def collected():
    """Ids of the tests marked `gpu` from all of tests/, a line each."""
    arguments = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(TESTS)]
    program = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); import pytest; sys.exit(pytest.main({arguments}))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_op_is_tested_with_every_backend(collected):
    ops = pytest.importorskip("llava_mini_fast.triton_kernels").OPS
    tests = ("obeys_the_law", "a_graph_gives_the_same_bits", "compiles_as_one_graph", "torch_knows_the_op")
    found = re.findall(r"^tests/device/test_ops\.py::test_(\w+)\[(\w+)-(\w+)", collected, re.MULTILINE)
    assert set(product(tests, BACKENDS, ops)) <= set(found)


def test_the_goldens_run_with_every_backend_and_cache(collected):
    found = re.findall(r"^tests/device/test_goldens\.py::test_every_golden\[(\w+)-(\w+)\]", collected, re.MULTILINE)
    assert set(product(("torch", *BACKENDS), ("off", "device", "host"))) <= set(found)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_low_precision_runs_with_every_backend(collected, backend):
    for dtype in ("bfloat16", "float16"):
        assert re.search(rf"::test_low_precision_obeys_the_law\[{backend}-.*-{dtype}\]", collected)


@pytest.mark.parametrize("file", ["cuda/test_numerics", "device/test_tuned"])
def test_these_run_too(collected, file):
    assert f"tests/{file}.py::" in collected
