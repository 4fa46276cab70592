"""Time the Triton kernels' settings on the CUDA device at hand and keep the best: `python -m llava_mini_fast.bench.tune`.

The result, triton_kernels/tuned.json, is read by `triton_kernels.launch.tuned`: only what beats a kernel's own choice by
`GAIN` is written, so that noise writes nothing. Entries of other cards stay.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch

from llava_mini_fast.bench import baselines
from llava_mini_fast.bench.ceilings import cache_bytes
from llava_mini_fast.bench.judge import Judge
from llava_mini_fast.bench.kernels import rotation
from llava_mini_fast.bench.shapes import OPS, SHAPES, Shape, copied, select
from llava_mini_fast.bench.timing import clock_of, interleave

Settings = dict[str, int]
GAIN = 1.03
"""How many times as fast as the kernel's own choice settings must be to be kept."""
ROUNDS, CALLS = 7, 8
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "rms_norm": {"num_warps": (2, 4, 8, 16)},
    "rope": {"BLOCK_HEADS": (4, 8, 16, 32), "num_warps": (1, 2, 4, 8)},
    "swiglu": {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
    "add_frames": {"BLOCK": (256, 512, 1024), "STAGES": (2, 4, 8), "num_warps": (2, 4, 8)},
    "causal_attention": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "STAGES": (2, 3)},
    "prefix_attention": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "STAGES": (2, 3)},
    "compressor_attention": {"BLOCK_M": (16,), "BLOCK_N": (16, 32), "STAGES": (2, 3, 4), "num_warps": (4, 8)},
}
"""Op -> the values to try for each of its kernel's settings, in every combination. An attention's warps follow from its
tile; 32 queries of a compressor spill at width 1024."""
_DAY = {
    "prefix_attention": ("text60-llama", "video32-text60-llama", "second-questions8-llama"),
    "compressor_attention": ("image-q1", "hd-q64"),
    "rms_norm": ("text60", "video8"),
    "rope": ("text60-llama", "video8-llama"),
    "swiglu": ("text60-llama", "video8-llama"),
}
DAY = tuple(shape for shape in SHAPES if shape.name in _DAY.get(shape.op, ()))
"""The shapes that matter most to Llama-3.1-8B: what to tune where a device is lent for minutes."""


def candidates(op: str) -> Iterator[Settings]:
    """Every combination of an op's choices. An attention has a warp for 16 queries, as many as one MMA takes."""
    names = CHOICES[op]
    for values in product(*names.values()):
        settings = dict(zip(names, values))
        if "num_warps" not in names:
            settings["num_warps"] = settings["BLOCK_M"] // 16
        yield settings


class Asked(dict):
    """A table of settings that remembers which rows were asked for."""

    def __init__(self, rows: Mapping[str, Settings]):
        super().__init__(rows)
        self.keys_asked: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.append(key)
        return super().get(key, default)


def best(seconds: Mapping[int, list[float]], own: list[float]) -> tuple[int | None, float]:
    """The fastest candidate and how many times as fast it is as the kernel's own choice, by the geometric mean over shapes.

    The candidate is None where that is less than `GAIN`.

    Args:
        seconds: candidate -> its median at each shape.
        own: the same for the kernel's own choice.
    """
    gains = {i: math.exp(sum(math.log(a / b) for a, b in zip(own, times)) / len(own)) for i, times in seconds.items()}
    winner = max(gains, key=gains.__getitem__, default=None)
    if winner is None:
        return None, 1.0
    return (winner if gains[winner] > GAIN else None), gains[winner]


