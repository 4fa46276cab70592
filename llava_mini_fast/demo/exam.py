"""Examination on held-out scenes: the share of right answers by kind of question, beside a majority answer's."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from random import Random
from typing import Any

import numpy as np
import torch

from llava_mini_fast.demo.data import clips, scenes
from llava_mini_fast.demo.lessons import Album, Lesson, batch, told
from llava_mini_fast.demo.questions import CLIP_KINDS, KINDS, PICTURE_KINDS, Question, about_clip, about_scene
from llava_mini_fast.demo.scenes import Clip, Scene
from llava_mini_fast.media import Media, image, video
from llava_mini_fast.protocol import Engine

MAX_TOKENS = 8
"""The longest right answer has three tokens."""
AT_ONCE = 32
"""Questions that go to an engine together; their pictures are in memory at the same time."""


@dataclass(frozen=True)
class Task:
    """A question and what it is asked about."""

    subject: Scene | Clip
    question: Question

    def media(self) -> Media:
        if isinstance(self.subject, Clip):
            return video(self.subject.frames())
        return image(self.subject.picture())


@dataclass
class Result:
    """Shares of right answers, from 0 to 1, by kind."""

    accuracy: dict[str, float] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)
    """What the commonest right answer to a kind's questions would reach if it were always given."""
    questions: dict[str, int] = field(default_factory=dict)
    overall: float = 0.0
    answers: list[str] = field(default_factory=list)
    """What was answered, task by task."""

    def to_json(self, **more: Any) -> str:
        """As JSON, with `more` keys first; without the answers."""
        kept = {key: value for key, value in asdict(self).items() if key != "answers"}
        return json.dumps(more | kept, indent=1) + "\n"


def exam(number: int, seed: int = 0, split: str = "held_out", kinds: Sequence[str] = KINDS) -> list[Task]:
    """About `number` questions, as many of each kind, the same for the same seed. Those about one picture lie together.

    Raises:
        ValueError: fewer questions than kinds, or an unknown split or kind.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"there is no kind {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}.")
    if number < len(kinds):
        raise ValueError(f"an exam needs a question of each kind, so at least {len(kinds)}; got {number}.")
    each, rng = number // len(kinds), Random(seed)
    asked: Counter[str] = Counter()
    tasks = []

    def take(subject: Scene | Clip, questions: Sequence[Question]) -> None:
        for question in questions:
            if question.kind in kinds and asked[question.kind] < each:
                asked[question.kind] += 1
                tasks.append(Task(subject, question))

    def missing(wanted: Sequence[str]) -> bool:
        return any(kind in kinds and asked[kind] < each for kind in wanted)

    drawn_scenes, drawn_clips = scenes(seed, split), clips(seed, split)
    while missing(PICTURE_KINDS):
        scene = next(drawn_scenes)
        take(scene, about_scene(scene, rng))
    while missing(CLIP_KINDS):
        clip = next(drawn_clips)
        take(clip, [about_clip(clip, rng)])
    return tasks


def examine(engine: Engine, tasks: Sequence[Task], progress: Callable[[int], None] = lambda count: None) -> Result:
    """Ask an engine every question and compare its answers, word for word.

    Args:
        progress: called with the number of questions answered at once.
    """
    answers: list[str] = []
    for start in range(0, len(tasks), AT_ONCE):
        asked = []
        for _, same in groupby(tasks[start : start + AT_ONCE], key=lambda task: id(task.subject)):
            together = list(same)
            media = together[0].media()
            asked += [(media, task.question.text) for task in together]
        answers += engine.ask_batch(asked, MAX_TOKENS)
        progress(len(asked))
    return marked(tasks, answers)


@torch.inference_mode()
def examine_features(model: Any, tokenizer: Any, album: Album, tasks: Sequence[Task]) -> Result:
    """As `examine`, of a `TrainableModel` over an album that holds the tasks' pictures.

    An answer is right where every token of it is the likeliest after the right ones before it, which is when greedy
    decoding would give it.
    """
    answers = []
    for task in tasks:
        shown = task.subject.scenes if isinstance(task.subject, Clip) else [task.subject]
        lesson = Lesson(album.frames(shown), [told(tokenizer, [task.question])])
        out = model(**batch(album, [lesson]))
        targets = out["targets"][0, 1:]
        said = out["logits"][0, :-1].argmax(-1)[targets >= 0]
        answers.append(tokenizer.decode(said, skip_special_tokens=True))
    return marked(tasks, answers)


def marked(tasks: Sequence[Task], answers: Sequence[str]) -> Result:
    """What the answers to the tasks are worth."""
    right: dict[str, list[bool]] = defaultdict(list)
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    for task, answer in zip(tasks, answers, strict=True):
        right[task.question.kind].append(answer.strip() == task.question.answer)
        wanted[task.question.kind][task.question.answer] += 1
    kinds = [kind for kind in KINDS if kind in right]
    return Result(
        {kind: float(np.mean(right[kind])) for kind in kinds},
        {kind: max(wanted[kind].values()) / wanted[kind].total() for kind in kinds},
        {kind: len(right[kind]) for kind in kinds},
        float(np.mean([one for kind in kinds for one in right[kind]])),
        list(answers),
    )


def table(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """Rows of kind, accuracy, majority and number of questions, as text."""
    for kind, share in result.accuracy.items():
        yield kind, f"{share:.1%}", f"{result.majority[kind]:.1%}", str(result.questions[kind])
    yield "all", f"{result.overall:.1%}", "", str(sum(result.questions.values()))
