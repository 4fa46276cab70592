"""`llava-mini verify`: a directory of goldens through one of the package's engines."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llava_mini_fast.device import choose_device
from llava_mini_fast.testing.checkpoints import cached
from llava_mini_fast.testing.goldens import Case, Result, Row, load_cases, run, summary

ENGINES = ("torch", "vllm")
STEPS = 64
"""More new tokens than any golden has: room for them in vLLM's context."""


def verify(
    directory: str | Path,
    engine: str = "torch",
    dtype: str | None = None,
    progress: Callable[[Result, int], None] | None = None,
    device: str = "cpu",
) -> list[Result]:
    """Judge every row of every case.

    Args:
        directory: of goldens, in either format.
        engine: "torch" compares fused rows and tokens, "vllm" tokens, one engine a checkpoint in this process.
        dtype: run only the cases of this dtype; the others are listed. None: every case in its own.
        progress: called with every result as it comes and the number of results in all.
        device: of the torch engine, as in `llava_mini_fast.load`.

    Returns:
        One result a row, in the order of the cases' names.

    Raises:
        FileNotFoundError: the directory has no cases.
        ValueError: an unknown engine, or a device that is not here.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}.")
    where = choose_device(device)
    cases = load_cases(directory)
    total = sum(len(case.rows) + bool(case.problem) for case in cases)

    def skip(case: Case, row: Row) -> str | None:
        if dtype is not None and case.dtype != dtype:
            return f"not run: a {case.dtype} case"
        if engine == "vllm" and row.raw_only:
            return f"not run: {row.raw_only}, which vLLM refuses"
        return None

    with warnings.catch_warnings():
        # goldens with cut rows are there to be cut
        warnings.filterwarnings("ignore", message=".* rows are cut at tokenizer_model_max_length")
        return run(
            cases,
            partial(_load_torch, where) if engine == "torch" else _load_vllm,
            None if progress is None else lambda result: progress(result, total),
            skip,
        )


def passed(results: list[Result]) -> bool:
    """Whether something was run and nothing was wrong."""
    return any(r.passed for r in results) and not any(r.passed is False for r in results)


def to_json(results: list[Result], **about: Any) -> str:
    """The results as a JSON object: `about`, the verdict and one entry a row."""
    rows = [asdict(result) for result in results]
    return json.dumps({**about, "passed": passed(results), "summary": summary(results), "results": rows}, indent=2)


def _load_torch(device: Any, directory: Path, dtype: str) -> Any:
    import llava_mini_fast as lmf

    return lmf.load(directory, device, dtype)


def _load_vllm(directory: Path, dtype: str) -> Any:
    from llava_mini_fast.vllm_plugin.offline import OfflineEngine

    # goldens are ids and some of their checkpoints have no tokenizer, without which vLLM does not start: any model's will do
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    options = {} if has_tokenizer else {"tokenizer": str(cached("llama31"))}
    return OfflineEngine(directory, dtype, max_new_tokens=STEPS, **options)
