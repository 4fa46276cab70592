"""Make what a GPU day takes along, on a machine without a GPU: `python -m llava_mini_fast.bench.gpuday.pack --help`.

The machine with the card has torch and Triton and no network. A wheel with the CUDA kernels and a cache with the Triton kernels,
both made here with that machine's versions, leave it nothing to build.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

VERSIONS = ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy==2.5.2")
"""Of the machine with the card."""
NEEDED = ("pillow", "tqdm", "safetensors", "huggingface_hub", "tokenizers", "rich", "typer")
LIMIT = 60 * 2**20
"""Bytes that checkout, wheel and cache may take together: what such a machine takes along, with room to spare."""
SCRIPT = """#!/usr/bin/env bash
# On the machine with the card, from the repository's root: bash {folder}/run.sh RESULTS [SECONDS]
set -euo pipefail
site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" {folder}/*.whl
tar -xJf {folder}/triton-cache.tar.xz -C "$site"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH="$site" TRITON_CACHE_DIR="$site/triton-cache"
python3 -m llava_mini_fast.triton_kernels.compiled --place "$TRITON_CACHE_DIR"
exec python3 -m llava_mini_fast.bench.gpuday --out "$1" --budget "${{2:-540}}"
"""


def run(*command: str | Path, **environment: str) -> None:
    """A command, shown; what it says goes to the terminal."""
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    subprocess.run(list(map(str, command)), check=True, env=os.environ | environment)


def make_environment(folder: Path, python: str) -> Path:
    """The interpreter of a virtual environment with the versions of the machine with the card; made once (5 GB)."""
    inside = folder / "bin" / "python"
    if not (folder / ".complete").is_file():
        run(python, "-m", "venv", "--clear", folder)
        run(inside, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *VERSIONS, *NEEDED)
        (folder / ".complete").touch()
    return inside


def carried_bytes(root: Path) -> int:
    """What of the checkout travels: files that git knows or doesn't ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    return sum((root / name.decode()).stat().st_size for name in listed if name and (root / name.decode()).is_file())


def pack(root: Path, out: Path, python: Path, archs: str, arch: int) -> dict[str, int]:
    """Fill `out` with the wheel, the cache and run.sh; the bytes of each part of what is carried."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.whl"), out / "triton-cache.tar.xz"):
        old.unlink(missing_ok=True)
    for stale in (root / "build").glob("lib.*"):  # setuptools would pack modules of an earlier build
        run("rm", "-rf", stale)
    settings = {"LLAVA_MINI_CUDA": "1", "LLAVA_MINI_CUDA_ARCHS": archs, "PYTHONSAFEPATH": "1"}
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, root, **settings)
    site, cache = out / "site", out / "triton-cache"
    run("rm", "-rf", site, cache)
    (wheel,) = out.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site, wheel)
    warm = ("-m", "llava_mini_fast.triton_kernels.compiled", "--warm", cache, "--arch", str(arch))
    run(python, *warm, PYTHONSAFEPATH="1", PYTHONPATH=str(site))
    with tarfile.open(out / "triton-cache.tar.xz", "w:xz") as archive:
        archive.add(cache, "triton-cache")
    run("rm", "-rf", site, cache)
    folder = out.relative_to(root)
    (out / "run.sh").write_text(SCRIPT.format(folder=folder), encoding="utf-8")
    return {
        "checkout": carried_bytes(root),
        "wheel": wheel.stat().st_size,
        "Triton cache": (out / "triton-cache.tar.xz").stat().st_size,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini_fast.bench.gpuday.pack",
        description="Make the wheel and the Triton cache that a GPU day takes along. Run it in the repository's root, with nvcc there.",
        epilog="example: python -m llava_mini_fast.bench.gpuday.pack --python python3.12; then carry build/gpuday and run\n"
        "bash build/gpuday/run.sh RESULTS on the machine with the card.",
    )
    parser.add_argument(
        "--python", default="python3.12", help="an interpreter of that machine's version (default: %(default)s)"
    )
    parser.add_argument(
        "--environment", type=Path, default=Path("build/gpuday-environment"), metavar="DIR",
        help="a virtual environment with that machine's versions, made if it isn't there (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/gpuday"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--archs", default="90a-real", help="of the CUDA kernels, in CMake's words (default: %(default)s)"
    )
    parser.add_argument("--arch", type=int, default=90, help="of the Triton kernels (default: %(default)s)")
    args = parser.parse_args(argv)
    root = Path.cwd()
    if not (root / "csrc").is_dir():
        parser.error("run this in the repository's root")
    if not args.out.resolve().is_relative_to(root):
        parser.error("--out must lie in the repository, which is what travels")
    try:
        python = make_environment(args.environment.absolute(), args.python)
        parts = pack(root, args.out.absolute(), python, args.archs, args.arch)
    except (OSError, subprocess.CalledProcessError) as error:
        parser.exit(1, f"pack: {error}\n")
    for name, size in parts.items():
        print(f"{name:14s}{size / 2**20:6.1f} MiB")
    total = sum(parts.values())
    print(
        f"{'together':14s}{total / 2**20:6.1f} MiB of {LIMIT / 2**20:.0f}; carry {args.out}, then: bash {args.out}/run.sh RESULTS"
    )
    if total > LIMIT:
        parser.exit(1, "pack: that is more than such a machine takes along\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
