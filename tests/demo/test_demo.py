"""`make run`'s demonstration, start to end in a child process, and its clock."""

import os
import subprocess
import sys
import types

import pytest

from llava_mini_fast import demo
from llava_mini_fast.demo import program


def test_answers_are_right():
    command = [sys.executable, "-P", "-m", "llava_mini_fast.demo"]
    wide = os.environ | {"COLUMNS": "200"}
    result = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in result.stdout.splitlines()]
    answers = {row[1]: row[2] for row in rows if len(row) == 3}
    assert answers == {
        "How many shapes are there?": "three",
        "What colour is the triangle?": "yellow",
        "Where is the blue square?": "middle",
        "Which way does the circle move?": "right",
        "How many sides does a triangle have?": "three",
    }
    for words in (
        "coloured shapes and nothing else",
        "shapes.png",
        "moving.mp4",
        "text alone",
        "front end",
        "language model",
    ):
        assert words in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1].startswith("make run: 5 questions answered in ")


def test_missing_examples_are_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "package" / "demo" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"shapes\.png"):
        demo.examples()


def test_stopwatch_adds_up_and_hands_through():
    watch = program.Stopwatch()
    waited = []
    owner = types.SimpleNamespace(double=lambda x: 2 * x)
    watch.watch(owner, "double", "doubling", lambda: waited.append(1))
    assert [owner.double(2), owner.double(3)] == [4, 6]
    assert waited == [1, 1]
    assert set(watch.seconds) == {"doubling"}
    assert watch.seconds["doubling"] > 0
