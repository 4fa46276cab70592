"""vLLM in child processes: an engine that crashes fails its test, with the log shown, and not the session.

One child a model runner, which starts one engine after the other (a second start takes little over a second).
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest

from llava_mini_fast.testing.cases import FAILS, UNREADABLE, Case, Row, load_cases
from llava_mini_fast.testing.checkpoints import cached
from llava_mini_fast.testing.goldens import judge_tokens
from llava_mini_fast.vllm_plugin import prompt

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "goldens"
PATIENCE = 300
"""Seconds after which a child that doesn't answer is taken for hung."""
OPTIONS = {
    "dtype": "float32", "max_model_len": 512, "block_size": 32, "enforce_eager": True, "disable_log_stats": False,
    "seed": 0,
}  # fmt: skip


class Refused(ValueError):
    """The child raised a ValueError or one of vLLM's errors for requests at fault."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    cached: int
    """Prompt tokens whose keys and values were in the prefix cache."""
    prompt: list[int]
    """Prompt ids as the engine had them."""


class Vllm:
    """A child process that runs vLLM, started when it is first needed, and anew after a crash."""

    def __init__(self, log: Path, environment: dict[str, str]):
        self._log, self._environment = log, environment
        self._child: subprocess.Popen | None = None
        self._running: Any = None

    def start(self, checkpoint: Path, **options: Any) -> None:
        """An engine with `OPTIONS` and `options` on top; one that runs already is reset instead, its caches emptied."""
        wanted = (str(checkpoint), OPTIONS | options)
        if wanted == self._running:
            return self.call("reset")
        self._running = None
        self.call("start", *wanted)
        self._running = wanted

    def generate(self, prompts: Sequence[Any], max_tokens: int | Sequence[int] = 16, **params: Any) -> list[Answer]:
        """Answers in one batch, greedy unless `params` say otherwise; `choice` lists the only texts allowed."""
        return self._answers("generate", prompts, max_tokens, params)

    def chat(self, messages: Sequence[Any], max_tokens: int = 16, **options: Any) -> list[Answer]:
        """Greedy answers to conversations, in one batch; `options` are those of `LLM.chat`."""
        return self._answers("chat", messages, max_tokens, {}, options)

    def _answers(self, door: str, prompts: Sequence[Any], max_tokens: Any, params: dict, *more: Any) -> list[Answer]:
        lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        sampling = [{"temperature": 0.0, "max_tokens": length} | params for length in lengths]
        return [Answer(**found) for found in self.call(door, list(prompts), sampling, *more)]

    def call(self, operation: str, *arguments: Any) -> Any:
        """An operation of `worker.Worker`. Refused (a ValueError) or RuntimeError where it raised."""
        if self._child is None:
            self._open()
        try:
            self._connection.send_bytes(pickle.dumps((operation, arguments)))
            if not self._connection.poll(PATIENCE):
                self._fail(f"no answer to {operation!r} in {PATIENCE} s")
            good, *reply = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._fail(f"vLLM's process ended during {operation!r}")
        if good:
            return reply[0]
        names, message, trace = reply
        if {"ValueError", "VLLMClientError"} & set(names):
            error = Refused(message)
            error.add_note(trace)
            raise error
        raise RuntimeError(f"vLLM raised {names[0]} during {operation!r}:\n{trace}")

    def close(self) -> None:
        if self._child is None:
            return
        self._connection.close()  # its end tells the child to stop
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = self._running = None

    def _open(self) -> None:
        self._connection, theirs = Pipe()
        with self._log.open("ab") as log, theirs:
            self._child = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(theirs.fileno())],
                env=_environment(self._environment),
                cwd=self._log.parent,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _fail(self, what: str) -> None:
        self._child.kill()
        self._child.wait()
        self._child = self._running = None
        self._connection.close()
        tail = self._log.read_text(errors="replace")[-6000:]
        pytest.fail(f"{what}; the end of its output:\n{tail}", pytrace=False)


def _environment(more: dict[str, str]) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("VLLM_", "TRITON_"))}
    fixed = {
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # threads bound to cores, spinning, take ten times as long where something else runs on the machine
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(min(2, len(os.sched_getaffinity(0)))),
        "OMP_WAIT_POLICY": "passive",
    }
    return inherited | fixed | more


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    """runner(name, **environment): what a fixture yields from to have a child of its own."""

    def one(name: str, **environment: str):
        vllm = Vllm(tmp_path_factory.mktemp(name) / "vllm.log", environment)
        yield vllm
        vllm.close()

    return one


@pytest.fixture(scope="session")
def v1(runner):
    """vLLM with the model runner V1, all in one process."""
    yield from runner("v1", VLLM_USE_V2_MODEL_RUNNER="0")


@pytest.fixture(scope="session")
def v2(runner):
    """vLLM with the model runner V2, its kernels in Triton's interpreter."""
    shim = {"PYTHONPATH": str(HERE / "v2shim"), "TRITON_INTERPRET": "1"}
    yield from runner("v2", VLLM_USE_V2_MODEL_RUNNER="1", **shim)


