"""What this machine can do at most, measured once a run: copy bandwidth and the speed of a large matrix product."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mini_fast.bench.timing import Clock

DEFAULT_CACHE = 32 * 2**20
"""Bytes taken for the last-level cache where the system doesn't say."""
GEMM = {"cpu": (1024, 4096, 4096), "cuda": (8192, 8192, 8192)}
"""(m, k, n): large enough that a library reaches its best speed, small enough for half a second."""
ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """The best of a few rounds: a ceiling is what was reached once, not what is usual."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float

    def seconds(self, moved: int, flops: int) -> float:
        """The least time for moving `moved` bytes and computing `flops` at once: the larger of the two times."""
        return max(moved / self.copy_bytes_per_s, flops / self.gemm_flops_per_s)

    def bound(self, moved: int, flops: int) -> str:
        memory = moved / self.copy_bytes_per_s >= flops / self.gemm_flops_per_s
        return "memory" if memory else "compute"

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def measure(device: torch.device, dtype: torch.dtype, clock: Clock) -> Ceilings:
    """Copy 4 caches' worth (bytes read and bytes written both count), and multiply matrices of `dtype`."""
    return Ceilings(_copy(device, clock), gemm(device, dtype, clock))


def _copy(device: torch.device, clock: Clock) -> float:
    size = min(max(4 * cache_bytes(device), 64 * 2**20), 2**30)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best(clock, lambda: target.copy_(source))


def gemm(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Operations a second of one large product of random matrices."""
    m, k, n = GEMM[device.type]
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    return 2 * m * k * n / _best(clock, lambda: torch.mm(a, b))


def _best(clock: Clock, run: Callable[[], Any]) -> float:
    run()
    return min(clock(run) for _ in range(ROUNDS))


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: L2 of a GPU, L3 of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    if hasattr(os, "sysconf") and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        try:
            found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
        except (OSError, ValueError):
            found = 0
        if found > 0:
            return found
    return _sysfs_cache() or DEFAULT_CACHE


def _sysfs_cache() -> int:
    """Linux's own word for the largest cache of CPU 0, in bytes; 0 where it says nothing."""
    units, sizes = {"K": 2**10, "M": 2**20}, [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[-1:] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)
