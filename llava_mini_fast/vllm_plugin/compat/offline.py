"""What the offline engine needs of vLLM's, and where vLLM runs."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

__all__ = ["current_platform", "shut_down"]


def shut_down(llm: Any) -> None:
    """End the engine of a `vllm.LLM`, which then gives its memory back."""
    llm.llm_engine.engine_core.shutdown()
