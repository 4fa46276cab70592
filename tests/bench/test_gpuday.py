"""The GPU day: what it leaves wherever it ends, and a rehearsal of every step."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from llava_mini_fast.bench.gpuday import __main__ as command
from llava_mini_fast.bench.gpuday import plan
from llava_mini_fast.bench.gpuday.plan import BUDGET, PLAN, ROWS, SUMMARY, Children, Day, RowFile, Step

WRITES = """
import sys, time
from llava_mini_fast.bench.gpuday.plan import RowFile, end_with_parent
from pathlib import Path
end_with_parent()
rows = RowFile(Path(sys.argv[1]) / "gpuday.jsonl", sys.argv[2])
for n in range(int(sys.argv[3])):
    rows.add(case=str(n), state="ok")
    time.sleep(0.02)
"""


class Killed(BaseException):
    pass


class Clock:
    """Seconds that pass when a step says so."""

    now = 1000.0

    def __call__(self):
        return self.now


class StandIn:
    """Each step writes three rows, and takes its estimate (or another time); one may be killed after its first row."""

    def __init__(self, out, clock, killed="", seconds=None):
        self.out, self.clock, self.killed, self.seconds = out, clock, killed, seconds or {}

    def __call__(self, step, limit, tick):
        rows = RowFile(self.out / ROWS, step.name, self.clock)
        for n in range(3):
            self.clock.now += self.seconds.get(step.name, step.seconds) / 3
            rows.add(case=f"case {n}", state="ok", value=n)
            tick()
            if step.name == self.killed:
                raise Killed
        return "done", ""


def stored(out):
    return plan.read_rows(out / ROWS), json.loads((out / SUMMARY).read_text())


def states(summary):
    return {step["name"]: step["state"] for step in summary["steps"]}


def test_the_plan_fits_with_room_to_start():
    assert sum(step.seconds for step in PLAN) + 20 <= BUDGET == 540
    assert len({step.name for step in PLAN}) == len(PLAN)
    shown = subprocess.run(
        [sys.executable, "-m", "llava_mini_fast.bench.gpuday", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"{step.seconds:.0f} s  {step.about}" in shown for step in PLAN)
    from llava_mini_fast.bench.gpuday.steps import KERNELS, STEPS
    from llava_mini_fast.bench.shapes import SHAPES

    assert list(STEPS) == [step.name for step in PLAN]
    known = {(shape.op, shape.name) for shape in SHAPES}
    assert {(op, name) for op, names in KERNELS.items() for name in names} <= known
    assert {op for op, _ in known} == set(KERNELS)


@pytest.mark.parametrize("killed", [step.name for step in PLAN])
def test_killed_anywhere_it_leaves_what_was_measured(tmp_path, killed):
    clock = Clock()
    day = Day(PLAN, tmp_path, BUDGET, StandIn(tmp_path, clock, killed), clock, say=lambda text: None)
    with pytest.raises(Killed):
        day.run()
    rows, summary = stored(tmp_path)
    names = [step.name for step in PLAN]
    before = names[: names.index(killed)]
    assert [(row["step"], row["value"]) for row in rows] == [*((n, v) for n in before for v in range(3)), (killed, 0)]
    told = states(summary)
    assert [told[name] for name in before] == ["done"] * len(before)
    assert told[killed] == "interrupted"
    assert all(told[name] == "not reached" for name in names[len(before) + 1 :])
    assert [row["value"] for step in summary["steps"] for row in step["rows"]] == [row["value"] for row in rows]


def test_what_does_not_fit_is_skipped_by_name(tmp_path):
    clock, said = Clock(), []
    slow = StandIn(tmp_path, clock, seconds={"goldens": 400.0})
    summary = Day(PLAN, tmp_path, BUDGET, slow, clock, say=said.append).run()
    told = states(summary)
    assert told["card"] == told["goldens"] == told["ops"] == "done"
    assert told["frontend"] == "skipped" and any(line.startswith("frontend   skipped: 40 s are left") for line in said)
    assert told["kernels"] == "done"  # what is small enough still runs
    assert summary == stored(tmp_path)[1]


def test_a_step_gets_no_more_than_its_deadline_and_what_is_left(tmp_path):
    clock, limits = Clock(), {}

    def launch(step, limit, tick):
        limits[step.name] = limit
        clock.now += limit
        return "cut off", "at its deadline"

    Day(PLAN, tmp_path, 100.0, launch, clock, say=lambda text: None).run()
    assert limits == {"card": 32.0, "goldens": 68.0}


def test_wrong_rows_and_failed_steps_are_told(tmp_path, capsys, monkeypatch):
    def launch(step, limit, tick):
        RowFile(tmp_path / ROWS, step.name).add(case="swiglu", state="red", why="error 3 is above the law's bound 1")
        return ("failed", "it ended with 1: boom") if step.name == "ops" else ("done", "")

    monkeypatch.setattr(command, "Children", lambda *_: launch)
    assert command.main(["--out", str(tmp_path), "--only", "card", "--only", "ops"]) == 1
    said = capsys.readouterr().out
    assert "red: card: swiglu: error 3 is above the law's bound 1" in said and "failed steps: ops" in said
    assert states(stored(tmp_path)[1]) == {"card": "done", "ops": "failed"}


def test_steps_are_processes(tmp_path):
    """One that ends, one that fails, and one that hangs with a process of its own, which both end at the deadline."""
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    codes = {"writes": WRITES, "fails": "raise ValueError('no such kernel')", "hangs": hang}
    children = Children(
        lambda step, limit: [sys.executable, "-c", codes[step.name], str(tmp_path), step.name, "3"], tmp_path
    )
    ended = {name: children(Step(name, "", 1), 2.0, lambda: None) for name in codes}
    assert ended["writes"] == ("done", "")
    assert ended["fails"] == ("failed", "it ended with 1: ValueError: no such kernel")
    assert ended["hangs"] == ("cut off", "at its deadline of 2 s")
    assert [row["case"] for row in plan.read_rows(tmp_path / ROWS)] == ["0", "1", "2"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_a_signal_leaves_valid_files(tmp_path, number):
    """The real thing: a day of one long step in processes of their own, killed in the middle."""
    code = f"""
