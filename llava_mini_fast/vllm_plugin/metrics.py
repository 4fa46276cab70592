"""The image cache's counters as Prometheus metrics, also where the server reads them from another process's files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from prometheus_client import Counter, Gauge

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


@cache
def _metrics() -> tuple[dict[str, Counter], dict[str, Gauge]]:
    """One set a process: Prometheus refuses a name twice, and what was counted stays counted when a model goes."""
    counters = {name: Counter(f"llava_mini_cache_{name}", text) for name, text in _COUNTERS.items()}
    gauges = {
        name: Gauge(f"llava_mini_cache_{name}", text, multiprocess_mode="livesum") for name, text in _GAUGES.items()
    }
    return counters, gauges


def export(front: FusionFrontEnd) -> Callable[[], None]:
    """Announce the front end's cache; the function returned brings the metrics up to date and is called after each fuse."""
    counters, gauges = _metrics()
    seen = dict.fromkeys(_COUNTERS, 0)

    def publish() -> None:
        stats = front.cache.stats
        for name, counter in counters.items():
            now = getattr(stats, name)
            counter.inc(now - seen[name])
            seen[name] = now
        for name, gauge in gauges.items():
            gauge.set(getattr(stats, name))

    publish()
    return publish
