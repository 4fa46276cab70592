"""The command: the day itself, or one of its steps in a process of its own."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from llava_mini_fast.bench.gpuday import plan
from llava_mini_fast.bench.gpuday.plan import BUDGET, LOG, PLAN, ROWS, SUMMARY, Children, Day, Step


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    steps = "\n".join(f"  {step.name:10s} {step.seconds:4.0f} s  {step.about}" for step in PLAN)
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini_fast.bench.gpuday",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Everything worth knowing about a card in nine minutes: is it right, how fast is it, where does the time go.\n"
        f"Rows are written as they are measured ({ROWS}, JSON lines); {SUMMARY} sums them up and {LOG} has what steps said.\n\n"
        f"steps, in order of value, with what each takes on an H100 ({sum(s.seconds for s in PLAN):.0f} s in all):\n{steps}",
        epilog="Exits with 1 if a number is wrong or a step failed. A step that doesn't fit any more is skipped by name.\n\n"
        "examples:\n  python -m llava_mini_fast.bench.gpuday --budget 540 --out build/gpuday-results\n"
        "  python -m llava_mini_fast.bench.gpuday --rehearse --out /tmp/rehearsal      # on a CPU, with stand-ins",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go; made if need be")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="(default: %(default).0f)")
    parser.add_argument(
        "--only", action="append", default=[], choices=[s.name for s in PLAN], help="only this step; may be repeated"
    )
    parser.add_argument(
        "--goldens",
        type=Path,
        default=Path("tests/goldens"),
        metavar="DIR",
        help="recorded cases (default: %(default)s)",
    )
    parser.add_argument(
        "--rehearse", action="store_true",
        help="run every step here on the CPU: tiny sizes, Triton's interpreter, no meaning in the times",
    )  # fmt: skip
    parser.add_argument("--step", choices=[s.name for s in PLAN], help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def child_command(args: argparse.Namespace, step: Step, limit: float) -> list[str]:
    """The command of one step."""
    command = [sys.executable, "-m", "llava_mini_fast.bench.gpuday", "--step", step.name, "--limit", str(limit)]
    command += ["--out", str(args.out), "--goldens", str(args.goldens)]
    return [*command, "--rehearse"] if args.rehearse else command


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        plan.end_with_parent()
        from llava_mini_fast.bench.gpuday.steps import run_step

        run_step(args.step, args.out, args.limit, args.goldens, args.rehearse)
        return 0
    for name in (ROWS, LOG):
        (args.out / name).unlink(missing_ok=True)
    # a `timeout` or a scheduler ends the day like this: the summary must still be written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if args.rehearse else {})
    launch = Children(lambda step, limit: child_command(args, step, limit), args.out, environment)
    chosen = [step for step in PLAN if not args.only or step.name in args.only]

    def say(text: str) -> None:
        print(text, flush=True)

    summary = Day(chosen, args.out, args.budget, launch, say=say, rehearsal=args.rehearse).run()
    failed = [step["name"] for step in summary["steps"] if step["state"] == "failed"]
    for text in summary["red"]:
        say(f"red: {text}")
    say(f"{summary['seconds']:.0f} s; {len(summary['red'])} wrong, failed steps: {', '.join(failed) or 'none'}")
    return int(bool(summary["red"] or failed))


if __name__ == "__main__":
    sys.exit(main())
