"""Which dtype "auto" means, and int8 weights."""

import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast import precision

PIXELS = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
IDS = [5, 17, -200, 301, 44, 9]


def test_names():
    cpu = torch.device("cpu")
    assert precision.choose_dtype(torch.float16, cpu) == (torch.float16, "as asked")
    with pytest.raises(ValueError, match="one of auto, float32, float16, bfloat16; got 'int4'"):
        precision.choose_dtype("int4", cpu)


@pytest.mark.parametrize(
    ("amx", "avx", "dtype", "why"),
    [
        (True, True, torch.bfloat16, "AMX"),
        (False, True, torch.bfloat16, "AVX512-BF16"),
        (False, False, torch.float32, "neither AMX nor AVX512-BF16"),
    ],
)
def test_auto_on_a_cpu(monkeypatch, amx, avx, dtype, why):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    chosen, reason = precision.choose_dtype("auto", torch.device("cpu"))
    assert chosen == dtype and why in reason


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_on_cuda(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.choose_dtype("auto", torch.device("cuda"))[0] == dtype


def test_int8_is_near_and_says_how_near(model, checkpoint):
    quantized = lmf.load(checkpoint("llama31"), quantization="int8")
    exact = model("llama31").embed(IDS, lmf.image(PIXELS))
    rows = quantized.embed(IDS, lmf.image(PIXELS))
    error = (rows - exact).norm() / exact.norm()
    # int8 really is in use, and a layer's 1e-2 does not run away over the dozen products in a row of this random net
    assert 1e-4 < error < 1e-1
    assert quantized.generate_ids(IDS, lmf.image(PIXELS), 4)


def test_unknown_quantization(checkpoint):
    with pytest.raises(ValueError, match="quantization must be one of int8, or None; got 'int3'"):
        lmf.load(checkpoint("llama31"), quantization="int3")
