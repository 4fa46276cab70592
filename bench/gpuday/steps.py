"""The steps of a GPU day. Each writes a row for everything that it measures, and stops where its time is over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llava_mini_fast.bench import baselines, ceilings, kernels, shapes
from llava_mini_fast.bench.gpuday.plan import ROWS, RowFile
from llava_mini_fast.bench.judge import Judge
from llava_mini_fast.bench.timing import clock_of, machine
from llava_mini_fast.ops import backend as backends

KERNELS = {
    "compressor_attention": ("image-q1", "video32-q1", "image-q64", "hd-q64"),
    "causal_attention": ("image-llama", "image-last-layer-llama", "video32-llama", "hd-llama", "hd-last-layer-llama"),
    "prefix_attention": (
        "text20-llama", "text60-llama", "text500-llama", "hd-text60-llama", "second-questions8-llama",
        "video32-text60-llama", "mixed-llama", "text60-vicuna", "video32-text60-vicuna",
    ),
    "rms_norm": ("text60", "video32"),
    "rope": ("text60-llama", "video32-llama"),
    "swiglu": ("text60-llama", "video32-llama"),
    "add_frames": ("video32-text60",),
}  # fmt: skip
"""What "kernels" times: the shapes that serving meets, a quarter of the registry."""
TOP = 30
"""Kernels of a profile that are written down."""


@dataclass
class Context:
    """What a step is given."""

    rows: RowFile
    out: Path
    limit: float
    goldens: Path
    rehearse: bool
    start: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """In a rehearsal float32 alone: the interpreter has no bfloat16, and float16 is slow on a CPU."""
        return (torch.float32,) if self.rehearse else (torch.bfloat16, torch.float32, torch.float16)

    @property
    def backends(self) -> dict[str, str | None]:
        """The backends to prove, and why one can't run. In a rehearsal Triton's interpreter stands in, where it works."""
        if self.rehearse:
            return {name: None for name in ("torch", "triton") if name == "torch" or interpreter_works()}
        return {name: backends.unavailable(name, self.device) for name in ("torch", "triton", "cuda")}

    def each(self, items: Iterable[Any], name: Callable[[Any], str]) -> Iterator[Any]:
        """The items for which there is time; the others are named in one row."""
        items = list(items)
        for done, item in enumerate(items):
            if time.monotonic() - self.start > 0.95 * self.limit:
                self.rows.add(
                    case="left out", state="left out", why="no time", left_out=[name(i) for i in items[done:]]
                )
                return
            yield item

    def judged(self, case: str, red: str | None, **more: Any) -> None:
        """A row with a verdict."""
        self.rows.add(case=case, state="red" if red else "ok", why=red or "", **more)


@cache
def interpreter_works() -> bool:
    """Whether Triton's interpreter runs a loop: Triton 3.6's doesn't with NumPy from 2.4 on."""
    shape = next(shape for shape in shapes.SMALL if shape.op == "add_frames")
    try:
        baselines.call(shape.op, shape.make(torch.float32), "triton")
    except Exception:  # whatever is wrong with it, the rehearsal goes on without
        return False
    return True


def run_step(name: str, out: Path, limit: float, goldens: Path, rehearse: bool) -> None:
    """Run one step in this process.

    Raises:
        RuntimeError: there is no CUDA device, and this is no rehearsal.
    """
    if not rehearse and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device here; --rehearse runs the day on a CPU, with stand-ins.")
    rows = RowFile(out / ROWS, name)
    try:
        with torch.no_grad():
            STEPS[name](Context(rows, out, limit, goldens, rehearse))
    finally:
        rows.close()