import signal, sys
from pathlib import Path
from llava_mini_fast.bench.gpuday.plan import Children, Day, Step
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
out = Path({str(tmp_path)!r})
command = lambda step, limit: [sys.executable, "-c", {WRITES!r}, str(out), step.name, "1000"]
Day([Step("long", "", 60)], out, 100.0, Children(command, out)).run()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(plan.read_rows(tmp_path / ROWS)) < 20 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.send_signal(number)
    parent.wait(30)
    rows, summary = stored(tmp_path)
    assert len(rows) >= 20 and states(summary) == {"long": "interrupted"}
    assert len(summary["steps"][0]["rows"]) > (0 if number == signal.SIGKILL else 19)
    time.sleep(0.3)
    written = (tmp_path / ROWS).stat().st_size
    time.sleep(0.3)
    assert (tmp_path / ROWS).stat().st_size == written  # the step has ended with the day


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_so(tmp_path):
    run = [sys.executable, "-m", "llava_mini_fast.bench.gpuday", "--only", "card", "--out", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch finds no CUDA device here; --rehearse runs the day on a CPU" in done.stdout


@pytest.mark.slow
def test_rehearsal(request, tmp_path):
    """Every step to its end, with stand-ins for the device."""
    goldens = request.path.parents[1] / "goldens"
    run = [sys.executable, "-m", "llava_mini_fast.bench.gpuday", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run([*run, "--goldens", str(goldens)], capture_output=True, text=True, check=False)
    rows, summary = stored(tmp_path)
    assert done.returncode == 0, done.stdout + (tmp_path / plan.LOG).read_text()[-5000:]
    assert set(states(summary).values()) == {"done"} and summary["rehearsal"]
    seen = {step.name: [row for row in rows if row["step"] == step.name] for step in PLAN}
    assert any(row["case"] == "ceilings float32" for row in seen["card"][1:])
    assert {row["state"] for row in seen["goldens"] + seen["ops"]} == {"ok"}
    from llava_mini_fast.bench.shapes import OPS

    proven = {tuple(row["case"].split()[:: len(row["case"].split()) - 1]) for row in seen["ops"]}
    assert {(op, backend) for op in OPS for backend in ("torch", "triton")} <= proven
    fronts = {row["case"] for row in seen["frontend"]}
    assert {"llama cold image", "vicuna HD image", "llama second question", "llama first token: cold image"} <= fronts
    assert all(row["state"] == "ok" and row["median_s"] > 0 for row in seen["kernels"][:-1])
    assert json.loads((tmp_path / "tuned.json").read_text()) is not None and seen["tuning"]
    assert any(row["case"] == "second question: in all" and row["launches"] > 0 for row in seen["trace"])
    assert {row["case"] for row in seen["sanitizer"]} == {"memcheck triton", "racecheck triton"}
