"""The image cache's counters as Prometheus metrics of the worker's process."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llava_mini_fast.fusion import FusionFrontEnd

_COUNTERS = {
    "hits": "Frames found in the image cache's device tier.",
    "host_hits": "Frames found in the image cache's host tier.",
    "misses": "Frames that the vision tower had to run for.",
    "evictions": "Frames pushed out of the device tier.",
    "host_evictions": "Frames pushed out of the host tier.",
}
_GAUGES = {
    "frames": "Frames in the device tier.",
    "bytes": "Bytes that they take.",
    "host_frames": "Frames in the host tier.",
    "host_bytes": "Bytes that they take.",
}


class CacheCollector(Collector):
    """Reads the counters when it is asked; a model that is gone reports nothing."""

    def __init__(self, front: FusionFrontEnd):
        self._front = weakref.ref(front)

    def collect(self) -> Iterator[Metric]:
        front = self._front()
        if front is None:
            return
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(f"llava_mini_cache_{name}", help_text, getattr(front.cache.stats, name))
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(f"llava_mini_cache_{name}", help_text, getattr(front.cache.stats, name))


_exported: CacheCollector | None = None


def export(front: FusionFrontEnd) -> None:
    """Register the front end's cache, in place of an earlier model's of this process."""
    global _exported
    if _exported is not None:
        REGISTRY.unregister(_exported)
    _exported = CacheCollector(front)
    REGISTRY.register(_exported)
