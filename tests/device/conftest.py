"""What users get on a CUDA device. Where there is none, or a backend's kernels are not there, these tests fail: they never skip."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from llava_mini_fast.ops.backend import ENVIRONMENT, MODULES, unavailable

sys.path.insert(0, str(Path(__file__).parents[1] / "triton"))  # for `cases` and `checks`


@pytest.fixture(scope="session")
def cuda_device():
    """Its name for torch."""
    if not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device, and torch finds none here.", pytrace=False)
    return "cuda"


@pytest.fixture
def backend(request, cuda_device, monkeypatch):
    """The parameter's backend, which can run here; parametrize with indirect=True."""
    for variable in (ENVIRONMENT, "LLAVA_MINI_CACHE_BYTES", "LLAVA_MINI_HOST_CACHE_BYTES"):
        monkeypatch.delenv(variable, raising=False)
    reason = unavailable(request.param, torch.device(cuda_device))
    if reason:
        pytest.fail(f"the backend {request.param} can't run here: {reason}.", pytrace=False)
    return request.param


@pytest.fixture
def kernels(backend, monkeypatch):
    """The backend's ops by name, {} of torch and auto; `asked` names those that were looked up from now on."""
    made = Counted(import_module(MODULES[backend]).OPS if backend in MODULES else {})
    if backend in MODULES:
        monkeypatch.setattr(import_module(MODULES[backend]), "OPS", made)
    return made


class Counted(dict):
    """Ops that remember which of them were asked for."""

    def __init__(self, ops):
        super().__init__(ops)
        self.asked = set()

    def __getitem__(self, op):
        self.asked.add(op)
        return super().__getitem__(op)
