"""The Makefile and .ci/run, as far as that is cheap: nothing is installed here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TARGETS = ("setup", "run", "test", "check", "gpu", "clean")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments, cwd=ROOT, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_every_target():
    listed = make().stdout
    assert [line.split()[1] for line in listed.splitlines() if line.startswith("make ")] == list(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_sound(target):
    result = make("-n", target)
    assert result.returncode == 0, result.stderr
    script = result.stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_what_test_and_check_run():
    assert '-m "not slow and not gpu"' in make("-n", "test").stdout
    check = make("-n", "check", "GOLDENS=here there").stdout
    assert "for goldens in tests/goldens here there;" in check
    assert "not slow" not in check
    assert "triton==3.6.0" in check and 'if [[ -n "" ]]' in make("-n", "check", "OTHER_TRITON=").stdout


def test_only_ci_looks_beside_the_checkout():
    assert "shared" not in (ROOT / "Makefile").read_text()
    assert "export PYTHONSAFEPATH := 1" in (ROOT / "Makefile").read_text()


def test_ci_run_is_make_check(tmp_path):
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ci, checkout / ".ci" / "run")
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$PWD: $*"\n')
    fake.chmod(0o755)

    def run():
        path = f"{fake.parent}:{os.environ['PATH']}"
        return subprocess.run(
            [checkout / ".ci" / "run"],
            cwd="/",
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert run() == f"{checkout}: check GOLDENS="
    beside = tmp_path / "shared" / "compact"
    beside.mkdir(parents=True)
    assert run() == f"{checkout}: check GOLDENS={os.path.relpath(beside, checkout)}"


def test_another_python_is_refused_with_a_sentence(tmp_path):
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'Python 3.10.2'; else exit 1; fi\n")
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}", cwd=tmp_path)
    assert result.returncode != 0
    assert re.search(r"^make \S*: failed: Python 3\.10\.2 does not do", result.stdout, re.MULTILINE)
    result = make("setup", "PYTHON=no-such-python", cwd=tmp_path)
    assert "there is no no-such-python" in result.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_gpu_without_a_device_or_packages_is_a_sentence(tmp_path):
    def last_line(python):
        result = make("gpu", f"PYTHON={python}", f"VENV={tmp_path / 'none'}")
        assert result.returncode != 0
        return result.stdout.splitlines()[-1]

    assert last_line(sys.executable).startswith("make gpu: failed: torch finds no CUDA device here")
    assert last_line("no-such-python") == "make gpu: failed: there is no no-such-python; say make gpu PYTHON=path"
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho triton pytest\n")
    bare.chmod(0o755)
    assert last_line(bare) == f"make gpu: failed: {bare} lacks triton, pytest"


def test_gpu_takes_its_steps_in_order(tmp_path):
    """With a python that only says what it is asked to run; a build, a day, the tests, and the result where it is committed."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    python, day = tmp_path / "python", tmp_path / "build" / "gpuday-results"
    day.mkdir(parents=True)
    (day / "gpuday.json").write_text("{}")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    answers = '*find_spec*|*is_available*|*pybind11*) ;; *get_device_name*) echo a-card ;; *) echo "ran $LLAVA_MINI_CUDA $*" ;;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    python.chmod(0o755)
    result = make("gpu", f"PYTHON={python}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    ran = [line.split("-m ")[1].split()[0] for line in result.stdout.splitlines() if line.startswith("ran ")]
    assert ran == ["pip", "llava_mini_fast.bench.gpuday", "pytest"]
    assert "ran 1 -m pip" in result.stdout  # the CUDA kernels or nothing
    assert (tmp_path / "bench" / "results" / "gpuday-a-card.json").read_text() == "{}"
    assert result.stdout.splitlines()[-1].startswith("make gpu: all passed")
