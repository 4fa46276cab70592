"""vLLM's server as a function: its flags, and the engine that it meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

__all__ = ["FlexibleArgumentParser", "make_arg_parser", "on_shutdown", "run_server", "validate_parsed_serve_args"]


def on_shutdown(engine: Any, call: Callable[[bool], None]) -> None:
    """Call `call(the engine was dead already)` once, before `engine`, a server's engine client, is shut down."""
    stop = engine.shutdown

    def shutdown(*arguments: Any, **options: Any) -> Any:
        call(engine.engine_core.resources.engine_dead)
        engine.shutdown = stop
        return stop(*arguments, **options)

    engine.shutdown = shutdown
