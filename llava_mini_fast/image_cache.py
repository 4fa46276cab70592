"""The image cache: what pre-fusion leaves behind for a frame, kept by content, on the device and then in host memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

GIB = 1 << 30


@dataclass(frozen=True)
class CacheSizes:
    """Bytes of the two tiers; 0 switches a tier off. A frame takes 9 MiB with Llama-3.1-8B and 36 with Vicuna-7B, in HD
    46 and 184 (bfloat16)."""

    device: int = GIB
    host: int = 4 * GIB

    def __post_init__(self):
        for name, size in asdict(self).items():
            if size < 0:
                raise ValueError(f"the image cache's {name} size must be 0 (off) or more bytes; got {size}.")

    @classmethod
    def from_env(cls) -> CacheSizes:
        """LLAVA_MINI_CACHE_BYTES and LLAVA_MINI_HOST_CACHE_BYTES, where set. ValueError names one that is no number."""
        sizes = {}
        for tier, variable in (("device", "LLAVA_MINI_CACHE_BYTES"), ("host", "LLAVA_MINI_HOST_CACHE_BYTES")):
            if variable in os.environ:
                try:
                    sizes[tier] = int(os.environ[variable])
                except ValueError:
                    raise ValueError(f"{variable} must be a number of bytes; got {os.environ[variable]!r}.") from None
        return cls(**sizes)


@dataclass
class CacheStats:
    """Counters since the start; a lookup is one frame of one call."""

    hits: int = 0
    host_hits: int = 0
    misses: int = 0
    evictions: int = 0
    """Frames pushed out of the device tier."""
    host_evictions: int = 0
    frames: int = 0
    """Frames on the device now."""
    bytes: int = 0
    host_frames: int = 0
    host_bytes: int = 0


class ImageCache:
    """Least recently used frames, as slots of one arena that pre-fusion reads and writes in place.

    `state` (slots, layers, 2, rows, kv_heads, d) holds K and V of the image part, `vision` (slots, Q, H) the compressed
    rows' outputs. Beyond the slots that are kept there are `chunk` more, so that the frames at work always have a place,
    with the cache off too. The arena is made at its first use: training and heat maps need none. Keys are digests of preprocessed pixels. Decisions depend on the order of calls alone, so the
    ranks of a tensor-parallel group agree without talking.

    Args:
        slot: (layers, 2, rows, kv_heads, d). vision: (Q, H).
        chunk: most frames that one `place` asks for.
    """

    def __init__(
        self,
        slot: tuple[int, ...],
        vision: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        sizes: CacheSizes,
        chunk: int,
    ):
        self.sizes, self.chunk, self.stats = sizes, chunk, CacheStats()
        self.frame_bytes = (torch.Size(slot).numel() + torch.Size(vision).numel()) * dtype.itemsize
        self.capacity = sizes.device // self.frame_bytes
        self._slot, self._row, self._dtype, self._device = slot, vision, dtype, device
        self._pin = device.type == "cuda"
        self.clear()

    @cached_property
    def state(self) -> Tensor:
        return self._slots_of(self._slot)

    @cached_property
    def vision(self) -> Tensor:
        return self._slots_of(self._row)

    @torch.inference_mode(False)  # or later calls outside of that mode could not write
    def _slots_of(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty((self.capacity + self.chunk, *shape), dtype=self._dtype, device=self._device)

    def allocate(self) -> Tensor:
        """Take the arena's memory now, not at the first frame: for those who plan memory. Returns `state`."""
        _ = self.vision
        return self.state

    def clear(self) -> None:
        """Forget every frame (the weights changed); the counters go on."""
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._host: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._free = list(range(self.capacity + self.chunk))
        self._fresh: set[bytes] = set()
        self._update_sizes()

    def begin(self) -> None:
        """Start a call: frames placed before `begin` may be evicted again, those placed after it not by this call."""
        self._fresh.clear()

    def place(self, digests: Sequence[bytes]) -> tuple[list[int], list[bool]]:
        """A slot for each of at most `chunk` different frames, and whether it is filled already.

        The caller fills the others, uses them all, and calls `settle` with the same digests and slots.
        """
        slots, filled = [], []
        for digest in digests:
            slot = self._kept.get(digest)
            if slot is not None:
                self._kept.move_to_end(digest)
                self.stats.hits += 1
                ready = True
            else:
                slot = self._free.pop()
                ready = self._from_host(digest, slot)
                self.stats.host_hits += ready
                self.stats.misses += not ready
            slots.append(slot)
            filled.append(ready)
        return slots, filled

    def settle(self, digests: Sequence[bytes], slots: Sequence[int]) -> None:
        """Keep the placed frames as far as the sizes allow; a call never evicts what it has just placed."""
        self._fresh.update(digests)
        for digest, slot in zip(digests, slots):
            if digest in self._kept:
                continue
            if len(self._kept) >= self.capacity and not self._evict():
                self._to_host(digest, slot)
                self._free.append(slot)
            else:
                self._kept[digest] = slot
        self._update_sizes()

    def _evict(self) -> bool:
        victim = next((digest for digest in self._kept if digest not in self._fresh), None)
        if victim is None:
            return False
        slot = self._kept.pop(victim)
        self._to_host(victim, slot)
        self._free.append(slot)
        self.stats.evictions += 1
        return True

    def _from_host(self, digest: bytes, slot: int) -> bool:
        entry = self._host.pop(digest, None)
        if entry is None:
            return False
        self.state[slot].copy_(entry[0], non_blocking=self._pin)
        self.vision[slot].copy_(entry[1], non_blocking=self._pin)
        return True

    def _to_host(self, digest: bytes, slot: int) -> None:
        while (len(self._host) + 1) * self.frame_bytes > self.sizes.host:
            victim = next((held for held in self._host if held not in self._fresh), None)
            if victim is None:
                return
            del self._host[victim]
            self.stats.host_evictions += 1
        entry = []
        for source in (self.state[slot], self.vision[slot]):
            copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=self._pin)
            # one stream does all copies and all kernels, so a slot is never overwritten before it is read
            entry.append(copy.copy_(source, non_blocking=self._pin))
        self._host[digest] = (entry[0], entry[1])

    def _update_sizes(self) -> None:
        self.stats.frames, self.stats.host_frames = len(self._kept), len(self._host)
        self.stats.bytes = self.stats.frames * self.frame_bytes
        self.stats.host_bytes = self.stats.host_frames * self.frame_bytes
