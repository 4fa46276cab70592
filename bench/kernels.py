"""The kernels one by one, at the shapes of `shapes.py`: `llava-mini bench kernels`.

For each row the op's numerics check runs first; a red one gives no number. Candidates and baselines then take turns over
inputs that rotate past the last-level cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from llava_mini_fast.bench import baselines, report
from llava_mini_fast.bench.ceilings import Ceilings, cache_bytes, measure
from llava_mini_fast.bench.judge import BASELINE_TOLERANCE, Judge, Run
from llava_mini_fast.bench.shapes import Inputs, Shape, copied, kernel_shape, matches, select
from llava_mini_fast.bench.timing import Timing, clock_of, interleave, machine
from llava_mini_fast.device import choose_device
from llava_mini_fast.ops import backend as backends

CPU_FLOPS, CPU_BYTES = 60e9, 400e6
"""Shapes above one of these take a CPU too long; there they run when --shape names them."""
CPU_BUDGET, CUDA_BUDGET = 1.2, 1.0
"""Seconds for all rounds of one shape; the rounds of heavy shapes are fewer than asked for, and at least one."""
LEAST = {"cpu": 5e-3, "cuda": 2e-4}
"""Seconds that one measurement should take; short ops are called several times in it."""
MOST_CALLS = {"cpu": 200, "cuda": 16}
"""Calls in one measurement; on CUDA few enough to be launched while the device sleeps."""
TAIL = "with values"


@dataclass(frozen=True)
class Options:
    """What `llava-mini bench kernels` was asked for; empty means everything, or the device's default."""

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    device: str = "cpu"
    dtypes: Sequence[str] = ()
    backends: Sequence[str] = ()
    rounds: int = 7
    compile: bool | None = None
    """torch.compile as a baseline; None: on CUDA alone, as on a CPU it takes longer to compile than all else to run."""


@dataclass
class Row:
    """One op, shape, dtype and backend. Numbers only where `state` is "ok"."""

    op: str
    shape: str
    dtype: str
    backend: str
    moved_bytes: int
    flops: int
    state: str = "left out"
    """"ok", "red" (the numerics check failed) or "left out"."""
    why: str = ""
    timing: Timing | None = None
    share: float = 0.0
    """Of the ceiling: the least time by copy bandwidth and GEMM speed over the measured time."""
    bound: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    """Baseline -> its median over this row's."""
    baselines: dict[str, Timing] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def case(self) -> str:
        return f"{self.op} {self.shape}"

    def as_json(self) -> dict[str, Any]:
        found = {
            name: getattr(self, name)
            for name in ("op", "shape", "dtype", "backend", "state", "why", "moved_bytes", "flops", "notes")
        }
        if self.timing is None:
            return found
        return found | self.timing.as_json() | {
            "gb_per_s": self.moved_bytes / self.timing.median / 1e9,
            "gflops_per_s": self.flops / self.timing.median / 1e9,
            "ceiling_share": self.share,
            "bound": self.bound,
            "baselines": {name: t.as_json() | {"ratio": self.ratios[name]} for name, t in self.baselines.items()},
        }  # fmt: skip


