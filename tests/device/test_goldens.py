"""The engine on the device: the published numbers with every backend and cache, the law in 16 bits, and the demo model's answers."""

from functools import cache
from pathlib import Path

import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.demo import exam, shipped
from llava_mini_fast.heatmap import attention
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.preprocess.views import normalize, views
from llava_mini_fast.reference import Reference
from llava_mini_fast.testing.cases import load_cases
from llava_mini_fast.testing.goldens import format_table, run
from llava_mini_fast.testing.numerics import assert_law

pytestmark = pytest.mark.gpu
GOLDENS = Path(__file__).parents[1] / "goldens"
backends = pytest.mark.parametrize("backend", ["auto", "torch", "triton", "cuda"], indirect=True)

TIERS = {"off": (0, 0, 64), "device": (100, 0, 64), "host": (1, 1000, 3)}
"""Frames that the device tier and the host tier of the image cache hold, and frames of a chunk."""


class Twice:
    """A model whose rows are those of a second run: from the cache, where there is one."""

    def __init__(self, model):
        self.model, self.generate_ids = model, model.generate_ids

    def embed(self, prompt_ids, media=None):
        self.model.embed(prompt_ids, media)
        return self.model.embed(prompt_ids, media)


def judge_goldens(device, backend, tiers):
    """Every golden in float32 by an engine on `device`: its results, the cache's hits on the device and in host memory."""
    stats = []

    def engine(directory, dtype):
        model = lmf.load(directory, device=device, dtype=dtype, backend=backend)
        assert model.front.backend == backend and model.front.device.type == torch.device(device).type
        kept, hosted, chunk = tiers
        frame = model.front.cache.frame_bytes
        model.front.configure(CacheSizes(kept * frame, hosted * frame), chunk)
        stats.append(model.front.cache.stats)
        return Twice(model)

    results = run(load_cases(GOLDENS), engine)
    return results, sum(s.hits for s in stats), sum(s.host_hits for s in stats)


@pytest.mark.filterwarnings("ignore:.* rows are cut at tokenizer_model_max_length")
@pytest.mark.parametrize("tier", TIERS)
@backends
def test_every_golden(backend, kernels, cuda_device, tier):
    results, hits, host_hits = judge_goldens(cuda_device, backend, TIERS[tier])
    assert len(results) == 20 and all(result.passed for result in results), format_table(results)
    assert (hits > 0, host_hits > 0) == (tier != "off", tier == "host")
    assert kernels.asked == set(kernels)  # none was left to torch


@pytest.fixture(scope="session")
def plain(checkpoint, golden):
    """plain(case, name, dtype) -> the row's numbers by the published structure in plain torch, on the CPU."""

    @cache
    def embed(case, name, dtype):
        row = golden(case)
        pixels = normalize(views(row.media, LlavaMiniConfig.from_pretrained(checkpoint(name))).pixels, dtype)
        return Reference(checkpoint(name), dtype).embed(row.prompt_ids, pixels if pixels.shape[0] > 1 else pixels[0])

    return embed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("case", "name"), [("image", "llama31"), ("video", "llama31"), ("image_c2", "llama31_c2"), ("vicuna", "vicuna")]
)
@backends
def test_low_precision_obeys_the_law(backend, kernels, cuda_device, checkpoint, golden, plain, case, name, dtype):
    row, low = golden(case), getattr(torch, dtype)
    model = lmf.load(checkpoint(name), device=cuda_device, dtype=dtype, backend=backend)
    rows = model.embed(row.prompt_ids, row.media)
    assert rows.dtype == low and rows.device.type == cuda_device
    assert_law(rows.cpu(), row.fused, plain(case, name, low), case)
    assert kernels.asked == set(kernels)


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_the_demo_model_answers_as_on_a_cpu(backend, cuda_device):
    tasks = exam.exam(3, seed=6, kinds=("colour", "count", "place"))
    here, there = (lmf.load(shipped(), device=device, backend=backend) for device in (cuda_device, "cpu"))
    assert exam.examine(here, tasks).answers == exam.examine(there, tasks).answers
    picture, question = lmf.image(Path(__file__).parents[2] / "examples/shapes.png"), "What is this?"
    assert "".join(here.ask(picture, question, 16, stream=True)) == there.ask(picture, question, 16)
    (looked, _), (expected, _) = attention(here, picture), attention(there, picture)
    torch.testing.assert_close(looked, expected, rtol=0, atol=1e-5)
