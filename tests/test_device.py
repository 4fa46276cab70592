"""Devices by name: what is here, and a sentence for what isn't."""

import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast.device import choose_device


@pytest.fixture
def cards(monkeypatch):
    """cards(n): torch believes in n CUDA devices."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_auto_takes_cuda_where_there_is_one(cards):
    cards(0)
    assert choose_device("auto") == choose_device(torch.device("cpu")) == torch.device("cpu")
    cards(2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1").index == 1 and choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("built", "words"), [(None, "is built without CUDA"), ("13.0", "no GPU or no driver")], ids=["cpu build", "no card"]
)
def test_cuda_that_is_not_here(cards, monkeypatch, built, words):
    cards(0)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ValueError, match=rf"^device is 'cuda', and torch finds no CUDA device here: .*{words}"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="no CUDA device here"):
        lmf.load("nothing is looked for before the device", device="cuda:0")


def test_other_names_are_refused(cards):
    cards(2)
    with pytest.raises(ValueError, match=r"there are 2 CUDA devices here, from cuda:0 on"):
        choose_device("cuda:2")
    for name in ("gpu", "mps", "meta", "cuda:x", ""):
        with pytest.raises(ValueError, match=rf"device must be auto, cpu, cuda .*; got '{name}'"):
            choose_device(name)
