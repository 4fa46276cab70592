"""The public interface as a type checker sees it: both engines are `Engine`, and `ask` says whether it streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llava_mini_fast as lmf

ROOT = Path(__file__).parents[1]
CLIENT = """
from collections.abc import Iterator

import llava_mini_fast as lmf
from llava_mini_fast.vllm_plugin.offline import OfflineEngine


def both(path: str) -> list[lmf.Engine]:
    return [lmf.load(path), OfflineEngine(path)]


def answers(engine: lmf.Engine, model: lmf.LlavaMini, ask_for_a_stream: bool) -> None:
    picture: lmf.Media = lmf.image("a.png")
    whole: str = engine.ask(picture, "What is this?", 8, temperature=0.5)
    pieces: Iterator[str] = model.ask(picture, "What is this?", stream=True, progress=True)
    either: str | Iterator[str] = model.ask(None, "Hello?", 8, ask_for_a_stream)
    many: list[str] = engine.ask_batch([(picture, "What?"), (None, "Hello?")])
    ids: list[int] = engine.generate_ids([1, -200], picture)
    sizes, limits, error = lmf.CacheSizes(0, 0), lmf.Limits(max_frames=8), lmf.MediaError("no picture")


def wrong(engine: lmf.Engine) -> None:
    number: int = engine.ask(None, "Hello?")  # error
    text: str = engine.ask(None, "Hello?", stream=True)  # error
    engine.ask(None, "Hello?", temprature=0.5)  # error
    engine.generate_ids("words")  # error
"""


def test_what_the_package_offers_is_there():
    assert {name for name in lmf.__all__ if not hasattr(lmf, name)} == set()
    assert (ROOT / "llava_mini_fast" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lmf.lode


@pytest.mark.slow
def test_a_client_is_checked(tmp_path):
    """Every line marked "error" is one, and no other."""
    pytest.importorskip("mypy")
    (tmp_path / "client.py").write_text(CLIENT)
    options = [
        "--strict",
        "--follow-imports=silent",
        "--ignore-missing-imports",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(tmp_path / "client.py")],
        env=os.environ | {"MYPYPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    meant = {number for number, line in enumerate(CLIENT.splitlines(), 1) if line.endswith("# error")}
    assert said == meant, done.stdout + done.stderr
