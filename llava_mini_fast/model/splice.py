"""Put the vision rows where the placeholder stands (published: `prepare_inputs_labels_for_multimodal`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_mini_fast.config import IMAGE_TOKEN_ID


def placeholder_index(prompt_ids: list[int]) -> int | None:
    """Index of the placeholder in a prompt, or None.

    Raises:
        ValueError: the prompt holds more than one (the published code can't compute such a prompt).
    """
    count = prompt_ids.count(IMAGE_TOKEN_ID)
    if count > 1:
        raise ValueError(f"the prompt has {count} media placeholders; LLaVA-Mini takes one image or video a prompt.")
    return prompt_ids.index(IMAGE_TOKEN_ID) if count else None


def check_vocabulary(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """ValueError unless every id but the placeholder is a row of the embedding table."""
    if any(not 0 <= i < vocab_size for i in prompt_ids if i != IMAGE_TOKEN_ID):
        raise ValueError(
            f"a prompt id is outside the vocabulary: allowed are 0..{vocab_size - 1}, and {IMAGE_TOKEN_ID} once for the media."
        )


def splice(text: Tensor, vision: Tensor, index: int | None) -> Tensor:
    """text (L, H), vision (T*Q, H) -> (L - 1 + T*Q, H) with row `index` replaced; without an index the text alone."""
    if index is None:
        return text
    return torch.cat([text[:index], vision, text[index + 1 :]])
