"""What the commands share about the terminal: libraries that keep quiet, and text that is safe to print."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any


def quiet() -> None:
    """Lower the noise of torch, transformers and vLLM; call it before the first of them is imported.

    Variables that are set already win, so `VLLM_LOGGING_LEVEL=INFO` brings vLLM's log back.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # what they log while they are imported, vLLM before it reads the variable
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # these two speak to the authors of the libraries, not to who runs the command
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A replacement for `warnings.showwarning`: the sentence alone, without the line of code it comes from."""
    print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text with control characters (an answer may hold any, and they steer the terminal) shown as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def sentence(error: BaseException) -> str:
    """An exception's message on one line; its type where it has none."""
    return printable(" ".join(str(error).split())) or type(error).__name__
