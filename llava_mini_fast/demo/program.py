"""The demonstration behind `make run`: a picture, a clip and plain text answered in one offline vLLM batch, with times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mini_fast.demo import examples, shipped
from llava_mini_fast.terminal import printable, quiet, sentence

MAX_TOKENS = 24
QUESTIONS = (
    ("shapes.png", "How many shapes are there?"),
    ("shapes.png", "What colour is the triangle?"),
    ("shapes.png", "Where is the blue square?"),
    ("moving.mp4", "Which way does the circle move?"),
    (None, "How many sides does a triangle have?"),
)
"""(file of examples/ or None for text alone, question)."""


@dataclass
class Stopwatch:
    """Seconds by the name of a stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, owner: Any, attribute: str, name: str, done: Callable[[], None] = lambda: None) -> None:
        """Time every call of `owner.attribute` from now on; `done` waits for work that the call only started."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                result = function(*args, **kwargs)
                done()
                return result

        setattr(owner, attribute, timed)


def main() -> int:
    """Run the demonstration; the exit status."""
    from rich.console import Console

    quiet()
    start = time.perf_counter()
    try:
        run(Console())
    except KeyboardInterrupt:
        print("make run: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"make run: failed: {sentence(error)}", file=sys.stderr)
        return 1
    print(f"make run: {len(QUESTIONS)} questions answered in {time.perf_counter() - start:.0f} s")
    return 0


def run(console: Any) -> None:
    """Answer `QUESTIONS` and print answers and times.

    Args:
        console: a rich Console.

    Raises:
        FileNotFoundError: examples/ or the demo model is not here.
        ImportError: vLLM is not installed, or doesn't import.
    """
    folder = examples()
    watch = Stopwatch()
    console.print(
        "The demo model answers: it learned coloured shapes and nothing else, and sees a picture as one vision token "
        "(docs/demo-model.md)."
    )
    with _announced(console, watch, "start vLLM"):
        from llava_mini_fast.vllm_plugin.offline import OfflineEngine

        engine = OfflineEngine(shipped(), max_new_tokens=MAX_TOKENS)
    _watch_stages(engine, watch)
    with _announced(console, watch, "answer the batch"):
        answers = engine.ask_batch([(_media(folder, name), question) for name, question in QUESTIONS], MAX_TOKENS)
    engine.close()
    console.print(_answers(answers))
    console.print(_times(watch.seconds))


def _media(folder: Path, name: str | None) -> Any:
    from llava_mini_fast.preprocess.guess import guess

    return None if name is None else guess(folder / name)


@contextmanager
def _announced(console: Any, watch: Stopwatch, name: str) -> Iterator[None]:
    """A stage that shows that it is under way, and afterwards how long it took."""
    if not console.is_terminal:
        console.print(f"{name} ...")
    with console.status(f"{name} ..."), watch.stage(name):
        yield
    console.print(f"{name}: {watch.seconds[name]:.1f} s")


def _watch_stages(engine: Any, watch: Stopwatch) -> None:
    """Time the parts of an answer that are this project's own; they run in this process."""
    import torch

    from llava_mini_fast.vllm_plugin import processor

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    watch.watch(processor, "views", "preprocess")
    engine.llm.apply_model(lambda model: watch.watch(model.front, "fuse", "front end", wait))


def _answers(answers: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("about", "question", f"answer (at most {MAX_TOKENS} tokens)", title="Answers")
    for (name, question), answer in zip(QUESTIONS, answers):
        table.add_row(name or "text alone", question, Text(" ".join(printable(answer).split())))
    return table


def _times(seconds: dict[str, float]) -> Any:
    """The stages in the order in which they come; what of the batch is not ours is the language model's."""
    from rich.table import Table

    ours = ("preprocess", "front end")
    rest = seconds["answer the batch"] - sum(seconds[name] for name in ours)
    table = Table("stage", "seconds", title="Times")
    table.columns[1].justify = "right"
    for label, value in (
        ("start vLLM", seconds["start vLLM"]),
        ("preprocess: read, decode, resize", seconds["preprocess"]),
        ("front end: vision tower, compressor, pre-fusion", seconds["front end"]),
        ("language model, scheduling", rest),
    ):
        table.add_row(label, f"{value:.2f}")
    return table
