"""What the demo model learns from: pictures and clips as stored features, and conversations about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_mini_fast.config import GRID
from llava_mini_fast.demo.questions import FACTS, Question, about_clip, about_scene
from llava_mini_fast.demo.scenes import Clip, Scene
from llava_mini_fast.demo.tower import TARGETS, most_covered, of_patches, under_patches
from llava_mini_fast.model.vision_tower import VisionTower
from llava_mini_fast.preprocess.prompt import conversation
from llava_mini_fast.preprocess.views import normalize
from llava_mini_fast.train.data import tokenized

CONVERSATIONS = 2
"""About one picture at once: its image part is shared."""
FACTS_EVERY = 40
"""One lesson in so many is about nothing to be seen."""
CHUNK = 32


Note = tuple[int, tuple[int, ...]]
"""Where in a conversation's ids a shape's name ends, and the shape's classes by `TARGETS`: 0 if there is no such shape."""


@dataclass(frozen=True)
class Lesson:
    """Conversations about the same frames."""

    frames: list[int]
    """Rows of the stored features; none for text alone."""
    conversations: list[tuple[list[int], list[int]]]
    """(ids, labels) of each."""
    notes: list[list[Note]] = field(default_factory=list)
    """Of each conversation, for a tutor; none where nobody tutors."""


