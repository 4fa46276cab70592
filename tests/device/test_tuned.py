"""What tuning has written: every row of the table that this card reads gives right numbers at the shapes that read it."""

from functools import partial

import pytest
import torch

from llava_mini_fast.bench.baselines import call
from llava_mini_fast.bench.judge import Judge
from llava_mini_fast.bench.shapes import SHAPES, copied
from llava_mini_fast.bench.tune import Asked

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_tuned_settings_obey_the_law(backend, cuda_device, monkeypatch, dtype):
    from llava_mini_fast.triton_kernels import launch

    assert all(any(name in key.split() for name in DTYPES) for key in launch.TABLE), "a row of the table names no dtype"
    if any(dtype in key.split() for key in launch.TABLE):
        said = [
            said for shape in SHAPES for said in red(shape, getattr(torch, dtype), cuda_device, launch, monkeypatch)
        ]
        assert not said, "\n".join(said)


@torch.no_grad()
def red(shape, dtype, device, launch, monkeypatch):
    """What is wrong at a shape, a sentence a row of the table that it reads."""
    inputs, run = shape.make(dtype, device), partial(call, shape.op, backend="triton")
    asked = Asked(launch.TABLE)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "TABLE", asked)
        run(copied(inputs, torch.device(device)))
    rows = [key for key in dict.fromkeys(asked.keys_asked) if key in launch.TABLE]
    why = Judge(shape.op, inputs, dtype).red(run) if rows else None
    return [f"{key}, {shape.name}: {why}" for key in rows] if why else []
