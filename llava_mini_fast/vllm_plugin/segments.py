"""How a prompt becomes multimodal items: its segments, and what each is identified by. Pure functions, no vLLM.

The whole prompt is the multimodal item, because its text rows depend on the media and on all text before them. It is cut
after the vision rows and after every turn: pre-fusion is causal, so a segment depends on the media and the ids up to its
own end, and another question about the same media shares the first segment's cache entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llava_mini_fast.media import Media


@dataclass(frozen=True, eq=False)
class PromptMedia:
    """A medium together with the prompt ids (with -200) that the caller wants taken as they are."""

    media: Media
    prompt_ids: tuple[int, ...]


def check_placeholder(placeholder: int | None, has_media: bool) -> None:
    """ValueError, as a sentence for the person who asked, unless a placeholder is there exactly when media is."""
    if has_media and placeholder is None:
        raise ValueError("an image or video was given and the prompt has no <image> placeholder for it.")
    if placeholder is not None and not has_media:
        raise ValueError("the prompt has an <image> placeholder and no image or video was given for it.")


def expand(prompt_ids: Sequence[int], placeholder: int, num_vision: int, stand_in: int) -> list[int]:
    """Prompt ids with the placeholder replaced by `num_vision` times `stand_in`: one id a row of the language model."""
    return [*prompt_ids[:placeholder], *[stand_in] * num_vision, *prompt_ids[placeholder + 1 :]]


def spans(
    prompt_ids: Sequence[int], placeholder: int, num_vision: int, turn_ends: Collection[int]
) -> list[tuple[int, int]]:
    """Row ranges [start, stop) of the segments, which cover every row.

    The first holds the text before the media and the vision rows; each next one ends after an id of `turn_ends`.
    """
    shift = num_vision - 1  # rows behind the placeholder stand this much further than their ids
    cuts = [0, placeholder + num_vision]
    cuts += [i + 1 + shift for i in range(placeholder + 1, len(prompt_ids)) if prompt_ids[i] in turn_ends]
    end = len(prompt_ids) + shift
    if cuts[-1] != end:
        cuts.append(end)
    return list(pairwise(cuts))


def ids_of_segment(prompt_ids: Sequence[int], stop: int, num_vision: int) -> Sequence[int]:
    """The ids that a segment ending at row `stop` depends on: all up to its end, placeholder included."""
    return prompt_ids[: stop - num_vision + 1]


def segment_hash(model: str, kind: str, pixels: str, digests: Sequence[bytes], start: int, ids: Sequence[int]) -> str:
    """Identity of a segment's fused rows, for vLLM's processor, encoder and prefix caches.

    Args:
        model: the model's name. kind: "image" or "video". pixels: dtype and shape of the media's pixels.
        digests: one a frame, of its pixels (never of a name or uuid that a caller gives).
        start: the segment's first row. ids: from `ids_of_segment`, *before* expansion: -200 is kept, so that a prompt with
            the stand-in's own id elsewhere can't collide.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in (model.encode(), kind.encode(), pixels.encode(), b"".join(digests), np.int64(start).tobytes()):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    state.update(np.asarray(ids, dtype=np.int64).tobytes())
    return state.hexdigest()
