"""The interpreter's and the compiler's tests, each in its own process: how a kernel runs is decided on decorating it.

`-m pytest tests/triton/interpreted` with TRITON_INTERPRET=1, or `tests/triton/compiled` with LLAVA_MINI_TEST_COMPILE=1,
runs them alone. LLAVA_MINI_OTHER_TRITON names a folder with another Triton, by which everything is compiled once more:

    pip install --target DIR --no-deps triton==3.6.0
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("LLAVA_MINI_TEST_COMPILE") == "1":
    pytest.skip("this is the child", allow_module_level=True)


def child(folder, marks, tmp_path, **variables):
    """Run a folder's tests that have the marks, and show what pytest said where one fails."""
    command = [sys.executable, "-m", "pytest", HERE / folder, "-q", "-m", marks, "-p", "no:cacheprovider"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "LLAVA_MINI_TEST_OUT": str(tmp_path)
    } | variables  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    print(said)
    assert done.returncode == 0, said[-20000:]


@pytest.fixture
def other_triton():
    """The child's environment with another version of Triton first on its path."""
    folder = os.environ.get("LLAVA_MINI_OTHER_TRITON")
    if not folder:
        pytest.skip("LLAVA_MINI_OTHER_TRITON names no folder with another version of Triton")
    assert (Path(folder) / "triton" / "__init__.py").is_file(), f"LLAVA_MINI_OTHER_TRITON: no triton in {folder}"
    return {"PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_in_the_interpreter(tmp_path):
    child("interpreted", "not slow", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_in_the_interpreter(tmp_path):
    child("interpreted", "slow", tmp_path, TRITON_INTERPRET="1")


def test_compiling_for_gpus_that_are_not_here(tmp_path):
    child("compiled", "not slow", tmp_path, LLAVA_MINI_TEST_COMPILE="1")


def test_compiling_with_another_triton(tmp_path, other_triton):
    child("compiled", "not slow", tmp_path, LLAVA_MINI_TEST_COMPILE="1", **other_triton)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiling_everything(request, tmp_path):
    """By the installed Triton, and beside it by another where one is named (the test above says so where none is)."""
    versions = [{}]
    if os.environ.get("LLAVA_MINI_OTHER_TRITON"):
        versions.append(request.getfixturevalue("other_triton"))

    def everything(number):
        out = tmp_path / str(number)
        out.mkdir()
        child("compiled", "slow", out, LLAVA_MINI_TEST_COMPILE="1", **versions[number])

    with ThreadPoolExecutor(len(versions)) as pool:
        list(pool.map(everything, range(len(versions))))