def card(day: Context) -> None:
    """Versions, clocks, ceilings of this card today."""
    settings = {
        name: value for name, value in os.environ.items() if name.startswith(("TORCH_", "TRITON_", "CUDA_", "NVIDIA_"))
    }
    day.rows.add(machine=machine(day.device), environment=settings)
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,ecc.mode.current"
    if shutil.which("nvidia-smi"):
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        day.rows.add(case="nvidia-smi", said=said.stdout.strip() or said.stderr.strip(), query=query)
    for backend, reason in day.backends.items():
        day.judged(f"backend {backend}", reason)
    clock = clock_of(day.device)
    for dtype in day.dtypes:
        found = ceilings.measure(day.device, dtype, clock)
        day.rows.add(case=f"ceilings {_name(dtype)}", **found.as_json())
    size = 2**20 if day.rehearse else 2**28
    source, target = torch.randint(0, 256, (size,), dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    kinds = {"pageable": source} if day.rehearse else {"pageable": source, "pinned": source.pin_memory()}
    target = target.to(day.device)
    for kind, host in kinds.items():
        seconds = min(clock(lambda host=host: target.copy_(host, non_blocking=True)) for _ in range(3))
        day.rows.add(case=f"upload from {kind} memory", bytes_per_s=size / seconds)


def goldens(day: Context) -> None:
    """The engine against the published numbers, as `load(device="cuda")` gives it."""
    import llava_mini_fast as lmf
    from llava_mini_fast.image_cache import CacheSizes
    from llava_mini_fast.testing.cases import load_cases
    from llava_mini_fast.testing.goldens import run

    cases = load_cases(day.goldens)
    if day.rehearse:
        cases = [case for case in cases if case.name in ("image_short", "video_one_frame")]
    backends_here = {name: reason for name, reason in day.backends.items() if name == "torch" or not day.rehearse}

    def engine(backend: str, sizes: tuple[int, int] | None = None) -> Callable[[Path, str], Any]:
        def load(directory: Path, dtype: str) -> Any:
            model = lmf.load(directory, day.device, dtype, backend)
            if sizes is not None:
                model.front.configure(CacheSizes(*(frames * model.front.cache.frame_bytes for frames in sizes)), 2)
            return model

        return load

    jobs = [(f"float32 {name}", name, None) for name in backends_here]
    jobs += [
        (f"float32 auto, image cache {kind}", "auto", sizes)
        for kind, sizes in {"off": (0, 0), "on": (100, 0), "host tier": (1, 100)}.items()
    ]
    for title, backend, sizes in day.each(jobs, lambda job: job[0]):
        if reason := backends_here.get(backend):
            day.judged(title, reason)
            continue
        for r in run(cases, engine(backend, sizes)):
            error = {"error": r.max_error, "tolerance": r.tolerance, "tokens_equal": r.tokens_equal}
            day.judged(
                f"{title}: {r.case}", None if r.passed else f"error {r.max_error}, {r.note or 'tokens differ'}", **error
            )
    rows = {case.name: (case, case.rows[0]) for case in cases}
    chosen = ["image_short"] if day.rehearse else ["image", "video", "image_c2", "vicuna"]
    pairs = [(dtype, name) for dtype in ("bfloat16", "float16") for name in chosen]
    for dtype, name in day.each(pairs, " ".join):
        _judge_low_precision(day, *rows[name], dtype, backends_here)


def _judge_low_precision(day: Context, case: Any, row: Any, dtype: str, backends_here: dict[str, str | None]) -> None:
    """One golden at a low dtype by the numerics law, on every backend."""
    import llava_mini_fast as lmf
    from llava_mini_fast.preprocess.views import normalize, views
    from llava_mini_fast.reference import Reference
    from llava_mini_fast.testing.numerics import assert_law

    directory, low = case.checkpoint_directory(), getattr(torch, dtype)
    reference = Reference(directory, low)
    plain = reference.embed(row.prompt_ids, normalize(views(row.media, reference.config).pixels, low))
    for backend, reason in backends_here.items():
        if not reason:
            result = lmf.load(directory, day.device, dtype, backend).embed(row.prompt_ids, row.media).cpu()
            try:
                assert_law(result, row.fused, plain)
            except AssertionError as error:
                reason = str(error)
        day.judged(f"{dtype} {backend}: {case.name}", reason)


def ops(day: Context) -> None:
    """The judge over every op at every shape, which needs no more than a launch where the kernels are compiled already."""
    here = {name: reason for name, reason in day.backends.items() if name != "torch"}
    for name, reason in here.items():
        if reason:
            day.judged(f"all ops by {name}", reason)
    cases = [(shape, dtype) for dtype in day.dtypes for shape in _shapes(day)]
    for shape, dtype in day.each(cases, lambda case: f"{case[0].op} {case[0].name} {_name(case[1])}"):
        inputs = shape.make(dtype, day.device)
        judge = Judge(shape.op, inputs, dtype)
        for backend in ["torch", *(name for name, reason in here.items() if not reason)]:
            what = f"{shape.op} {shape.name} {_name(dtype)} {backend}"
            reason = kernels.unsupported(backend, shape.op, inputs, dtype)
            if reason:
                day.rows.add(case=what, state="left out", why=reason)
            else:
                day.judged(what, judge.red(lambda given, b=backend, op=shape.op: baselines.call(op, given, b)))


def frontend(day: Context) -> None:
    """Both published widths against the published structure; the whole engine's first token."""
    from llava_mini_fast.bench import first_token
    from llava_mini_fast.bench import frontend as benchmark

    dtype = torch.float32 if day.rehearse else torch.bfloat16
    rounds, sizes = (1, benchmark.Sizes((2,), 2, 2)) if day.rehearse else (5, None)

    def report(row: dict[str, Any]) -> None:
        day.rows.add(case=f"{row.get('model', 'llama')} {row['name']}", **row)

    def bench(model: str) -> Any:
        return benchmark.Bench(dtype, rounds, day.rehearse, report, day.device, model, sizes)

    jobs = {
        "llama": lambda: bench("llama").standard(),
        "first token": lambda: first_token.measure(day.device, dtype, rounds, report, day.rehearse),
        "llama HD": lambda: bench("llama").hd(),
        "vicuna": lambda: bench("vicuna").standard(),
        "vicuna HD": lambda: bench("vicuna").hd(),
    }
    for name in day.each(jobs, str):
        try:
            jobs[name]()
        except SystemExit as error:  # the two structures differ
            day.judged(name, str(error))
        if not day.rehearse:
            torch.cuda.empty_cache()


def time_kernels(day: Context) -> None:
    """The registry's benchmark over the shapes that matter, without torch.compile, which compiles for longer than it runs."""
    dtype = "float32" if day.rehearse else "bfloat16"
    options = kernels.Options(device=day.device.type, dtypes=[dtype], rounds=2 if day.rehearse else 7, compile=False)
    bench = kernels.Bench(options)
    bench.shapes = [s for s in _shapes(day) if day.rehearse or s.name in KERNELS[s.op]]
    order = list(KERNELS)
    bench.shapes.sort(key=lambda shape: order.index(shape.op))
    rows = bench.rows()
    total = len(bench.shapes) * len(bench.backends)
    for index in day.each(range(total), lambda index: f"row {index} of {total}"):
        row = next(rows)
        day.rows.add(**row.as_json() | {"case": f"{row.case} {row.backend}"})
        if index == total - 1:
            day.rows.add(
                case="ceilings", **{_name(d): c.as_json() for d, c in bench.ceilings.items()}, notes=bench.notes
            )


def tuning(day: Context) -> None:
    """The rows of the tuned table that matter. The table goes to the results; a person commits it."""
    from llava_mini_fast.bench import tune
    from llava_mini_fast.triton_kernels import launch

    if day.rehearse:
        tune.ROUNDS = tune.CALLS = 1
    tuner = tune.Tuner(launch, torch.float32 if day.rehearse else torch.bfloat16, day.device)
    chosen = [s for s in shapes.SMALL if s.op in ("swiglu", "rope")] if day.rehearse else list(tune.DAY)
    table = dict(launch.TABLE)
    for key, read in day.each(tuner.keys(chosen).items(), lambda row: row[0]):
        winner, gain = tuner.row(key, read)
        table.pop(key, None)
        if winner:
            table[key] = winner
        launch.TABLE = dict(table)
        tune.write(day.out / "tuned.json", table)
        day.rows.add(case=key, shapes=[shape.name for shape in read], settings=winner, gain=gain)


def trace(day: Context) -> None:
    """Where the time goes: kernels by their time, launches, and the device's idle share."""
    from torch.profiler import ProfilerActivity, profile

    from llava_mini_fast.bench import frontend as benchmark

    dtype = torch.float32 if day.rehearse else torch.bfloat16
    front = benchmark.build(dtype, hd=False, small=day.rehearse, device=day.device)
    ids = [1, -200, *range(2, benchmark.TEXT_ROWS + 1)]
    frames = 2 if day.rehearse else 32
    clip, image = (benchmark.make_views(n, 1, seed=n, device=day.device) for n in (frames, 1))
    activity = ProfilerActivity.CPU if day.rehearse else ProfilerActivity.CUDA
    runs = {
        f"{frames} frames": lambda: front.fuse([(ids, clip)]),
        "second question": lambda: front.fuse([(ids, image)]),
    }
    for name in day.each(runs, str):
        # twice as warm as need be, about other pictures: what is compiled or allocated at first is not what is asked
        for seed in (98, 99):
            front.fuse([(ids, benchmark.make_views(frames, 1, seed=seed, device=day.device))])
        front.fuse([(ids, image)])
        _wait(day.device)
        with profile(activities=[activity]) as seen:
            start = time.perf_counter()
            runs[name]()
            _wait(day.device)
            wall = time.perf_counter() - start
        _profiled(day, name, wall, seen)


def _profiled(day: Context, name: str, wall: float, seen: Any) -> None:
    on_device = not day.rehearse
    totals = [
        (e.key, e.count, (e.self_device_time_total if on_device else e.self_cpu_time_total) / 1e6)
        for e in seen.key_averages()
    ]
    totals = sorted((t for t in totals if t[2] > 0), key=lambda t: -t[2])
    busy = sum(seconds for *_, seconds in totals)
    day.rows.add(
        case=f"{name}: in all", wall_s=wall, busy_s=busy, gap_share=max(0.0, 1 - busy / wall),
        launches=sum(count for _, count, _ in totals), kinds=len(totals),
    )  # fmt: skip
    for rank, (kernel, count, seconds) in enumerate(totals[:TOP]):
        day.rows.add(
            case=f"{name}: kernel {rank + 1}", kernel=kernel, launches=count, seconds=seconds, share=seconds / busy
        )


def sanitizer(day: Context) -> None:
    """compute-sanitizer over one small case of each op and dtype, a process for each tool and backend."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists() and not day.rehearse:
        day.rows.add(case="sanitizer", state="left out", why="compute-sanitizer is not installed")
        return
    # every allocation its own, so that a kernel that leaves one is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    here = [name for name, reason in day.backends.items() if name != "torch" and not reason]
    runs = [(check, backend) for check in ("memcheck", "racecheck") for backend in here]
    for check, backend in day.each(runs, " ".join):
        code = f"from llava_mini_fast.bench.gpuday.steps import small_cases; small_cases({backend!r}, {day.device.type!r}, {list(map(_name, day.dtypes))})"
        command = [sys.executable, "-c", code]
        if not day.rehearse:
            # not API errors: torch asks for things that a device may refuse
            command = [
                tool,
                f"--tool={check}",
                "--error-exitcode=9",
                "--report-api-errors=no",
                "--print-limit=20",
                *command,
            ]
        began = time.monotonic()
        left = max(1.0, day.limit - (began - day.start))
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            day.rows.add(case=f"{check} {backend}", state="left out", why=f"not done after {left:.0f} s")
            return
        said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        day.judged(
            f"{check} {backend}", None if done.returncode == 0 else f"it ended with {done.returncode}",
            said=said, seconds=time.monotonic() - began,
        )  # fmt: skip


def small_cases(backend: str, device: str, dtypes: list[str]) -> None:
    """Run every op once at a small size in every dtype; what compute-sanitizer looks at."""
    for dtype in (getattr(torch, name) for name in dtypes):
        for shape in shapes.SMALL:
            inputs = shape.make(dtype, device)
            if not kernels.unsupported(backend, shape.op, inputs, dtype):
                baselines.call(shape.op, inputs, backend)
    _wait(torch.device(device))


def _shapes(day: Context) -> list[shapes.Shape]:
    return list(shapes.SMALL if day.rehearse else shapes.SHAPES)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


STEPS: dict[str, Callable[[Context], None]] = {
    "card": card,
    "goldens": goldens,
    "ops": ops,
    "frontend": frontend,
    "kernels": time_kernels,
    "tuning": tuning,
    "trace": trace,
    "sanitizer": sanitizer,
}
