"""The plan of a GPU day, and the one who keeps it: steps in order of value, each a process with a deadline.

A step that hangs, crashes or poisons the CUDA context ends alone. Rows are written as they are measured, so a day that is cut
off anywhere leaves all that it has seen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS, SUMMARY, LOG = "gpuday.jsonl", "gpuday.json", "gpuday.log"
GRACE = 1.6
"""A step's deadline, in estimates."""
LEAST = 0.5
"""The part of a step's estimate that must be left for it to start."""
POLL = 0.2
"""Seconds between looks at a running step."""


@dataclass(frozen=True)
class Step:
    """One step of the plan; `seconds` is what it should take on an H100."""

    name: str
    about: str
    seconds: float


PLAN = (
    Step("card", "the card, its clocks, copies and matrix products", 20),
    Step("goldens", "every golden on the device: torch, Triton, CUDA; the image cache; bfloat16 and float16", 100),
    Step("ops", "every op, dtype and backend by the numerics law, at all shapes", 80),
    Step("frontend", "the front end against the published structure; the first token of an 8-B model", 110),
    Step("kernels", "kernels in bfloat16 beside the published structure and SDPA", 45),
    Step("tuning", "settings of the Triton kernels for the rows of the table that matter", 55),
    Step("trace", "a profile of 32 frames and of a second question, kernel by kernel", 30),
    Step("sanitizer", "compute-sanitizer over a small case of each kernel", 80),
)
BUDGET = 540.0
"""Seconds: a command on the device that this was written for ends at 600."""


class RowFile:
    """Rows as JSON lines, each written whole in one call, so that a reader or a kill never sees half of one."""

    def __init__(self, path: Path, step: str, clock: Callable[[], float] = time.monotonic):
        self.step, self.clock, self.start = step, clock, clock()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, **fields: Any) -> None:
        """Write one row. What JSON has no word for is written as text."""
        row = {"step": self.step, "at_s": round(self.clock() - self.start, 2)} | fields
        os.write(self._file, (json.dumps(row, default=str) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; the file may not be there yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


Outcome = tuple[str, str]
"""("done" | "failed" | "cut off", why)."""


class Day:
    """Runs a plan within a budget, and keeps the summary up to date.

    Args:
        launch: runs a step for at most some seconds, calling `tick` meanwhile, and says how it ended.
        about: what the summary says besides.
    """

    def __init__(
        self,
        plan: Sequence[Step],
        out: Path,
        budget: float,
        launch: Callable[[Step, float, Callable[[], None]], Outcome],
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = print,
        **about: Any,
    ):
        self.plan, self.out, self.budget, self.launch, self.clock, self.say = plan, out, budget, launch, clock, say
        self.about, self.start = about, clock()
        self.steps: dict[str, dict[str, Any]] = {
            step.name: {"about": step.about, "estimate_s": step.seconds, "state": "not reached", "why": ""}
            for step in plan
        }
        self._written = -1

    def left(self) -> float:
        return self.budget - (self.clock() - self.start)

    def run(self) -> dict[str, Any]:
        """Every step that fits; the summary, which is on disk too. Whatever ends the day early, the summary is written."""
        total = sum(step.seconds for step in self.plan)
        self.say(f"{len(self.plan)} steps, about {total:.0f} s of {self.budget:.0f} s; rows in {self.out / ROWS}")
        self.write()
        try:
            for step in self.plan:
                self._step(step)
        finally:
            self.write(force=True)
        return self.summary()

    def _step(self, step: Step) -> None:
        entry, left = self.steps[step.name], self.left()
        if left < LEAST * step.seconds:
            entry |= {"state": "skipped", "why": f"{left:.0f} s are left, it takes about {step.seconds:.0f}"}
            self.say(f"{step.name:10s} skipped: {entry['why']}")
            return
        limit, began = min(GRACE * step.seconds, left), self.clock()
        self.say(f"{step.name:10s} about {step.seconds:3.0f} s, at most {limit:3.0f}: {step.about}")
        entry |= {"state": "interrupted", "limit_s": limit}
        try:
            entry["state"], entry["why"] = self.launch(step, limit, self.write)
        finally:
            entry["seconds"] = round(self.clock() - began, 1)
            self.write(force=True)
        self.say(f"{'':10s} {entry['state']} after {entry['seconds']:.0f} s {entry['why']}".rstrip())

    def summary(self) -> dict[str, Any]:
        """What is known so far."""
        rows = read_rows(self.out / ROWS)
        machine = next((row["machine"] for row in rows if "machine" in row), {})
        steps = [
            {"name": name} | entry | {"rows": [_without_step(row) for row in rows if row["step"] == name]}
            for name, entry in self.steps.items()
        ]
        return {
            "benchmark": "gpuday", **self.about, "machine": machine, "budget_s": self.budget,
            "seconds": round(self.clock() - self.start, 1), "red": reds(rows), "steps": steps,
        }  # fmt: skip

    def write(self, force: bool = False) -> None:
        """The summary to disk, where there are new rows: whole, under another name first."""
        rows = self.out / ROWS
        size = rows.stat().st_size if rows.is_file() else 0
        if size == self._written and not force:
            return
        self._written = size
        path = self.out / SUMMARY
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")
        draft.replace(path)


def _without_step(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def reds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on each row that is wrong."""
    return [f"{row['step']}: {row['case']}: {row['why']}" for row in rows if row.get("state") == "red"]


class Children:
    """Runs each step as a process of its own; what it prints goes to the log.

    Args:
        command: a step and its limit -> the command to run.
    """

    def __init__(
        self, command: Callable[[Step, float], list[str]], out: Path, environment: dict[str, str] | None = None
    ):
        self.command, self.out, self.environment = command, out, environment

    def __call__(self, step: Step, limit: float, tick: Callable[[], None]) -> Outcome:
        with (self.out / LOG).open("ab") as log:
            log.write(f"== {step.name}\n".encode())
            log.flush()
            begin = log.tell()
            with _process(self.command(step, limit), log, self.environment) as process:
                deadline = time.monotonic() + limit
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        return "cut off", f"at its deadline of {limit:.0f} s"
                    time.sleep(POLL)
                    tick()
        if process.returncode:
            return "failed", f"it ended with {process.returncode}: {self._last_line(begin)}"
        return "done", ""

    def _last_line(self, begin: int) -> str:
        text = (self.out / LOG).read_bytes()[begin:].decode(errors="replace")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


@contextmanager
def _process(command: list[str], log: Any, environment: dict[str, str] | None) -> Iterator[subprocess.Popen]:
    """A process and all that it starts, which end with the block: asked first, then killed."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        with suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(process.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """A step whose parent is killed ends too (Linux): it would hold the device."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        raise SystemExit("the day ended before this step began")
