"""The front end against the published structure, at real size: `python -m llava_mini_fast.bench.frontend --help`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava_mini_fast.bench import flops
from llava_mini_fast.bench.published import PublishedFrontEnd
from llava_mini_fast.bench.timing import Timing, interleave, machine, peak_memory
from llava_mini_fast.config import CLIP_L_336, MODEL_TYPE, LlavaMiniConfig
from llava_mini_fast.fusion import FusionFrontEnd
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.precision import quantize
from llava_mini_fast.preprocess.views import Views

TEXT_ROWS = 60
FRAMES = 32
BATCH = 8
BASELINE_FRAMES = 4
"""The published loop's cost is the same every frame; four of them stand for 32."""
CHECK_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-2}
"""Relative to the largest value: what equal maths in another order may differ by at these widths before timing is refused."""
LLAMA_8B = {
    "model_type": MODEL_TYPE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 1000, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "mm_vision_tower": "random", "mm_hidden_size": 1024, "prefusion_layer_num": 4,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "prefusion_layer_num": 2,
}  # fmt: skip


def build(dtype: torch.dtype, hd: bool, small: bool) -> FusionFrontEnd:
    """A front end of Llama-3.1-8B's widths (1.2 B parameters) with random weights; `small` for trying the benchmark."""
    raw = LLAMA_8B | (SMALL if small else {}) | {"compressor_size": 8 if hd else 1, "resolution_ratio": 2 if hd else 1}
    vision = CLIP_L_336 | ({"num_hidden_layers": 3, "intermediate_size": 256} if small else {})
    config = LlavaMiniConfig.from_dict(raw)
    config.vision.update(vision)
    generator = torch.Generator().manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        table = torch.randn(config.vocab_size, config.hidden_size, generator=generator, dtype=torch.float32).to(dtype)
        front = FusionFrontEnd(config, lambda ids: table[ids]).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    block = torch.randn(1_000_003, generator=generator)  # repeated: drawing 1.2 B numbers would take minutes
    for name, parameter in front.named_parameters():
        if parameter.dim() == 1:  # norms and biases
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scaled, flat = (block * parameter[0].numel() ** -0.5).to(dtype), parameter.data.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            piece = flat[start : start + block.numel()]
            piece.copy_(scaled[: piece.numel()])
    return front


def make_views(frames: int, views: int, seed: int) -> Views:
    """Random preprocessed frames under made-up digests (nothing here hashes)."""
    pixels = torch.randn(frames, views, 3, 336, 336, generator=torch.Generator().manual_seed(seed))
    return Views("video", pixels, tuple(f"{seed} {i}".encode() for i in range(frames)))