class Bench:
    """Every measurement of one run on one device."""

    def __init__(self, options: Options):
        self.options = options
        self.device = choose_device(options.device)
        default = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtypes = [_dtype(name) for name in options.dtypes or (default,)]
        self.shapes = select(options.ops, options.shapes)
        self.backends, self.notes = self._backends()
        self.ceilings: dict[torch.dtype, Ceilings] = {}

    def _backends(self) -> tuple[list[str], list[str]]:
        """Which backends are measured, and a note on each that can't be."""
        reasons = {
            name: backends.unavailable(name, self.device) for name in self.options.backends or ("triton", "cuda")
        }
        if self.options.backends:
            for name, reason in reasons.items():
                if name not in backends.BACKENDS or name == "auto":
                    raise ValueError(f"--backend must be one of {', '.join(backends.BACKENDS[1:])}; got {name!r}.")
                if reason:
                    raise ValueError(f"--backend {name} can't run on {self.device.type}: {reason}.")
            return list(self.options.backends), []
        if self.device.type == "cpu":
            return ["torch"], []
        notes = [f"{name} is not measured: {reason}" for name, reason in reasons.items() if reason]
        return [name for name, reason in reasons.items() if not reason] or ["torch"], notes

    def rows(self) -> Iterator[Row]:
        for dtype in self.dtypes:
            self.ceilings[dtype] = measure(self.device, dtype, clock_of(self.device))
            for shape in self.shapes:
                yield from self._shape(shape, dtype)

    def _shape(self, shape: Shape, dtype: torch.dtype) -> list[Row]:
        name = str(dtype).removeprefix("torch.")
        rows = [Row(shape.op, shape.name, name, b, shape.bytes(dtype), shape.flops) for b in self.backends]
        if why := self._too_heavy(shape, dtype):
            for row in rows:
                row.why = why
            return rows
        inputs = shape.make(dtype, self.device)
        judge, runs = Judge(shape.op, inputs, dtype), {}
        for row in rows:
            run = partial(baselines.call, shape.op, backend=row.backend)
            row.why = unsupported(row.backend, shape.op, inputs, dtype) or ""
            if row.why:
                continue
            red = judge.red(run)
            row.state, row.why = ("red", red) if red else ("ok", "")
            if not red:
                runs[row.backend] = run
                if shape.op == "compressor_attention":
                    runs[f"{row.backend} {TAIL}"] = partial(_with_values, run)
        if runs:
            others, notes = self._baselines(shape.op, dtype, judge)
            timings = self._time(runs | others, inputs, shape.bytes(dtype))
            for row in rows:
                if row.state == "ok":
                    self._fill(row, timings, dtype, notes, others)
        return rows

    def _too_heavy(self, shape: Shape, dtype: torch.dtype) -> str | None:
        if self.device.type != "cpu" or any(matches(name, shape) for name in self.options.shapes):
            return None
        if shape.flops <= CPU_FLOPS and shape.bytes(dtype) <= CPU_BYTES:
            return None
        return f"too long for a CPU ({shape.flops / 1e9:.0f} GFLOP, {shape.bytes(dtype) / 1e6:.0f} MB); --shape {shape.name} runs it"

    def _baselines(self, op: str, dtype: torch.dtype, judge: Judge) -> tuple[dict[str, Run], list[str]]:
        """Baselines that agree with the op, and a note on each other one."""
        found: dict[str, Run] = {"published": lambda inputs: baselines.PUBLISHED[op](**inputs)}
        notes = []
        if self.backends != ["torch"]:
            found["torch eager"] = partial(baselines.call, op, backend="torch")
        if self.options.compile or (self.options.compile is None and self.device.type == "cuda"):
            torch.compiler.reset()  # else the recompilation limit counts every shape so far
            found["torch.compile"] = torch.compile(partial(baselines.call, op, backend="torch"), dynamic=False)
        for library, ops in baselines.LIBRARIES.items():
            if op in ops:
                reason = baselines.library_missing(library, self.device, dtype)
                if reason:
                    notes.append(f"{library}: {reason}")
                else:
                    found[library] = lambda inputs, run=ops[op]: run(**inputs)
        for name, run in list(found.items()):
            if reason := judge.differs(name, run):
                notes.append(f"{name}: {reason}")
                del found[name]
        return found, notes

    def _time(self, runs: dict[str, Run], inputs: Inputs, moved: int) -> dict[str, Timing]:
        kind, clock = self.device.type, clock_of(self.device)
        # one iterator for all, so that nobody finds in the cache what the one before has just read
        copies = cycle([copied(inputs, self.device) for _ in range(rotation(moved, cache_bytes(self.device)))])
        cost = {name: clock(lambda run=run: run(next(copies))) for name, run in runs.items()}
        calls = {name: max(1, min(MOST_CALLS[kind], math.ceil(LEAST[kind] / s))) for name, s in cost.items()}
        budget = CPU_BUDGET if kind == "cpu" else CUDA_BUDGET
        rounds = round_count(sum(calls[name] * cost[name] for name in runs), self.options.rounds, budget)

        def repeated(name: str) -> Callable[[], None]:
            def run() -> None:
                for _ in range(calls[name]):
                    runs[name](next(copies))

            return run

        if rounds == 1 < self.options.rounds:
            # too heavy for more; the checks have warmed everything, so the measured cost is as good as a round
            return {name: Timing((seconds,)) for name, seconds in cost.items()}
        timings = interleave({name: repeated(name) for name in runs}, rounds, clock=clock)
        return {name: Timing(tuple(s / calls[name] for s in t.seconds)) for name, t in timings.items()}

    def _fill(
        self, row: Row, timings: dict[str, Timing], dtype: torch.dtype, notes: list[str], others: dict[str, Run]
    ) -> None:
        row.timing, row.notes = timings[row.backend], list(notes)
        ceilings = self.ceilings[dtype]
        row.share = ceilings.seconds(row.moved_bytes, row.flops) / row.timing.median
        row.bound = ceilings.bound(row.moved_bytes, row.flops)
        row.baselines = {name: timings[name] for name in others}
        # the published compressor projects values too: the comparison adds that step to ours
        whole = timings.get(f"{row.backend} {TAIL}", row.timing)
        row.ratios = ratios(row.baselines, row.timing) | ratios(
            {name: t for name, t in row.baselines.items() if name == "published"}, whole
        )
        if whole is not row.timing:
            row.notes.append(f"published is compared with op and value projection, {whole.median * 1e3:.3f} ms")


