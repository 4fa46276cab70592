"""How the server ends, and how it holds under load."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_mini_fast.testing.serving import MODEL, about, clip, picture

pytestmark = pytest.mark.slow
SECONDS = 120
CLIENTS = 32
MARGIN = 1e-3
"""Between the first and the second log probability: below it, the order of additions may choose another token."""


def ended(server, seconds):
    server.process.wait(timeout=seconds)
    return [line for line in server.text().splitlines() if line.strip()][-1]


def test_a_dead_engine_ends_the_server(start):
    server = start()
    engine = next(pid for pid in server.descendants() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(engine, signal.SIGKILL)
    last = ended(server, 60)
    assert server.process.returncode == 1
    assert last == "llava-mini serve: error: the engine's process died; start the server again."


def test_sigterm_lets_a_stream_end(start):
    server = start()
    stream = server.client().chat.completions.create(
        model=MODEL, messages=[about(picture(1), "What?")], max_tokens=200, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = iter(stream)
    next(chunks)
    server.process.send_signal(signal.SIGTERM)
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finish[-1] == "length"
    ended(server, 60)
    assert server.process.returncode == 0


def test_two_minutes_of_32_clients(server):
    """No error, and every answer is the one that the request gets alone."""
    pool = [
        [about(picture(seed), question)]
        for seed in range(6)
        for question in ("What is this?", "Where?", "Why is it so?")
    ]
    pool += [[about(clip(seconds=n + 2, seed=n), "What happens?")] for n in range(4)]
    pool += [[about(None, text)] for text in ("Hello there.", "What is a mural?", "Name a colour.")]
    alone = {}
    for n, messages in enumerate(pool):
        answer = server.client().chat.completions.create(
            model=MODEL, messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
        )
        tops = [entry.top_logprobs for entry in answer.choices[0].logprobs.content]
        if min(top[0].logprob - top[1].logprob for top in tops) > MARGIN:
            alone[n] = answer.choices[0].message.content
    assert len(alone) >= len(pool) // 2
    chosen, end, lock, wrong, counted = list(alone), time.monotonic() + SECONDS, threading.Lock(), [], [0]

    def client(number):
        turn = number
        while time.monotonic() < end:
            n = chosen[turn % len(chosen)]
            turn += 7
            try:
                answer = server.ask(pool[n], 8)
            except Exception as error:
                answer = error
            with lock:
                counted[0] += 1
                if answer != alone[n]:
                    wrong.append((n, answer, alone[n]))

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(client, range(CLIENTS)))
    assert not wrong and counted[0] > CLIENTS