class Bench:
    """Every measurement at one dtype; `rows` collects what was measured, `ratios` what is judged."""

    def __init__(self, dtype: torch.dtype, rounds: int, small: bool, bar: tqdm):
        self.dtype, self.rounds, self.small, self.bar = dtype, rounds, small, bar
        self.rows: list[dict[str, Any]] = []
        self.ratios: dict[str, float] = {}
        self.ids = [1, -200, *range(2, TEXT_ROWS + 1)]

    def timed(
        self, candidates: dict[str, Callable[[], Any]], rounds: int | None = None, warmup: int = 1
    ) -> dict[str, Timing]:
        return interleave(candidates, rounds or self.rounds, warmup, tick=self.bar.update)

    def row(self, name: str, ours: Timing, theirs: Timing | None, operations: int, bound: float | None = None) -> None:
        entry: dict[str, Any] = {"name": name, "ours": ours.as_json(), "gflops_per_s": operations / ours.median / 1e9}
        if theirs is not None:
            entry |= {"published": theirs.as_json(), "ratio": theirs.median / ours.median, "flop_bound": bound}
        self.rows.append(entry)
        self.bar.write(render_row(entry))

    def check(self, front: FusionFrontEnd, media: Views) -> None:
        """No number is reported where the two don't agree."""
        (ours,) = front.fuse([(self.ids, media)])
        theirs = self.published.embed(self.ids, media.pixels.to(self.dtype))
        error = ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
        if not error < CHECK_TOLERANCE[self.dtype]:
            raise SystemExit(
                f"red: fused rows differ from the published structure's by {error:.1e} (relative); no number is reported."
            )

    def cold(
        self, name: str, front: FusionFrontEnd, media: Views, *, rounds: int, warmup: int, fewer: int = 0
    ) -> Timing:
        """One prompt about media that no cache holds. `fewer`: frames that the baseline is timed on, scaled up."""
        published, count = self.published, fewer or media.num_frames
        front.configure(CacheSizes(0, 0))
        pixels = media.pixels[:count].to(self.dtype)
        times = self.timed(
            {"ours": lambda: front.fuse([(self.ids, media)]), "published": lambda: published.embed(self.ids, pixels)},
            rounds,
            warmup,
        )
        baseline = Timing(tuple(s * media.num_frames / count for s in times["published"].seconds))
        ours, full = (front_total(front.config, media.num_frames, p) for p in (False, True))
        self.row(name, times["ours"], baseline, ours, full / ours)
        return baseline

    def standard(self) -> None:
        front = build(self.dtype, hd=False, small=self.small)
        image, clip = make_views(1, 1, seed=1), make_views(FRAMES, 1, seed=2)
        self.published = PublishedFrontEnd(front)  # before packing, which gives the plain weights up
        front.pack()
        self.check(front, make_views(2, 1, seed=3))
        self.stages(front, image)
        baseline = self.cold("cold image", front, image, rounds=self.rounds, warmup=1)
        self.ratios["cold_image"] = self.rows[-1]["ratio"]
        self.warm(front, image, baseline)
        self.cold(f"{FRAMES}-frame video", front, clip, rounds=1, warmup=0, fewer=BASELINE_FRAMES)
        self.ratios["video32"] = self.rows[-1]["ratio"]
        self.batch(front, baseline)
        if self.dtype == torch.bfloat16:
            self.int8(image, baseline)

    def batch(self, front: FusionFrontEnd, baseline: Timing) -> None:
        """Prompts about different images in one call; the baseline takes one image after the other."""
        images = [make_views(1, 1, seed=10 + index) for index in range(BATCH)]
        front.configure(CacheSizes(0, 0))
        times = self.timed({"ours": lambda: front.fuse([(self.ids, image) for image in images])}, rounds=1, warmup=0)
        ours, full = (BATCH * front_total(front.config, 1, p) for p in (False, True))
        scaled = Timing(tuple(s * BATCH for s in baseline.seconds))
        self.row(f"{BATCH} cold images in a batch", times["ours"], scaled, ours, full / ours)

    def warm(self, front: FusionFrontEnd, image: Views, baseline: Timing) -> None:
        """Questions about a cached image; the baseline knows no cache and starts over."""
        front.configure(CacheSizes())
        front.fuse([(self.ids, image)])
        questions = [[1, -200, *[10 + q] * (TEXT_ROWS - 1)] for q in range(BATCH)]
        turns = [[1, -200, *range(2, TEXT_ROWS * t + 1)] for t in (1, 2, 3)]
        times = self.timed(
            {
                "one": lambda: front.fuse([(questions[0], image)]),
                "eight": lambda: front.fuse([(q, image) for q in questions]),
                "turns": lambda: [front.fuse([(t, image)]) for t in turns[1:]],
            },
            self.rounds + 2,
        )
        text = flops.front_flops(front.config, 1, TEXT_ROWS)["text part"]
        self.row("second question", times["one"], baseline, text, None)
        self.ratios["second_question"] = self.rows[-1]["ratio"]
        for name, key, count in (
            (f"{BATCH} second questions in a batch", "eight", BATCH),
            ("turns 2 and 3 (120 and 180 rows)", "turns", 2),
        ):
            scaled = Timing(tuple(s * count for s in baseline.seconds))
            self.row(name, times[key], scaled, text * (BATCH if count == BATCH else 5))

    def stages(self, front: FusionFrontEnd, image: Views) -> None:
        """Each stage alone, and how near the vision tower and the image part come to plain GEMMs of their shapes."""
        config, pixels = front.config, image.pixels.to(self.dtype)
        fusion, text = front.prefusion_layers, front.embed_text(torch.arange(1, TEXT_ROWS + 1))
        with torch.inference_mode():
            features = front.vision_tower(pixels[:, 0])
            patches, compressed = front.encode(pixels)
            state = front.cache.state
            gemms = [*flops.tower_gemms(config, 1), *flops.image_part_gemms(config, 1)]
            ceiling = GemmCeiling(gemms, self.dtype)
            times = self.timed(
                {
                    "vision tower": lambda: front.vision_tower(pixels[:, 0]),
                    "image part": lambda: fusion.image_part(patches, compressed, state, [0]),
                    "gemm ceiling": ceiling.run,
                    "compressor": lambda: front.compressor(features),
                    "projector": lambda: front.mm_projector(features),
                    "text part": lambda: fusion.text_part(text, Segments.of([TEXT_ROWS], [0], "cpu"), state),
                }
            )
        operations = flops.front_flops(config, 1, TEXT_ROWS)
        for name, count in operations.items():
            self.row(name, times[name], None, count)
        self.row("gemm ceiling (torch.mm, same shapes)", times["gemm ceiling"], None, sum(g.flops for g in gemms))
        shares = [
            ceiling / (tower + part)
            for ceiling, tower, part in zip(*(times[n].seconds for n in ("gemm ceiling", "vision tower", "image part")))
        ]
        self.ratios["gemm_share"] = statistics.median(shares)

    def int8(self, image: Views, baseline: Timing) -> None:
        """int8 weights through torchao: speed beside the published structure, error beside this dtype."""
        front = build(self.dtype, hd=False, small=self.small)
        (exact,) = front.fuse([(self.ids, image)])
        quantize([front.vision_tower, front.mm_projector, front.prefusion_layers], "int8")
        front.configure(CacheSizes(0, 0))
        (rows,) = front.fuse([(self.ids, image)])
        times = self.timed({"int8": lambda: front.fuse([(self.ids, image)])})
        ours, full = (front_total(front.config, 1, p) for p in (False, True))
        self.row("cold image, int8 (torchao, eager)", times["int8"], baseline, ours, full / ours)
        self.rows[-1]["relative_error"] = ((rows.float() - exact.float()).norm() / exact.float().norm()).item()

    def hd(self) -> None:
        front = build(self.dtype, hd=True, small=self.small)
        self.published = PublishedFrontEnd(front)
        front.pack()
        self.cold("HD image", front, make_views(1, 5, seed=4), rounds=max(1, self.rounds - 1), warmup=0)
        self.ratios["hd"] = self.rows[-1]["ratio"]


