"""vLLM in child processes: an engine that crashes fails its test, with the log shown, and not the session.

One child a model runner, which starts one engine after the other (a second start takes little over a second).
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest

from llava_mini_fast.testing.cases import Case, load_cases
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
    """A published case as vLLM gets it."""

    case: Case

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def row(self) -> Any:
        return self.case.rows[0]

    @property
    def prompt(self) -> dict[str, Any]:
        return prompt(self.row.prompt_ids, self.row.media)


@pytest.fixture(scope="session")
def goldens_directory():
    return GOLDENS


@pytest.fixture(scope="session")
def goldens():
    """goldens(checkpoint name) -> its cases that vLLM runs, by name."""
    cases = [case for case in load_cases(GOLDENS) if not case.rows[0].raw_only]
    return lambda checkpoint: {case.name: Golden(case) for case in cases if case.checkpoint == checkpoint}