class Album:
    """Distinct pictures, what the frozen tower makes of them, and which of their patches shapes cover.

    The features lie in `folder`/features.f16, (pictures, 576, D) float16, and the patches in covered.bool, (pictures, 576). They
    are made on the first use; a run that was cut off goes on with the next chunk.

    Args:
        scenes, clips: whose pictures are wanted. A picture that is shown more than once is stored once.
        progress: called with the number of pictures done at once.
    """

    def __init__(
        self,
        folder: Path,
        tower: VisionTower,
        scenes: Sequence[Scene],
        clips: Sequence[Clip],
        progress: Callable[[int], None] = lambda count: None,
    ):
        self.scenes, self.clips = list(scenes), list(clips)
        pictures = {scene.digest: scene for scene in (*self.scenes, *(s for clip in self.clips for s in clip.scenes))}
        self._rows = {digest: row for row, digest in enumerate(pictures)}
        self._features, self._covered = self._stored(folder, tower, list(pictures.values()), progress)

    def frames(self, shown: Sequence[Scene]) -> list[int]:
        """The rows of some pictures."""
        return [self._rows[scene.digest] for scene in shown]

    def features(self, rows: Sequence[int]) -> torch.Tensor:
        """(F, 1, 576, D) float32."""
        return torch.from_numpy(self._features[list(rows)].astype(np.float32))[:, None]

    def some_patches(self, rows: Sequence[int], count: int) -> torch.Tensor:
        """(F, count) int64: patches that shapes cover, and for the rest any; drawn anew at each call."""
        return most_covered(torch.from_numpy(self._covered[list(rows)]), count)

    @staticmethod
    @torch.inference_mode()
    def _stored(
        folder: Path, tower: VisionTower, pictures: list[Scene], progress: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        folder.mkdir(parents=True, exist_ok=True)
        count, places = folder / "done.json", (len(pictures), GRID * GRID)
        done = json.loads(count.read_text()) if count.is_file() else 0
        mode = "r+" if done else "w+"
        features = np.memmap(folder / "features.f16", np.float16, mode, shape=(*places, tower.width))
        covered = np.memmap(folder / "covered.bool", np.bool_, mode, shape=places)
        progress(done)
        for start in range(done, len(pictures), CHUNK):
            chunk = pictures[start : start + CHUNK]
            views = torch.stack([torch.from_numpy(np.array(scene.picture())) for scene in chunk]).permute(0, 3, 1, 2)
            features[start : start + len(chunk)] = tower(normalize(views, torch.float32)).numpy()
            covered[start : start + len(chunk)] = [(under_patches(scene)[1].mean(-1) > 0).numpy() for scene in chunk]
            features.flush()
            covered.flush()
            count.write_text(json.dumps(start + len(chunk)))
            progress(len(chunk))
        return features, covered


class Lessons(Dataset):
    """Lessons about some of an album's scenes and clips, `epochs` times over, with new questions each time.

    Args:
        turns: questions of a conversation about a picture, at most one of each kind.
        patches: how many of a picture's 576 to look at; all when None.
    """

    def __init__(
        self,
        album: Album,
        subjects: Sequence[Scene | Clip],
        tokenizer: Any,
        epochs: int = 1,
        seed: int = 0,
        turns: int = 3,
        patches: int | None = None,
    ):
        self.album, self.tokenizer, self.epochs, self.seed = album, tokenizer, epochs, seed
        self.turns, self.patches = turns, patches
        self.subjects = [*subjects, *[None] * (len(subjects) // FACTS_EVERY)]

    def __len__(self) -> int:
        return len(self.subjects) * self.epochs

    def __getitem__(self, index: int) -> Lesson:
        subject, rng = self.subjects[index % len(self.subjects)], Random(f"{self.seed}:{index}")
        if subject is None:
            return Lesson([], [told(self.tokenizer, [rng.choice(FACTS)], media=False)])
        if isinstance(subject, Clip):
            return Lesson(self.album.frames(subject.scenes), [told(self.tokenizer, [about_clip(subject, rng)])])
        asked = [about_scene(subject, rng)[: self.turns] for _ in range(CONVERSATIONS)]
        conversations = [told(self.tokenizer, questions) for questions in asked]
        notes = [noted(self.tokenizer, ids, questions) for (ids, _), questions in zip(conversations, asked)]
        return Lesson(self.album.frames([subject]), conversations, notes)

    def collate(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        """Arguments of `tutor.Tutored.forward`."""
        return batch(self.album, lessons, self.patches)


def told(tokenizer: Any, questions: Sequence[Question], media: bool = True) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation in which the questions are asked and answered in turn."""
    history = [(question.text, question.answer) for question in questions]
    messages = conversation(history[-1][0], history[:-1], media)
    return tokenized(tokenizer, [*messages, {"role": "assistant", "content": history[-1][1]}])


def noted(tokenizer: Any, ids: Sequence[int], questions: Sequence[Question]) -> list[Note]:
    """The notes of a conversation whose ids are given."""
    notes, start = [], 0
    for question in questions:
        text = tokenizer.encode(question.text, add_special_tokens=False)
        start = _find(ids, text, start)
        for name, shape in question.names:
            words = tokenizer.encode(f" {name}", add_special_tokens=False)
            classes = [0 if shape is None else values.index(getattr(shape, key)) + 1 for key, values in TARGETS.items()]
            notes.append((start + _find(text, words, 0) + len(words) - 1, tuple(classes)))
        start += len(text)
    return notes


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    """The first place from `start` on where `part` lies in `ids`."""
    return next(n for n in range(start, len(ids)) if list(ids[n : n + len(part)]) == list(part))


def batch(album: Album, lessons: Sequence[Lesson], patches: int | None = None) -> dict[str, Any]:
    """Arguments of `tutor.Tutored.forward`; a frame that several lessons show is there once. `patches` as in `Lessons`."""
    rows = sorted({row for lesson in lessons for row in lesson.frames})
    place = {row: n for n, row in enumerate(rows)}
    rows_of = [[place[row] for row in lesson.frames] for lesson in lessons]
    each = [(*told, frames) for lesson, frames in zip(lessons, rows_of) for told in lesson.conversations]
    notes = [note for lesson in lessons for note in lesson.notes or [[]] * len(lesson.conversations)]
    features = album.features(rows) if rows else None
    kept = album.some_patches(rows, patches) if rows and patches else None
    if kept is not None:
        features = of_patches(features[:, 0], kept)[:, None]
    made = {
        "input_ids": [torch.tensor(ids) for ids, _, _ in each],
        "labels": [torch.tensor(labels) for _, labels, _ in each],
        "frames": [frames for _, _, frames in each],
        "features": features,
        "kept": kept,
    }
    return made | {"notes": notes} if any(notes) else made  # what is examined has no tutor
