"""Build logic only; the metadata is in pyproject.toml.

The folders of the top level become parts of one package: nothing is importable under the bare names `triton_kernels` and
`bench` (vLLM looks for OpenAI's package of the first name).

The CUDA kernels are built where nvcc is found: LLAVA_MINI_CUDA=1 insists on them, =0 does without, and LLAVA_MINI_CUDA_ARCHS
("80-real;90a-real") says for which devices. Without them the package works on Triton and torch.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
kernel_sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*"))
rooms = {"llava_mini_fast.triton_kernels": "triton_kernels", "llava_mini_fast.bench": "bench"}


def find_nvcc() -> str | None:
    """CUDACXX, nvcc on the path, or CUDA_HOME's."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX") or shutil.which("nvcc") or (f"{home}/bin/nvcc" if home else None)
    return shutil.which(named) if named else None


class BuildKernels(build_ext):
    """The one extension of the package, by CMake."""

    def run(self) -> None:
        wanted = os.environ.get("LLAVA_MINI_CUDA", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"LLAVA_MINI_CUDA must be 0 or 1; got {wanted!r}.")
        nvcc = find_nvcc()
        if wanted == "0" or (nvcc is None and wanted == "auto"):
            reason = "LLAVA_MINI_CUDA is 0" if wanted == "0" else "nvcc was not found"
            self.skip(f"{reason}, so the CUDA kernels are not built; the package works on Triton and torch")
        elif nvcc is None:
            raise SystemExit("LLAVA_MINI_CUDA is 1, and nvcc was not found: put it on PATH, or name it in CUDACXX.")
        else:
            try:
                self.cmake(nvcc)
            except (OSError, subprocess.CalledProcessError) as error:
                status = getattr(error, "returncode", None)
                reason = f"cmake could not be run, {error}" if status is None else f"cmake ended with {status}"
                if wanted == "1":
                    raise SystemExit(
                        f"LLAVA_MINI_CUDA is 1, and the CUDA kernels could not be built: {reason}."
                    ) from None
                self.skip(f"the CUDA kernels could not be built ({reason}); the package works on Triton and torch")

    def skip(self, reason: str) -> None:
        print(f"llava-mini-fast: {reason}.", file=sys.stderr)
        if self.inplace:
            # one of an earlier build would be found beside sources that it may not fit
            self.target().unlink(missing_ok=True)
        # an extension that is not there must not be copied or packed
        self.extensions = self.distribution.ext_modules = []

    def target(self) -> Path:
        """Where the library goes: into the sources for an editable install, else into the build."""
        name = self.extensions[0].name
        path = ROOT / self.get_ext_filename(name) if self.inplace else Path(self.get_ext_fullpath(name))
        return path.resolve()

    def cmake(self, nvcc: str) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cuda"
        # A configuration of an earlier pip names CMake and pybind11 by the paths of an environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        archs = os.environ.get("LLAVA_MINI_CUDA_ARCHS")
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.target().parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        } | ({"LLAVA_MINI_CUDA_ARCHS": archs} if archs else {})
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(
    packages=[
        *find_packages(include=["llava_mini_fast", "llava_mini_fast.*"]),
        *rooms,
        "llava_mini_fast.bench.gpuday",
    ],
    package_dir={"llava_mini_fast": "llava_mini_fast", **rooms},
    # `depends` is what a source distribution takes along
    ext_modules=[Extension("llava_mini_fast._cuda", sources=[], depends=["CMakeLists.txt", *kernel_sources])],
    cmdclass={"build_ext": BuildKernels},
)