def unsupported(backend: str, op: str, inputs: Inputs, dtype: torch.dtype) -> str | None:
    """Why a backend's kernels can't run an op on these inputs, or None."""
    if backend == "torch":
        return None
    return backends._kernels(backend).unsupported(op, dtype, **kernel_shape(op, inputs))


def ratios(others: dict[str, Timing], ours: Timing) -> dict[str, float]:
    """How many times as long each of the others takes."""
    return {name: timing.median / ours.median for name, timing in others.items()}


def rotation(moved: int, cache: int) -> int:
    """How many copies of the inputs exceed twice the cache together, at most 1024."""
    return max(1, min(1024, math.ceil(2 * cache / moved)))


def round_count(cost: float, asked: int, budget: float) -> int:
    """Rounds of `cost` seconds that fit the budget: at least 1, at most what was asked for."""
    return max(1, min(asked, int(budget / cost)))


def listing(options: Options) -> str:
    """What there is to run, with the least bytes (at float32) and the operations of each."""
    lines = [
        f"{s.op:22s}{s.name:30s}{s.bytes(torch.float32) / 1e6:9.1f} MB {s.flops / 1e9:8.2f} GFLOP"
        for s in select(options.ops, options.shapes)
    ]
    return "\n".join(lines)


def store(result: dict[str, Any], as_json: Path | None, markdown: Path | None, plot: Path | None) -> None:
    """Write what was asked for."""
    for path, text in ((as_json, _dumped), (markdown, report.markdown), (plot, report.svg)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(result), encoding="utf-8")


def _dumped(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1) + "\n"


def _with_values(run: Run, inputs: Inputs) -> torch.Tensor:
    return baselines.values_of(run(inputs), inputs["module"])


def _dtype(name: str) -> torch.dtype:
    names = [str(dtype).removeprefix("torch.") for dtype in BASELINE_TOLERANCE]
    if name not in names:
        raise ValueError(f"--dtype must be one of {', '.join(names)}; got {name!r}.")
    return getattr(torch, name)


@torch.no_grad()
def run(options: Options, progress: Callable[[Row, int], None] = lambda row, total: None) -> dict[str, Any]:
    """All rows; the result is what --json stores.

    Raises:
        ValueError: an op, shape, backend or device that there is not.
    """
    bench, started, rows, load = Bench(options), time.perf_counter(), [], os.getloadavg()[0]
    total = len(bench.shapes) * len(bench.dtypes) * len(bench.backends)
    for row in bench.rows():
        rows.append(row.as_json())
        progress(row, total)
    return {
        "benchmark": "kernels",
        "machine": machine(bench.device),
        # what else ran: on a busy CPU spreads are wide and single rounds say little
        "load_average_before": load,
        "cache_bytes": cache_bytes(bench.device),
        "ceilings": {str(d).removeprefix("torch."): c.as_json() for d, c in bench.ceilings.items()},
        "rows": rows,
        "notes": bench.notes,
        "seconds": time.perf_counter() - started,
    }


def red(result: dict[str, Any]) -> list[str]:
    """A sentence on each row whose numerics check failed."""
    return [
        f"{r['op']} {r['shape']} {r['dtype']} by {r['backend']}: {r['why']}"
        for r in result["rows"]
        if r["state"] == "red"
    ]


def main(argv: list[str] | None = None) -> None:
    """The benchmark without typer and rich, which a bare GPU machine may lack: `python -m llava_mini_fast.bench.kernels`."""
    parser = argparse.ArgumentParser(description="`llava-mini bench kernels` for `make gpu`; the table is Markdown.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", action="append", default=[], help="may be repeated")
    parser.add_argument("--op", action="append", default=[], help="may be repeated")
    parser.add_argument("--shape", action="append", default=[], help="may be repeated")
    for name in ("json", "markdown", "plot"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args(argv)
    try:
        result = run(Options(args.op, args.shape, args.device, args.dtype), lambda row, _: print(row.case, flush=True))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(report.markdown(result))
    store(result, args.json, args.markdown, args.plot)
    if red(result):
        raise SystemExit(f"red, so without numbers: {'; '.join(red(result))}")


if __name__ == "__main__":
    main()
