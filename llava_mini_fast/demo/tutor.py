"""A tutor for stage 2: asks, of every row that names a shape, what that shape is.

Without one, the way to an answer is two steps that gain nothing alone: that a name's row looks at the patches of what it names,
and that the answer's row reads there. A model that has neither guesses among the shapes to be seen, for a long time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mini_fast.demo.lessons import Note
from llava_mini_fast.demo.tower import CLASSES
from llava_mini_fast.engine import LlavaMini
from llava_mini_fast.train.model import TrainableModel


class Tutored(TrainableModel):
    """A `TrainableModel` of stage 2 whose loss has the tutor's questions in it; the tutor is no part of the engine."""

    def __init__(self, engine: LlavaMini, stage: int = 2):
        super().__init__(engine, stage)
        self.tutor = nn.Linear(engine.config.hidden_size, sum(CLASSES))
        self._rows: list[Tensor] = []

    def fused_rows(self, *arguments: Any, **options: Any) -> list[Tensor]:
        self._rows = super().fused_rows(*arguments, **options)
        return self._rows

    def forward(self, *arguments: Any, notes: Sequence[Sequence[Note]] = (), **options: Any) -> dict[str, Tensor]:
        """As `TrainableModel.forward`.

        Args:
            notes: of each example.
        """
        out = super().forward(*arguments, **options)
        ids, rows = options["input_ids"], self._rows
        # behind the placeholder, rows lie further back by all vision rows but one
        named = [own[len(own) - len(told) + at] for own, told, about in zip(rows, ids, notes) for at, _ in about]
        if named:
            classes = torch.tensor([found for about in notes for _, found in about], device=named[0].device)
            logits = self.tutor(torch.stack(named)).float().split(CLASSES, dim=-1)
            asked = sum(F.cross_entropy(one, classes[:, n]) for n, one in enumerate(logits)) / len(CLASSES)
            out["loss"] = out["loss"] + asked
            out["tutor"] = asked.detach()
        return out
