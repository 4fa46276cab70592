"""The image cache's counters, as Prometheus reads them."""

import pytest
import torch

import llava_mini_fast as lmf

REGISTRY = pytest.importorskip("prometheus_client", reason="the metrics are vLLM's").REGISTRY

from llava_mini_fast.vllm_plugin import metrics  # noqa: E402


def value(name):
    return REGISTRY.get_sample_value(f"llava_mini_cache_{name}")


def test_counters_follow_the_cache(checkpoint):
    model = lmf.load(checkpoint("llama31"))
    publish = metrics.export(model.front)
    before = [value(name) for name in ("misses_total", "hits_total", "evictions_total")]
    picture = lmf.image(torch.zeros(1, 3, 336, 336))
    for _ in range(3):
        model.embed([5, -200, 7], picture)
    publish()
    publish()  # counts nothing twice
    assert [value(name) for name in ("misses_total", "hits_total", "evictions_total")] == [
        before[0] + 1, before[1] + 2, before[2],
    ]  # fmt: skip
    assert value("frames") == 1 and value("bytes") == model.front.cache.frame_bytes

    metrics.export(lmf.load(checkpoint("llama31")).front)  # a new model of the process takes the gauges over
    assert value("frames") == 0 and value("misses_total") == before[0] + 1


def test_the_worker_exports_them(v1, goldens):
    golden = goldens("llama31")["image"]
    v1.start(golden.case.checkpoint_directory())
    before = v1.call("sample", "llava_mini_cache_misses_total")
    v1.generate([golden.prompt], 2)
    assert v1.call("sample", "llava_mini_cache_misses_total") == before + 1
