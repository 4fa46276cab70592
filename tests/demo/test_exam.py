"""The exam: balanced, held out, marked word for word."""

import json

import pytest

from llava_mini_fast.demo import exam as exams
from llava_mini_fast.demo.questions import KINDS, PICTURE_KINDS, Question
from llava_mini_fast.demo.scenes import Clip


class Told:
    """An engine that says what it was told to."""

    def __init__(self, answers):
        self.answers, self.asked = iter(answers), []

    def ask_batch(self, questions, max_new_tokens):
        self.asked += [(media.kind, question) for media, question in questions]
        return [next(self.answers) for _ in questions]


def test_an_exam_asks_as_many_of_each_kind_about_held_out_scenes():
    tasks = exams.exam(27)
    counts = {kind: sum(task.question.kind == kind for task in tasks) for kind in KINDS}
    assert counts == dict.fromkeys(KINDS, 3)
    assert all(task.subject.split == "held_out" for task in tasks)
    assert tasks == exams.exam(27) != exams.exam(27, seed=1)
    pictures = exams.exam(12, kinds=PICTURE_KINDS)
    assert len(pictures) == 12 and not any(isinstance(task.subject, Clip) for task in pictures)
    with pytest.raises(ValueError, match="at least 9; got 8"):
        exams.exam(8)
    with pytest.raises(ValueError, match="no kind taste; known: colour"):
        exams.exam(9, kinds=("taste",))


def test_engines_are_asked_in_order_and_marked():
    tasks, done = exams.exam(18), []
    right = [task.question.answer for task in tasks]
    told = Told([*right[:-1], "nonsense"])
    result = exams.examine(told, tasks, progress=done.append)
    assert told.asked == [
        ("video" if isinstance(task.subject, Clip) else "image", task.question.text) for task in tasks
    ]
    assert sum(done) == len(tasks) and result.answers[-1] == "nonsense"
    assert result.accuracy == dict.fromkeys(KINDS, 1.0) | {tasks[-1].question.kind: 0.5}
    assert result.overall == pytest.approx(17 / 18)


def test_majority_is_what_the_commonest_answer_reaches():
    (task,) = exams.exam(9)[:1]
    tasks = [exams.Task(task.subject, Question("count", "?", answer)) for answer in ("one", "two", "two", "no")]
    result = exams.marked(tasks, ["two", " two ", "Two", "no"])
    assert result.accuracy == {"count": 0.5} and result.majority == {"count": 0.5} and result.questions == {"count": 4}
    said = json.loads(result.to_json(engine="torch"))
    assert set(said) == {"engine", "accuracy", "majority", "questions", "overall"}
    assert list(exams.table(result)) == [("count", "50.0%", "50.0%", "4"), ("all", "50.0%", "", "4")]