class Tuner:
    """Measures one row of the table at a time. `launch` is triton_kernels.launch, whose table it sets."""

    def __init__(self, launch: Any, dtype: torch.dtype, device: torch.device | str = "cuda"):
        self.launch, self.dtype, self.device = launch, dtype, torch.device(device)

    def keys(self, shapes: list[Shape]) -> dict[str, list[Shape]]:
        """Row of the table -> the shapes that read it. Runs each shape once; a kernel may refuse some."""
        found: dict[str, list[Shape]] = {}
        for shape in shapes:
            self.launch.TABLE = asked = Asked(self.launch.TABLE)
            inputs = shape.make(self.dtype, self.device)
            baselines.call(shape.op, inputs, "triton")
            for key in dict.fromkeys(asked.keys_asked):
                found.setdefault(key, []).append(shape)
        return found

    def row(self, key: str, shapes: list[Shape]) -> tuple[Settings | None, float]:
        """The settings worth keeping in a row, or None for the kernel's own, and the gain of the best that were tried.

        Both attentions may read one row.
        """
        choices = list(candidates(shapes[0].op))
        own, seconds = [], {i: [] for i in range(len(choices))}
        for shape in shapes:
            inputs = shape.make(self.dtype, self.device)
            judge, run = Judge(shape.op, inputs, self.dtype), partial(baselines.call, shape.op, backend="triton")
            count = rotation(shape.bytes(self.dtype), cache_bytes(self.device))
            copies = cycle([copied(inputs, self.device) for _ in range(count)])
            usable = {i: s for i, s in enumerate(choices) if i in seconds and self._works(judge, run, key, s)}
            runs = {-1: {}} | usable  # no settings: the kernel's own choice
            timed = interleave(
                {str(i): partial(self._repeat, run, key, settings, copies) for i, settings in runs.items()},
                ROUNDS,
                clock=clock_of(self.device),
            )
            own.append(timed["-1"].median)
            # what fails at one shape is out for all that read the row
            seconds = {i: [*seconds[i], timed[str(i)].median] for i in usable}
        winner, gain = best(seconds, own)
        return (None if winner is None else choices[winner]), gain

    def _works(self, judge: Judge, run: Any, key: str, settings: Settings) -> bool:
        # red too where it can't be launched: too many registers, too much shared memory, a tile that the kernel can't have
        self.launch.TABLE[key] = settings
        return judge.red(run) is None

    def _repeat(self, run: Any, key: str, settings: Settings, copies: Iterator[Any]) -> None:
        self.launch.TABLE[key] = settings
        for _ in range(CALLS):
            run(next(copies))


def write(path: Path, table: Mapping[str, Settings]) -> None:
    """Sorted and a row a line, so that differences can be read."""
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
    path.write_text(f"{{\n{rows}\n}}\n" if rows else "{}\n", encoding="utf-8")


@torch.no_grad()
def tune(shapes: list[Shape], dtypes: list[str]) -> dict[str, Settings]:
    """The whole table after tuning, which is also written where `launch` reads it.

    Raises:
        ValueError: no CUDA device, or no Triton.
    """
    from llava_mini_fast.ops.backend import unavailable

    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and torch finds none here.")
    if reason := unavailable("triton", torch.device("cuda")):
        raise ValueError(f"tuning measures the Triton kernels: {reason}.")
    from llava_mini_fast.triton_kernels import launch

    table = dict(launch.TABLE)
    for dtype in dtypes:
        tuner = Tuner(launch, getattr(torch, dtype))
        for key, found in tuner.keys(shapes).items():
            chosen, gain = tuner.row(key, found)
            table.pop(key, None)
            if chosen:
                table[key] = chosen
            launch.TABLE = dict(table)
            print(f"{key}: {chosen or 'as it was'} ({gain:.2f})", flush=True)
            # a row at a time, so that a run that is cut off leaves what it has measured
            write(launch.TUNED, table)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure the Triton kernels' settings and write triton_kernels/tuned.json."
    )
    parser.add_argument("--op", action="append", default=[], choices=OPS, help="may be repeated (default: all)")
    parser.add_argument("--shape", action="append", default=[], help="may be repeated (default: all)")
    parser.add_argument(
        "--dtype", action="append", choices=["float32", "float16", "bfloat16"], help="(default: bfloat16)"
    )
    parser.add_argument("--day", action="store_true", help="of these only the shapes that matter most to Llama-3.1-8B")
    args = parser.parse_args(argv)
    try:
        shapes = [shape for shape in select(args.op, args.shape) if not args.day or shape in DAY]
        table = tune(shapes, args.dtype or ["bfloat16"])
    except ValueError as error:
        sys.exit(f"tune: {error}")
    print(f"tune: {len(table)} rows in triton_kernels/tuned.json")


if __name__ == "__main__":
    main()