class GemmCeiling:
    """The products of a stage and nothing else, each over weights of its own, as the model's layers have."""

    def __init__(self, gemms: list[flops.Gemm], dtype: torch.dtype):
        self.products: list[tuple[Tensor, Tensor]] = []
        for gemm in gemms:
            x = torch.randn(gemm.m, gemm.k).to(dtype)
            weight = torch.randn(gemm.n, gemm.k).to(dtype)
            self.products += [(x, weight.clone().T) for _ in range(gemm.count)]

    def run(self) -> None:
        for x, weight in self.products:
            torch.mm(x, weight)


def front_total(config: LlavaMiniConfig, frames: int, published: bool) -> int:
    return sum(flops.front_flops(config, frames, TEXT_ROWS, published).values())


def run(dtypes: list[str], rounds: int, small: bool) -> dict[str, Any]:
    """All measurements; the result is what `--json` stores."""
    result: dict[str, Any] = {"benchmark": "frontend", "text_rows": TEXT_ROWS, "small": small, "machine": machine()}
    started = time.perf_counter()
    with tqdm(unit=" runs", file=sys.stderr, mininterval=1) as bar:
        for name in dtypes:
            bench = Bench(getattr(torch, name), rounds, small, bar)
            bar.set_description(f"frontend, {name}")
            bench.standard()
            bench.hd()
            result["ratios" if name == "float32" else f"ratios_{name.replace('bfloat16', 'bf16')}"] = bench.ratios
            result[f"rows_{name}"] = bench.rows
    result["peak_memory_bytes"] = peak_memory()
    result["seconds"] = time.perf_counter() - started
    if {"rows_float32", "rows_bfloat16"} <= result.keys():
        cold = {n: next(r for r in result[f"rows_{n}"] if r["name"] == "cold image") for n in ("float32", "bfloat16")}
        result["bf16_over_published_float32"] = (
            cold["float32"]["published"]["median_s"] / cold["bfloat16"]["ours"]["median_s"]
        )
    return result


def render_row(row: dict[str, Any]) -> str:
    line = f"{row['name']:38s} {row['gflops_per_s']:6.0f} GFLOP/s, spread {row['ours']['spread']:4.0%}"
    if "ratio" in row:
        line += f", {row['ratio']:6.2f} x published"
    if row.get("flop_bound"):
        line += f" (FLOP bound {row['flop_bound']:.2f})"
    if "relative_error" in row:
        line += f", relative error {row['relative_error']:.1e}"
    return line


def render(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    lines = [f"{result['machine']['cpu']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}"]
    for key in (k for k in result if k.startswith("rows_")):
        lines += ["", key.removeprefix("rows_"), *map(render_row, result[key])]
    for key in (k for k in result if k.startswith("ratios")):
        lines.append(f"{key}: " + ", ".join(f"{name} {value:.2f}" for name, value in result[key].items()))
    if "bf16_over_published_float32" in result:
        lines.append(f"bfloat16 over the published float32, cold image: {result['bf16_over_published_float32']:.2f}")
    lines.append(f"peak memory {result['peak_memory_bytes'] / 2**30:.1f} GiB, {result['seconds']:.0f} s in all")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini_fast.bench.frontend",
        description="Time the fusion front end at Llama-3.1-8B's widths against the published structure, side by side.",
        epilog="example: python -m llava_mini_fast.bench.frontend --json bench/results/frontend-cpu.json",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="store the result here")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one dtype only (default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="tiny widths, to try the benchmark; its ratios mean nothing"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    result = run([args.dtype] if args.dtype else ["float32", "bfloat16"], args.rounds, args.small)
    print(render(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
