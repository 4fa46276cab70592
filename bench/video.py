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
from tqdm import tqdm

import llava_mini_fast as lmf
from llava_mini_fast.bench.timing import machine, peak_memory
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
        return map(frame, range(self.count))


def frame(index: int) -> np.ndarray:
    """Noise that moves by a few pixels a frame, so that neighbours differ and no two are alike."""
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return np.roll(noise, (7 * (index // 336), index % 336), axis=(0, 1))


def measure(count: int, progress: bool = False) -> dict[str, Any]:
    """Fuse a clip of `count` frames; peak memory is this process's, so a fresh process gives a clean number."""
    model = lmf.load(cached("llama31"))
    model.front.configure(CacheSizes(0, 0), FRAMES_PER_CHUNK)
    clip = lmf.Media("video", Frames(count))
    place = IDS.index(-200)
    text_sum, text_part = torch.zeros(len(IDS) - 1, model.config.hidden_size, dtype=torch.float64), None

    def counted_text_part(*arguments: Any) -> torch.Tensor:
        fused = text_part(*arguments)
        text_sum.add_(fused.double().unflatten(0, (-1, len(text_sum))).sum(0))
        return fused

    text_part, model.front.prefusion_layers.text_part = model.front.prefusion_layers.text_part, counted_text_part
    before, start = peak_memory(), time.perf_counter()
    with tqdm(total=count, unit=" frames", file=sys.stderr, disable=not progress, mininterval=1) as bar:
        (rows,) = model.front.fuse([(IDS, clip)], progress=bar.update)
    seconds, peak = time.perf_counter() - start, peak_memory()
    vision, text = rows[place : place + count], torch.cat([rows[:place], rows[place + count :]])
    text_error = (text - text_sum / count).abs().max().item()
    model.front.prefusion_layers.text_part = text_part
    samples = sorted({0, count // 3, count // 2, count - 1})
    alone = torch.stack([model.embed(IDS, lmf.Media("video", [frame(index)]))[place] for index in samples])
    distances = torch.cdist(alone, vision[samples])
    return {
        "frames": count,
        "seconds": seconds,
        "peak_bytes": peak,
        "peak_growth_bytes": peak - before,
        "fused_bytes": rows.numel() * rows.element_size(),
        "rows": rows.shape[0],
        "order_kept": distances.argmin(1).tolist() == list(range(len(samples)))
        and bool(distances.diagonal().max() < 1e-3),
        "text_mean_error": text_error,
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
