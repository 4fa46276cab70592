"""The engine on the CUDA kernels built for the CPU: published numbers, and the reference's where the published case is larger
than the emulation bears."""

import pytest
import torch
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast import reference as spec
from llava_mini_fast.demo import exam, shipped
from llava_mini_fast.ops import cuda_cpu
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.testing.cases import load_cases
from llava_mini_fast.testing.goldens import ReferenceEngine


@pytest.fixture(scope="module")
def emulated(checkpoint, cuda_cpu_library):
    """emulated(name) -> the engine on the emulated kernels."""
    return lambda name: lmf.load(checkpoint(name), dtype="float32", backend="cuda-cpu")


@pytest.fixture
def counted(monkeypatch):
    """How often each op has run, counted where `pick` finds it."""
    calls = {}

    def counting(name, op):
        def run(*args):
            calls[name] = calls.get(name, 0) + 1
            return op(*args)

        return run

    monkeypatch.setattr(cuda_cpu, "OPS", {name: counting(name, op) for name, op in cuda_cpu.OPS.items()})
    return calls


def test_published_image(request, emulated, counted):
    (row,) = next(case for case in load_cases(request.config.rootpath / "tests/goldens") if case.name == "image").rows
    fused = emulated("llama31").embed(row.prompt_ids, row.media)
    torch.testing.assert_close(fused, row.fused, rtol=0, atol=1e-4)
    assert set(counted) == set(cuda_cpu.OPS)


def test_a_video_of_two_frames(request, checkpoint, emulated, counted):
    frames = [Image.open(request.config.rootpath / f"tests/goldens/media/clip_{i}.png") for i in (0, 1)]
    prompt = [1008, 40, -200, 60, 33, 33]
    fused = emulated("llama31").embed(prompt, lmf.video(frames))
    expected = ReferenceEngine(checkpoint("llama31"), "float32").embed(prompt, lmf.video(frames))
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4)
    assert set(counted) == set(cuda_cpu.OPS)


def test_the_demo_model_answers_alike(cuda_cpu_library):
    tasks = exam.exam(3, seed=6, kinds=("colour", "count", "place"))
    emulated, plain = (lmf.load(shipped(), backend=backend) for backend in ("cuda-cpu", "torch"))
    assert exam.examine(emulated, tasks).answers == exam.examine(plain, tasks).answers


def test_hd_on_a_small_grid(checkpoint, emulated):
    front, weights = emulated("llama31_hd").front, spec.read_weights(checkpoint("llama31_hd"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 144, front.compressor.width, generator=generator)
    expected = spec.compressor(features[0], spec.part(weights, "model.compressor."))
    assert (front.compressor(features)[0] - expected).abs().max() < 2e-5

    config, queries = front.config, expected.shape[0]
    hidden = front.prefusion_layers[0].input_layernorm.shape[0]
    patches, compressed, text = (torch.randn(n, hidden, generator=generator) for n in (144, queries, 7))
    layers = [spec.part(weights, f"model.prefusion_layers.{i}.") for i in range(config.prefusion_layer_num)]
    vision, fused = spec.prefusion(patches, compressed, text, torch.arange(1, 8), layers, config)
    count, two, _, *heads = front.prefusion_layers.slot_shape()
    state = torch.full((1, count, two, 144 + queries, *heads), float("nan"))
    ours = front.prefusion_layers.image_part(patches[None], compressed[None], state, [0])[0]
    assert (ours - vision).abs().max() < 1e-4
    result = front.prefusion_layers.text_part(text, Segments.of([7], [0], "cpu"), state)
    assert (result - fused).abs().max() < 1e-4