@dataclass(frozen=True, eq=False)
class Golden:
    """A row of a published case as vLLM gets it."""

    case: Case
    row: Row

    @property
    def name(self) -> str:
        return self.case.name if len(self.case.rows) == 1 else f"{self.case.name}[{self.row.index}]"

    @property
    def prompt(self) -> dict[str, Any]:
        return prompt(self.row.prompt_ids, self.row.media)

    def start(self, vllm: Vllm, **options: Any) -> None:
        """An engine on the case's checkpoint, in its dtype."""
        directory = self.case.checkpoint_directory()
        if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            options = {"tokenizer": str(cached("llama31"))} | options  # goldens are ids, and vLLM starts with any
        vllm.start(directory, **({"dtype": self.case.dtype} | options))

    def matches(self, tokens: list[int], steps: int | None = None) -> bool:
        """Whether tokens are the published ones, or the first `steps` of them (in low precision, up to a near tie)."""
        low = self.row.low and replace(self.row.low, tokens=self.row.low.tokens[:steps])
        equal, near_tie, _ = judge_tokens(replace(self.row, tokens=self.row.tokens[:steps], low=low), tokens)
        return equal or near_tie


def _goldens(directory: Path) -> list[Golden]:
    """Every row that vLLM can be asked: not what the published code can't compute, and not what only raw ids can say."""
    rows = [Golden(case, row) for case in load_cases(directory) for row in case.rows]
    return [golden for golden in rows if golden.row.kind not in (FAILS, UNREADABLE) and not golden.row.raw_only]


def _contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (directory / "cases").iterdir()}


@cache
def groups() -> dict[str, list[Golden]]:
    """Goldens by the engine that runs them: of tests/goldens, and of the directories that LLAVA_MINI_GOLDENS names."""
    found: dict[str, list[Golden]] = {}
    others = map(Path, os.environ.get("LLAVA_MINI_GOLDENS", "").split())
    for directory in [GOLDENS, *(other for other in others if _contents(other) != _contents(GOLDENS))]:
        prefix = "" if directory == GOLDENS else f"{directory.name}/"
        for golden in _goldens(directory):
            case = golden.case
            more = [f"{key}={value}" for key, value in sorted(case.overrides.items())]
            dtype = [] if case.dtype == "float32" else [case.dtype]
            found.setdefault(prefix + ",".join([case.checkpoint, *more, *dtype]), []).append(golden)
    return found


def pytest_generate_tests(metafunc):
    """Tests that take `cases` run once a group; groups from other directories are for `make check`."""
    if "cases" in metafunc.fixturenames:
        marks = {name: [pytest.mark.slow] if "/" in name else [] for name in groups()}
        names = [pytest.param(name, marks=mark) for name, mark in marks.items()]
        metafunc.parametrize("cases", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def cases(request):
    """All goldens of one checkpoint. All tests of a checkpoint come together, which spares starts."""
    return groups()[request.param]


@pytest.fixture(scope="session")
def goldens_directory():
    return GOLDENS


@pytest.fixture(scope="session")
def goldens():
    """goldens(checkpoint name) -> its cases that vLLM runs, by name."""
    found = _goldens(GOLDENS)
    return lambda checkpoint: {one.case.name: one for one in found if one.case.checkpoint == checkpoint}
