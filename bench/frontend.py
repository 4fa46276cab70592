"""The front end against the published structure, at real size: `python -m llava_mini_fast.bench.frontend --help`.

Every number is what a caller waits for: on CUDA the device is synchronised before and after, pixels lie in pinned memory, and
the device's own time, by events, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava_mini_fast.bench import ceilings, flops
from llava_mini_fast.bench.published import PublishedFrontEnd
from llava_mini_fast.bench.timing import Timing, clock_of, event_clock, interleave, machine, peak_memory, waiting_clock
from llava_mini_fast.config import CLIP_L_336, MODEL_TYPE, LlavaMiniConfig
from llava_mini_fast.device import choose_device
from llava_mini_fast.fusion import FusionFrontEnd
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.precision import quantize
from llava_mini_fast.preprocess.views import Views, normalize

TEXT_ROWS = 60
BASELINE_FRAMES = 4
"""The published loop's cost is the same every frame; four of them stand for all of a clip's."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; a GPU bears more."""

    clips: tuple[int, ...]
    """Frames."""
    questions: int
    """In a batch, about one picture."""
    images: int
    """In a batch, all different."""


SIZES = {"cpu": Sizes(clips=(32,), questions=8, images=8), "cuda": Sizes(clips=(15, 32, 64), questions=32, images=8)}
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
VICUNA_7B = {
    **{name: value for name, value in LLAMA_8B.items() if name != "rope_scaling"}, "intermediate_size": 11008,
    "num_key_value_heads": 32, "rope_theta": 10000.0, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS = {"llama": LLAMA_8B, "vicuna": VICUNA_7B}
"""Widths of the published checkpoints."""
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "prefusion_layer_num": 2,
}  # fmt: skip


def front_config(model: str = "llama", hd: bool = False, small: bool = False) -> LlavaMiniConfig:
    """The configuration of a published model of `MODELS`; `small` has tiny widths, for trying the benchmark."""
    raw = MODELS[model] | (SMALL if small else {}) | {"compressor_size": 8 if hd else 1, "resolution_ratio": 1 + hd}
    config = LlavaMiniConfig.from_dict(raw)
    config.vision.update(CLIP_L_336 | ({"num_hidden_layers": 3, "intermediate_size": 256} if small else {}))
    return config


