"""The goldens runner: every case of a directory through an engine, and a table of how close it came.

An engine is anything with `generate_ids(prompt_ids, media, max_new_tokens) -> list[int]` and, where it can show them,
`embed(prompt_ids, media) -> (rows, H)` fused rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.media import Media
from llava_mini_fast.reference import Reference
from llava_mini_fast.testing.cases import ALONE, DTYPE, FAILS, PUBLISHED, UNREADABLE, Case, Row, load_cases
from llava_mini_fast.testing.numerics import law_bound

__all__ = [
    "ALONE", "DTYPE", "FAILS", "PUBLISHED", "UNREADABLE", "Case", "ReferenceEngine", "Result", "Row",
    "format_table", "judge_tokens", "load_cases", "run", "summary",
]  # fmt: skip

TOLERANCE = 1e-4
"""Of fused rows in float32."""
STEPS = 16
"""Tokens of a row whose truth the reference decides, as many as the published rows have."""
_BEYOND_STOP = 4
"""Tokens asked for beyond a golden that ends with a stop id: an engine that doesn't stop there shows it."""


@dataclass(frozen=True)
class Result:
    """How one row went."""

    case: str
    row: int
    kind: str
    max_error: float | None = None
    """Of the fused rows; None: not compared."""
    tolerance: float | None = None
    tokens_equal: bool | None = None
    margin: float | None = None
    """The smallest gap between best and second logit over the golden's steps: how safely tokens can be equal."""
    passed: bool | None = None
    """None: listed without a verdict."""
    note: str = ""


class ReferenceEngine:
    """`Reference` as an engine: takes media, preprocesses them by the package's one door."""

    def __init__(self, directory: str | Path, dtype: str = "float32"):
        self.reference = Reference(directory, torch.float64 if dtype == "float64" else torch.float32)

    def pixels(self, media: Media | None) -> Tensor | None:
        """Normalised float32 (T, V, 3, 336, 336)."""
        from llava_mini_fast.preprocess.views import normalize, views

        if media is None:
            return None
        return normalize(views(media, self.reference.config).pixels, torch.float32)

    def embed(self, prompt_ids: list[int], media: Media | None = None) -> Tensor:
        return self.reference.embed(prompt_ids, self.pixels(media))

    def generate_ids(self, prompt_ids: list[int], media: Media | None = None, max_new_tokens: int = STEPS) -> list[int]:
        return self.reference.generate(prompt_ids, self.pixels(media), max_new_tokens)


def run(
    cases: Iterable[Case],
    engine_factory: Callable[[Path, str], Any],
    progress: Callable[[Result], None] | None = None,
    skip: Callable[[Case, Row], str | None] | None = None,
) -> list[Result]:
    """Judge every row of every case.

    Args:
        cases: of `load_cases`.
        engine_factory: (checkpoint directory, "float32" | "bfloat16" | "float16") -> engine; called once for each
            checkpoint, config and dtype. One engine is let go before the next is made.
        progress: called with every result as it comes.
        skip: gives the reason for which this engine doesn't take a row, which is then listed; None to run it.

    Returns:
        One result a row, and one for each case that couldn't be read, in the order of `cases`.
    """
    cases = list(cases)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        key = repr((case.directory, case.checkpoint, sorted(case.overrides.items()), case.dtype))
        groups.setdefault(key, []).append(case)
    results: dict[str, list[Result]] = {}
    for group in groups.values():
        judge = _Judge(group[0], engine_factory)
        for case in group:
            results[case.name] = []
            for result in judge.case(case, skip):
                results[case.name].append(result)
                if progress is not None:
                    progress(result)
        judge.close()
    return [result for case in cases for result in results[case.name]]


