"""Which kernels run: by device, by name, by LLAVA_MINI_BACKEND, by shape; and what is said where they can't."""

import logging
from types import SimpleNamespace

import pytest
import torch

from llava_mini_fast.ops import backend
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.ops.swiglu import swiglu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    for cached in (backend._default_on_cuda, backend._say_once):
        cached.cache_clear()
    yield
    for cached in (backend._default_on_cuda, backend._say_once):
        cached.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for Triton's kernels; `refuses` is why they can't run."""
    found = SimpleNamespace(OPS={"swiglu": lambda x: "triton"}, refuses=None)
    found.unsupported = lambda op, dtype, **shape: found.refuses
    monkeypatch.setitem(backend._LOADED, "triton", found)
    return found


def test_what_is_asked_for_is_checked_when_a_model_is_loaded(monkeypatch):
    assert backend.resolve("auto", CPU) == "auto" and backend.resolve("torch", CUDA) == "torch"
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, cuda, cuda-cpu; got 'magic'"):
        backend.resolve("magic", CPU)
    with pytest.raises(
        ValueError, match="backend is 'cuda', which can't run on cpu: the cuda kernels need a cuda device"
    ):
        backend.resolve("cuda", CPU)
    with pytest.raises(ValueError, match="can't run on cuda: the cuda-cpu kernels need a cpu device"):
        backend.resolve("cuda-cpu", CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="Triton kernels need a CUDA device"):
        backend.resolve("triton", CPU)


def test_the_environment_overrules(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "torch")
    assert backend.resolve("triton", CPU) == "torch"
    monkeypatch.setenv(backend.ENVIRONMENT, "magic")
    with pytest.raises(ValueError, match="LLAVA_MINI_BACKEND must be one of"):
        backend.resolve("auto", CPU)


def test_auto_is_torch_on_a_cpu_and_the_first_that_works_on_cuda(monkeypatch, caplog):
    assert backend.default_for(CPU) == "torch"
    reasons = {"triton": None, "cuda": None}
    monkeypatch.setattr(backend, "unavailable", lambda name, device: reasons[name])
    for missing, expected in ((), "triton"), (("triton",), "cuda"), (("triton", "cuda"), "torch"):
        reasons.update(dict.fromkeys(missing, "it is not there"))
        backend._default_on_cuda.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert backend.default_for(CUDA) == expected
    assert "the triton kernels are not used: it is not there" in caplog.text


def test_auto_gives_shapes_to_torch_where_the_table_says_so(kernels, monkeypatch):
    monkeypatch.setattr(backend, "unavailable", lambda name, device: None)
    kernels.OPS["causal_attention"] = "triton"
    x = SimpleNamespace(is_cuda=True, device=CUDA, dtype=torch.bfloat16)
    assert backend.pick("causal_attention", "auto", x, queries=577, keys=577) is None
    assert backend.pick("causal_attention", "auto", x, queries=1, keys=577) == "triton"
    assert backend.pick("causal_attention", "triton", x, queries=577, keys=577) == "triton"
    assert backend.torch_is_faster("compressor_attention", torch.float32, queries=512)
    assert not backend.torch_is_faster("compressor_attention", torch.bfloat16, queries=512)


def test_a_shape_that_kernels_refuse_runs_on_torch_and_is_said_once(kernels, caplog):
    x = torch.randn(3, 8)
    assert swiglu(x, backend="triton") == "triton"
    kernels.refuses = "width must be even"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(swiglu(x, backend="triton"), swiglu(x))
    said = [record.message for record in caplog.records]
    assert said == ["swiglu runs on torch instead of triton: width must be even"]


def test_segments_know_their_places():
    segments = Segments.of([3, 0, 2], [1, 0, 1], "cpu")
    assert segments.starts.tolist() == [0, 3, 3, 5] and segments.slots.tolist() == [1, 0, 1]
    assert {segments.starts.dtype, segments.slots.dtype} == {torch.int32}
    assert (segments.num_rows, segments.max_length) == (5, 3)
    assert Segments.of([], [], "cpu").max_length == 0
    for lengths, frames in (([1], []), ([-1], [0]), ([1], [-1])):
        with pytest.raises(ValueError, match="one frame a length, none negative"):
            Segments.of(lengths, frames, "cpu")