def build(
    dtype: torch.dtype,
    hd: bool,
    small: bool,
    model: str = "llama",
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> FusionFrontEnd:
    """A front end of a published model's widths (Llama-3.1-8B: 1.2 B parameters) with random weights."""
    config, generator = front_config(model, hd, small), torch.Generator().manual_seed(0)
    table = torch.randn(config.vocab_size, config.hidden_size, generator=generator).to(device, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            front = FusionFrontEnd(config, lambda ids: table[ids], backend).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    fill(front, generator)
    return front


def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random matrices, scaled by their width; norms of one and biases of nothing."""
    block = torch.randn(1_000_003, generator=generator)  # repeated: drawing a billion numbers would take minutes
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scaled = (block * parameter[0].numel() ** -0.5).to(parameter.device, parameter.dtype)
        flat = parameter.data.view(-1)
        whole = len(flat) // len(scaled) * len(scaled)
        flat[:whole].view(-1, len(scaled)).copy_(scaled.expand(whole // len(scaled), -1))
        flat[whole:].copy_(scaled[: len(flat) - whole])


def make_views(frames: int, views: int, seed: int, device: torch.device | str = "cpu") -> Views:
    """Random frames under made-up digests (nothing here hashes); in pinned memory for a CUDA device."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, views, 3, 336, 336), dtype=torch.uint8, generator=generator)
    if torch.device(device).type == "cuda":
        pixels = pixels.pin_memory()
    return Views("video", pixels, tuple(f"{seed} {i}".encode() for i in range(frames)))


Report = Callable[[dict[str, Any]], None]
"""Called with every row as soon as it is measured."""


class Bench:
    """Every measurement of one model at one dtype; `rows` collects what was measured, `ratios` what is judged."""

    def __init__(
        self,
        dtype: torch.dtype,
        rounds: int,
        small: bool,
        report: Report = lambda row: None,
        device: torch.device | str = "cpu",
        model: str = "llama",
        sizes: Sizes | None = None,
        tick: Callable[[], None] = lambda: None,
    ):
        self.dtype, self.rounds, self.small, self.report, self.model, self.tick = (
            dtype, rounds, small, report, model, tick,
        )  # fmt: skip
        self.device = torch.device(device)
        self.sizes = sizes or SIZES[self.device.type]
        self.rows: list[dict[str, Any]] = []
        self.ratios: dict[str, float] = {}
        self.ids = [1, -200, *range(2, TEXT_ROWS + 1)]
        # of large GEMMs; on a CPU torch.mm over the same shapes says more
        self.peak = ceilings.gemm(self.device, dtype, clock_of(self.device)) if self.device.type == "cuda" else None

    def build(self, hd: bool) -> FusionFrontEnd:
        return build(self.dtype, hd, self.small, self.model, self.device)

    def views(self, frames: int, views: int, seed: int) -> Views:
        return make_views(frames, views, seed, self.device)

    def timed(
        self, candidates: dict[str, Callable[[], Any]], rounds: int | None = None, warmup: int = 1
    ) -> dict[str, Timing]:
        return interleave(candidates, rounds or self.rounds, warmup, self.tick, waiting_clock(self.device))

    def row(
        self,
        name: str,
        ours: Timing,
        theirs: Timing | None,
        operations: int,
        bound: float | None = None,
        run: Callable[[], Any] | None = None,
        **more: Any,
    ) -> None:
        """One measurement. `run`: what was measured, whose time and memory on a CUDA device are added."""
        entry: dict[str, Any] = {
            "model": self.model, "name": name, "ours": ours.as_json(), "gflops_per_s": operations / ours.median / 1e9,
        }  # fmt: skip
        if theirs is not None:
            entry |= {"published": theirs.as_json(), "ratio": theirs.median / ours.median, "flop_bound": bound}
        if run is not None and self.device.type == "cuda":
            on_device = statistics.median(event_clock(run, head_start=20e-3) for _ in range(self.rounds))
            entry |= {"device_s": on_device, "activation_bytes": activation_bytes(run, self.device)}
        if self.peak is not None:
            entry["gemm_ceiling_share"] = operations / ours.median / self.peak
        entry |= more
        self.rows.append(entry)
        self.report(entry)

    def check(self, front: FusionFrontEnd, media: Views) -> None:
        """No number is reported where the two don't agree."""
        (ours,) = front.fuse([(self.ids, media)])
        theirs = self.published.embed(self.ids, normalize(media.pixels, self.dtype))
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
        pixels = normalize(media.pixels[:count], self.dtype)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()

        def run() -> None:
            front.fuse([(self.ids, media)])

        candidates = {"ours": run, "published": lambda: published.embed(self.ids, pixels)}
        ceiling = None
        if self.device.type == "cuda":
            frames = min(media.num_frames, front.cache.chunk)
            ceiling = GemmCeiling(flops.front_gemms(front.config, frames, TEXT_ROWS), self.dtype, self.device)
            candidates["gemm ceiling"] = ceiling.run
        times = self.timed(candidates, rounds, warmup)
        baseline = Timing(tuple(s * media.num_frames / count for s in times["published"].seconds))
        more = {}
        if ceiling is not None:
            more["mm_share"] = times["gemm ceiling"].median * media.num_frames / frames / times["ours"].median
        ours, full = (front_total(front.config, media.num_frames, p) for p in (False, True))
        self.row(name, times["ours"], baseline, ours, full / ours, run, frames=media.num_frames, **more)
        return baseline

    def standard(self) -> None:
        front, gpu = self.build(hd=False), self.device.type == "cuda"
        image = self.views(1, 1, seed=1)
        self.published = PublishedFrontEnd(front)  # before packing, which gives the plain weights up
        front.pack()
        self.check(front, self.views(2, 1, seed=3))
        self.stages(front, image)
        baseline = self.cold("cold image", front, image, rounds=self.rounds, warmup=1)
        self.ratios["cold_image"] = self.rows[-1]["ratio"]
        self.warm(front, image, baseline)
        for frames in self.sizes.clips:
            clip = self.views(frames, 1, seed=100 + frames)
            once = {"rounds": self.rounds, "warmup": 1} if gpu else {"rounds": 1, "warmup": 0}
            self.cold(f"{frames}-frame video", front, clip, **once, fewer=min(frames, BASELINE_FRAMES))
            self.ratios[f"video{frames}"] = self.rows[-1]["ratio"]
        self.batch(front, baseline)
        if self.dtype == torch.bfloat16 and not gpu:
            self.int8(image, baseline)

    def batch(self, front: FusionFrontEnd, baseline: Timing) -> None:
        """Prompts about different images in one call; the baseline takes one image after the other."""
        number, gpu = self.sizes.images, self.device.type == "cuda"
        images = [self.views(1, 1, seed=10 + index) for index in range(number)]
        front.configure(CacheSizes(0, 0))

        def run() -> None:
            front.fuse([(self.ids, image) for image in images])

        times = self.timed({"ours": run}, rounds=self.rounds if gpu else 1, warmup=int(gpu))
        ours, full = (number * front_total(front.config, 1, p) for p in (False, True))
        scaled = Timing(tuple(s * number for s in baseline.seconds))
        self.row(f"{number} cold images in a batch", times["ours"], scaled, ours, full / ours, run)

    def warm(self, front: FusionFrontEnd, image: Views, baseline: Timing) -> None:
        """Questions about a cached image; the baseline knows no cache and starts over."""
        front.configure(CacheSizes())
        front.fuse([(self.ids, image)])
        number = self.sizes.questions
        questions = [[1, -200, *[10 + q] * (TEXT_ROWS - 1)] for q in range(number)]
        turns = [[1, -200, *range(2, TEXT_ROWS * t + 1)] for t in (1, 2, 3)]
        runs = {
            "second question": lambda: front.fuse([(questions[0], image)]),
            f"{number} second questions in a batch": lambda: front.fuse([(q, image) for q in questions]),
            "turns 2 and 3 (120 and 180 rows)": lambda: [front.fuse([(t, image)]) for t in turns[1:]],
        }
        times = self.timed(runs, self.rounds + 2)
        text = flops.front_flops(front.config, 1, TEXT_ROWS)["text part"]
        for (name, run), instead, work in zip(runs.items(), (1, number, 2), (1, number, 5)):
            scaled = Timing(tuple(s * instead for s in baseline.seconds))
            self.row(name, times[name], scaled, text * work, None, run)
        self.ratios["second_question"] = self.rows[-3]["ratio"]

    def stages(self, front: FusionFrontEnd, image: Views) -> None:
        """Each stage alone, and how near the vision tower and the image part come to plain GEMMs of their shapes."""
        config, pixels = front.config, normalize(image.pixels.to(self.device), self.dtype)
        fusion, text = front.prefusion_layers, front.embed_text(torch.arange(1, TEXT_ROWS + 1, device=self.device))
        segments = Segments.of([TEXT_ROWS], [0], self.device)
        with torch.inference_mode():
            features = front.vision_tower(pixels[:, 0])
            patches, compressed = front.encode(pixels)
            state = front.cache.allocate()
            gemms = [*flops.tower_gemms(config, 1), *flops.image_part_gemms(config, 1)]
            ceiling = GemmCeiling(gemms, self.dtype, self.device)
            runs = {
                "vision tower": lambda: front.vision_tower(pixels[:, 0]),
                "image part": lambda: fusion.image_part(patches, compressed, state, [0]),
                "gemm ceiling": ceiling.run,
                "compressor": lambda: front.compressor(features),
                "projector": lambda: front.mm_projector(features),
                "text part": lambda: fusion.text_part(text, segments, state),
            }
            times = self.timed(runs)
            for name, count in flops.front_flops(config, 1, TEXT_ROWS).items():
                self.row(name, times[name], None, count, None, runs[name])
        self.row("gemm ceiling (torch.mm, same shapes)", times["gemm ceiling"], None, sum(g.flops for g in gemms))
        shares = [
            ceiling / (tower + part)
            for ceiling, tower, part in zip(*(times[n].seconds for n in ("gemm ceiling", "vision tower", "image part")))
        ]
        self.ratios["gemm_share"] = statistics.median(shares)

    def int8(self, image: Views, baseline: Timing) -> None:
        """int8 weights through torchao: speed beside the published structure, error beside this dtype."""
        front = self.build(hd=False)
        (exact,) = front.fuse([(self.ids, image)])
        quantize([front.vision_tower, front.mm_projector, front.prefusion_layers], "int8")
        front.configure(CacheSizes(0, 0))
        (rows,) = front.fuse([(self.ids, image)])
        times = self.timed({"int8": lambda: front.fuse([(self.ids, image)])})
        ours, full = (front_total(front.config, 1, p) for p in (False, True))
        error = ((rows.float() - exact.float()).norm() / exact.float().norm()).item()
        self.row("cold image, int8 (torchao, eager)", times["int8"], baseline, ours, full / ours, relative_error=error)

    def hd(self) -> None:
        front, gpu = self.build(hd=True), self.device.type == "cuda"
        self.published = PublishedFrontEnd(front)
        front.pack()
        rounds = self.rounds if gpu else max(1, self.rounds - 1)
        self.cold("HD image", front, self.views(1, 5, seed=4), rounds=rounds, warmup=int(gpu))
        self.ratios["hd"] = self.rows[-1]["ratio"]


def activation_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a run takes on a CUDA device beside what is allocated before it (weights, cache)."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class GemmCeiling:
    """The products of a stage and nothing else, each over weights of its own, as the model's layers have."""

    def __init__(self, gemms: list[flops.Gemm], dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.products: list[tuple[Tensor, Tensor]] = []
        for gemm in gemms:
            x = torch.randn(gemm.m, gemm.k, device=device).to(dtype)
            weight = torch.randn(gemm.n, gemm.k, device=device).to(dtype)
            self.products += [(x, weight.clone().T) for _ in range(gemm.count)]

    def run(self) -> None:
        for x, weight in self.products:
            torch.mm(x, weight)


def front_total(config: LlavaMiniConfig, frames: int, published: bool) -> int:
    return sum(flops.front_flops(config, frames, TEXT_ROWS, published).values())


def run(dtypes: list[str], rounds: int, small: bool, device: str = "cpu", model: str = "llama") -> dict[str, Any]:
    """All measurements; the result is what `--json` stores.

    Raises:
        ValueError: there is no such device here.
    """
    where = choose_device(device)
    result: dict[str, Any] = {
        "benchmark": "frontend", "model": model, "text_rows": TEXT_ROWS, "small": small, "machine": machine(where),
    }  # fmt: skip
    started = time.perf_counter()
    with tqdm(unit=" runs", file=sys.stderr, mininterval=1) as bar:
        for name in dtypes:
            bench = Bench(
                getattr(torch, name), rounds, small, lambda row: bar.write(render_row(row)), where, model,
                tick=bar.update,
            )  # fmt: skip
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
    if "device_s" in row:
        line += f", {row['device_s'] / row['ours']['median_s']:4.0%} of it on the device"
    if "mm_share" in row:
        line += f", {row['mm_share']:4.0%} of torch.mm"
    if "gemm_ceiling_share" in row:
        line += f", {row['gemm_ceiling_share']:4.0%} of a large GEMM"
    if "relative_error" in row:
        line += f", relative error {row['relative_error']:.1e}"
    return line


def render(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    m = result["machine"]
    where = f"{m['cpu']}, {m['threads']} threads" if m["device"] == "cpu" else m["device"]
    lines = [f"{where}, torch {m['torch']}, {result['model']}'s widths"]
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
        description="Time the fusion front end at a published model's widths against the published structure, side by side.",
        epilog="example: python -m llava_mini_fast.bench.frontend --json bench/results/frontend-cpu.json",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="store the result here")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one dtype only (default: both)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="cpu", help="where to run (default: %(default)s)"
    )
    parser.add_argument("--model", choices=MODELS, default="llama", help="whose widths (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="tiny widths, to try the benchmark; its ratios mean nothing"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    try:
        result = run(dtypes, args.rounds, args.small, args.device, args.model)
    except ValueError as error:
        parser.exit(1, f"frontend: {error}\n")
    print(render(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
