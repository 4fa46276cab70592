"""Packed segments: text rows of many (frame, prompt) pairs, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each segment lies and which frame it looks at, on the host for checks and on the device for kernels.

    Made once a batch and used by every layer, so that kernels copy nothing and wait for nothing.
    """

    lengths: tuple[int, ...]
    frames: tuple[int, ...]
    starts: Tensor
    """(S + 1,) int32: first row of each segment, and the number of rows at the end."""
    slots: Tensor
    """(S,) int32: `frames`."""

    @classmethod
    def of(cls, lengths: Sequence[int], frames: Sequence[int], device: torch.device | str) -> Segments:
        """Segments of `lengths` rows (0 is allowed), each over the frame of the same place.

        Raises:
            ValueError: not one frame a length, or a negative number.
        """
        if len(lengths) != len(frames) or min((*lengths, *frames), default=0) < 0:
            raise ValueError(
                f"segments take one frame a length, none negative; got {list(lengths)} and {list(frames)}."
            )
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
        return cls(tuple(lengths), tuple(frames), starts, torch.tensor(frames, dtype=torch.int32).to(device))

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)
