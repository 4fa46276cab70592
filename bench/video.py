"""Long clips in constant memory: `python -m llava_mini_fast.bench.video --help`.

Synthetic frames stream through a small seeded checkpoint. What grows with the clip is its fused rows alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_mini_fast.bench.timing import machine, peak_memory
from tqdm import tqdm

import llava_mini_fast as lmf
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.testing.checkpoints import cached

FRAMES_PER_CHUNK = 16
"""Few, so that even a short clip takes several chunks and what grows with the clip stands out."""
IDS = [5, 17, 9, -200, 301, 44, 8]


class Frames:
    """A sequence of `count` synthetic frames (336 x 336 x 3, uint8), each drawn when it is asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        ground = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
        for index in range(self.count):
            frame = ground.copy()
            frame[:8, :16] = np.frombuffer(index.to_bytes(16, "little"), dtype=np.uint8)[None, :, None]
            yield frame


def measure(count: int, progress: bool = False) -> dict[str, Any]:
    """Fuse a clip of `count` frames; peak memory is this process's, so a fresh process gives a clean number."""
    model = lmf.load(cached("llama31"))
    model.front.configure(CacheSizes(0, 0), FRAMES_PER_CHUNK)
    clip = lmf.Media("video", Frames(count))
    before, start = peak_memory(), time.perf_counter()
    with tqdm(total=count, unit=" frames", file=sys.stderr, disable=not progress, mininterval=1) as bar:
        (rows,) = model.front.fuse([(IDS, clip)], progress=bar.update)
    vision = rows[3 : 3 + count]
    first = model.embed(IDS, lmf.Media("video", Frames(1)))[3]
    return {
        "frames": count,
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_memory(),
        "peak_growth_bytes": peak_memory() - before,
        "fused_bytes": rows.numel() * rows.element_size(),
        "rows": rows.shape[0],
        "order_kept": bool((vision[0] - first).abs().max() < 1e-4)
        and bool((vision[0] - vision[-1]).abs().max() > 1e-3),
        "finite": bool(torch.isfinite(rows).all()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini_fast.bench.video",
        description="Fuse a long synthetic clip through a small checkpoint and report the peak memory.",
        epilog="example: python -m llava_mini_fast.bench.video --frames 10000 --json bench/results/video-cpu.json",
    )
    parser.add_argument("--frames", type=int, default=10_000, help="length of the clip (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="store the result here")
    args = parser.parse_args(argv)
    if args.frames < 1:
        parser.error("--frames must be at least 1")
    result = {"benchmark": "video", "machine": machine(), **measure(args.frames, progress=sys.stderr.isatty())}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