class _Judge:
    """One checkpoint's engine, made when the first row needs it, and what its rows are compared with."""

    def __init__(self, case: Case, engine_factory: Callable[[Path, str], Any]):
        self.model, self.engine_factory = case, engine_factory
        self.engine = self.reference = self.directory = None
        self.broken = ""

    def close(self) -> None:
        close = getattr(self.engine, "close", None)
        if close is not None:
            close()
        self.engine = self.reference = None

    def case(self, case: Case, skip: Callable[[Case, Row], str | None] | None):
        if case.problem:
            yield Result(case.name, 0, UNREADABLE, passed=False, note=case.problem)
        for row in case.rows:
            result = Result(case.name, row.index, row.kind, margin=min(row.margins) if row.margins else None)
            reason = row.reason if row.kind == UNREADABLE else skip(case, row) if skip else None
            if reason:
                yield replace(result, note=reason)
                continue
            self._start()
            if self.broken:
                yield replace(result, passed=False, note=self.broken)
                continue
            try:
                yield (self._refused if row.kind == FAILS else self._compared)(row, result)
            except Exception as error:  # whatever an engine does, the other rows still get their verdicts
                yield replace(result, passed=False, note=_raised(error))

    def _start(self) -> None:
        if self.engine is not None or self.broken:
            return
        try:
            self.directory = self.model.checkpoint_directory()
            self.stop_ids = LlavaMiniConfig.from_pretrained(self.directory).eos_token_ids
            self.engine = self.engine_factory(self.directory, self.model.dtype)
        except Exception as error:
            self.broken = f"no engine: {_raised(error)}"

    def _refused(self, row: Row, result: Result) -> Result:
        """Every way in must raise a ValueError that says something."""
        calls = [lambda: self.engine.generate_ids(row.prompt_ids, row.media, 1)]
        if hasattr(self.engine, "embed"):
            calls.append(lambda: self.engine.embed(row.prompt_ids, row.media))
        for call in calls:
            said = ""
            try:
                call()
            except ValueError as error:
                said = str(error).strip()
            if not said:
                return replace(result, passed=False, note="two placeholders must be refused with a ValueError")
        return replace(result, passed=True, note=f"{row.reason}; refused: {said}")

    def _compared(self, row: Row, result: Result) -> Result:
        row = self._completed(row)
        notes, right = [row.reason] if row.reason else [], []
        if hasattr(self.engine, "embed"):
            fused = torch.as_tensor(self.engine.embed(row.prompt_ids, row.media)).detach().cpu().double()
            if fused.shape != row.fused.shape:
                return replace(
                    result, passed=False, note=f"{tuple(fused.shape)} fused rows instead of {tuple(row.fused.shape)}"
                )
            error = (fused - row.fused).abs().max().item()
            tolerance = TOLERANCE if row.low is None else law_bound(row.fused, row.low.fused)
            result = replace(result, max_error=error, tolerance=tolerance)
            right.append(error <= tolerance)
        # A golden that ends early ended at a stop id.
        more = _BEYOND_STOP if row.tokens[-1] in self.stop_ids else 0
        tokens = list(self.engine.generate_ids(row.prompt_ids, row.media, len(row.tokens) + more))
        equal, near_tie, note = judge_tokens(row, tokens)
        right.append(equal or near_tie)
        notes += [note] if note else []
        margin = min(row.margins) if row.margins else None
        return replace(result, tokens_equal=equal, margin=margin, passed=all(right), note="; ".join(notes))

    def _completed(self, row: Row) -> Row:
        """The row with what the goldens don't say computed by the reference."""
        if row.fused is None or row.tokens is None:
            self.reference = self.reference or ReferenceEngine(self.directory)
            if row.fused is None:
                row = replace(row, fused=self.reference.embed(row.prompt_ids, row.media))
            if row.tokens is None:
                row = replace(row, tokens=self.reference.generate_ids(row.prompt_ids, row.media, STEPS))
        return row


def judge_tokens(row: Row, tokens: list[int]) -> tuple[bool, bool, str]:
    """Whether tokens equal the row's, else whether they part at a near tie that the law allows, and a note on where."""
    if tokens == row.tokens or (row.low is not None and tokens == row.low.tokens):
        return True, False, ""
    step = next((n for n, pair in enumerate(zip(tokens, row.tokens)) if pair[0] != pair[1]), None)
    if step is None:
        return False, False, f"{len(tokens)} tokens instead of {len(row.tokens)}"
    margin = row.margins[step] if row.margins else float("nan")
    note = f"tokens part at step {step}, margin {margin:.2g}"
    if row.low is None or not margin <= _near_tie(row):
        return False, False, note
    return False, True, f"{note}; a near tie by the law ({_near_tie(row):.2g})"


def _near_tie(row: Row) -> float:
    """The widest float32 margin at which a run within the law may choose another token.

    By the law each logit may be off by twice the published run's error, and a choice turns when the best is too low
    and another too high by that much: four times the error. The error is known for the last prompt row only and taken
    for the later steps too. Behind the first other token the two answers have different pasts and are not compared.
    """
    return 4 * row.low.logits_error


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def summary(results: list[Result]) -> str:
    """One line: how many rows passed, failed, and were listed without a verdict."""
    passed, failed, listed = (sum(result.passed is verdict for result in results) for verdict in (True, False, None))
    text = f"{passed} of {passed + failed} rows right"
    text += f", {failed} wrong" if failed else ""
    return text + (f", {listed} listed without a verdict." if listed else ".")


def format_table(results: list[Result]) -> str:
    """The results as text, a line a row, and the summary last."""
    verdicts = {True: "ok", False: "FAIL", None: "listed"}
    tokens = {True: "equal", False: "differ", None: "-"}
    lines = [("case", "row", "kind", "max error", "allowed", "tokens", "margin", "verdict", "note")]
    for r in results:
        numbers = ("-" if x is None else f"{x:.1e}" for x in (r.max_error, r.tolerance))
        margin = "-" if r.margin is None else f"{r.margin:.2g}"
        lines.append((r.case, str(r.row), r.kind, *numbers, tokens[r.tokens_equal], margin, verdicts[r.passed], r.note))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    text = ("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip() for line in lines)
    return "\n".join([*text, summary(results)])
