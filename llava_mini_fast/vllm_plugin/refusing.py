"""The architecture that vLLM is given where this package can't work with it: it says so when it is asked for."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


def refusing(reason: str) -> type[nn.Module]:
    """A class that vLLM takes for a language model, and that raises ValueError(reason) in the place of being built."""

    class LlavaMiniForConditionalGeneration(nn.Module):
        is_text_generation_model: ClassVar[bool] = True

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            raise ValueError(reason)

        def embed_input_ids(self, input_ids: Any) -> Any:
            raise ValueError(reason)

        def forward(self, input_ids: Any, positions: Any) -> Any:
            raise ValueError(reason)

        def compute_logits(self, hidden_states: Any) -> Any:
            raise ValueError(reason)

    return LlavaMiniForConditionalGeneration
