"""The CUDA sources compiled for the CPU, once a session, and what tests do with them."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from llava_mini_fast.ops import cuda_cpu

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = [
    "rms_norm.cu",
    "rope.cu",
    "swiglu.cu",
    "add_frames.cu",
    "device.cu",
    "attention/attention.cu",
    "compressor/compressor.cu",
]
RUNTIME = "testing/cuda_cpu.cpp"
FLAVOURS = {"plain": ([], []), "tsan": (["-fsanitize=thread"], ["-DLMF_TSAN"]), "asan": (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], ["-DLMF_ASAN"])}  # fmt: skip
"""Flags of the kernels, and of the runtime under them, which is never instrumented."""


def run(command, **kwargs):
    """Run a command; an error with all it said when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


class Build:
    """Objects and programs of csrc/ for the CPU, in a directory of their own."""

    root = CSRC

    def __init__(self, directory: Path):
        self.directory = directory

    def compile(self, flavour: str, source: str, root: Path = CSRC) -> Path:
        """One source as an object; `root` may be a changed copy of csrc/."""
        kernel, runtime = FLAVOURS[flavour]
        out = self.directory / f"{flavour}-{source.replace('/', '-')}-{root.name}.o"
        flags = ["-g"] if kernel else []
        if source == RUNTIME:
            flags += ["-O2", *runtime]
        elif source == "binding.cpp":
            include = sysconfig.get_path("include"), Path(torch.__file__).parent / "include"
            flags += ["-O0", "-fvisibility=hidden", "-DLMF_MODULE=_cuda_cpu", *(f"-I{path}" for path in include)]
        else:
            flags += ["-O1", *kernel, "-Wno-tsan", "-Wno-unknown-pragmas", "-Wall", "-Werror"]
        language = ["-x", "c++"] if source.endswith(".cu") else []
        run(["g++", "-std=c++17", "-fPIC", "-DLMF_CPU", *flags, *language, "-c", root / source, "-o", out])
        return out

    @cache  # noqa: B019
    def objects(self, flavour: str) -> dict[str, Path]:
        """All objects of a flavour by source; two compilers at a time."""
        last = "binding.cpp" if flavour == "plain" else "testing/driver.cpp"
        sources = ["compressor/compressor.cu", "attention/attention.cu", last, RUNTIME, *KERNELS[:-2]]
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(sources, pool.map(lambda source: self.compile(flavour, source), sources)))

    def link(self, flavour: str, name: str, changed: dict[str, Path] | None = None) -> Path:
        """The module (plain) or the driver (with a sanitizer), with some objects in the place of the usual ones."""
        out = self.directory / (f"{name}.so" if flavour == "plain" else f"{name}-{flavour}")
        kind = ["-shared"] if flavour == "plain" else FLAVOURS[flavour][0]
        run(["g++", *kind, *(self.objects(flavour) | (changed or {})).values(), "-o", out])
        return out


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to build the CUDA kernels for the CPU")
    return Build(tmp_path_factory.mktemp("cuda-cpu"))


@pytest.fixture(scope="session")
def cuda_cpu_library(build):
    """Path of the CUDA kernels built for the CPU; the backend "cuda-cpu" runs them from now on."""
    path = build.link("plain", "kernels")
    before = os.environ.get(cuda_cpu.ENVIRONMENT)
    os.environ[cuda_cpu.ENVIRONMENT] = str(path)
    cuda_cpu.load.cache_clear()
    yield path
    os.environ.pop(cuda_cpu.ENVIRONMENT)
    if before is not None:
        os.environ[cuda_cpu.ENVIRONMENT] = before


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN: what a kernel leaves unwritten shows in its results, and so does scratch read too early."""
    empty = torch.empty

    def nans(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nans)
