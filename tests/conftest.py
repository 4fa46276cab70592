"""Checkpoints and models shared by the whole run: generated once, loaded once."""

from functools import cache
from pathlib import Path

import pytest

import llava_mini_fast as lmf
from llava_mini_fast.testing.cases import load_cases
from llava_mini_fast.testing.checkpoints import cached

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def checkpoint():
    """checkpoint(name, overrides=None) -> directory of a seeded checkpoint."""
    return lambda name, overrides=None: cached(name, GOLDENS, overrides)


@pytest.fixture(scope="session")
def model(checkpoint):
    """model(name, dtype="float32") -> a loaded engine, kept for the session."""
    return cache(lambda name, dtype="float32": lmf.load(checkpoint(name), dtype=dtype))


@pytest.fixture(scope="session")
def golden():
    """golden(case name) -> the only row of a case recorded from the published code."""
    rows = {case.name: case.rows[0] for case in load_cases(GOLDENS)}
    return rows.__getitem__
