"""The image cache's bookkeeping, on slots of a few bytes."""

import pytest
import torch

from llava_mini_fast.image_cache import CacheSizes, ImageCache

FRAME = (2 * 2 * 3 + 4) * 4  # bytes of a slot in `cache`


def cache(device=0, host=0, chunk=2):
    sizes = CacheSizes(device * FRAME, host * FRAME)
    return ImageCache((1, 2, 3, 1, 2), (1, 4), torch.float32, torch.device("cpu"), sizes, chunk)


def call(c, *names, value=None):
    """One call of the front end about frames `names`; returns which were computed. A frame's value is its name's code."""
    c.begin()
    computed = []
    for start in range(0, len(names), c.chunk):
        digests = [name.encode() for name in names[start : start + c.chunk]]
        slots, filled = c.place(digests)
        assert len(set(slots)) == len(slots)
        for digest, slot, ready in zip(digests, slots, filled):
            if not ready:
                computed.append(digest.decode())
                c.state[slot], c.vision[slot] = digest[0], digest[0]
            assert (c.state[slot] == digest[0]).all() and (c.vision[slot] == digest[0]).all()
        c.settle(digests, slots)
    return "".join(computed)


def test_the_arena_is_made_at_its_first_use():
    c = cache(device=2)
    assert not {"state", "vision"} & set(vars(c))
    with torch.inference_mode():
        assert c.allocate().shape == (4, 1, 2, 3, 1, 2) and c.vision.shape == (4, 1, 4)
    assert call(c, "a") == "a"  # outside of that mode it can be written all the same


def test_off_keeps_nothing():
    c = cache()
    assert call(c, "a", "b") == "ab" and call(c, "a") == "a"
    assert c.stats.hits == 0 and c.stats.misses == 3 and c.stats.bytes == 0


def test_least_recently_used_goes_first():
    c = cache(device=2)
    assert call(c, "a") + call(c, "b") == "ab"
    assert call(c, "a") == ""
    assert call(c, "c") == "c"  # b goes
    assert call(c, "a") == "" and call(c, "b") == "b"
    assert c.stats.evictions == 2 and c.stats.frames == 2 and c.stats.bytes == 2 * FRAME


def test_a_call_never_evicts_what_it_has_placed():
    c = cache(device=3)
    assert call(c, *"abcde") == "abcde"
    assert call(c, *"abcde") == "de"  # the first three stayed: a clip beyond the budget keeps its beginning
    assert call(c, "x") == "x"
    assert c.stats.frames == 3


def test_evicted_frames_come_back_from_host_memory():
    c = cache(device=1, host=2)
    assert call(c, "a") + call(c, "b") + call(c, "c") == "abc"
    assert call(c, "a") == "" and call(c, "b") == ""
    assert c.stats.host_hits == 2 and c.stats.host_bytes == 2 * FRAME
    assert call(c, "d") + call(c, "e") == "de"
    assert c.stats.host_evictions > 0 and c.stats.host_frames <= 2


def test_a_clip_beyond_the_device_goes_on_in_host_memory():
    c = cache(device=2, host=2)
    assert call(c, *"abcdef") == "abcdef"
    assert call(c, *"abcdef") == "ef"


def test_host_memory_alone():
    c = cache(host=1)
    assert call(c, "a") == "a" and call(c, "a") == ""


def test_clear_forgets():
    c = cache(device=2, host=2)
    call(c, "a", "b")
    call(c, "c")
    c.clear()
    assert call(c, *"abc") == "abc"


def test_many_random_calls_never_mix_frames_up():
    generator = torch.Generator().manual_seed(0)
    c = cache(device=4, host=5, chunk=3)
    for _ in range(300):
        names = dict.fromkeys("abcdefghijklmnop"[i] for i in torch.randint(16, (5,), generator=generator).tolist())
        call(c, *names)
        assert c.stats.frames <= 4 and c.stats.host_frames <= 5
        held = [*c._kept.values(), *c._free]
        assert sorted(held) == list(range(7))  # every slot is either kept or free


def test_sizes_are_checked(monkeypatch):
    with pytest.raises(ValueError, match=r"device size must be 0 \(off\) or more"):
        CacheSizes(-1)
    monkeypatch.setenv("LLAVA_MINI_CACHE_BYTES", "12")
    assert CacheSizes.from_env() == CacheSizes(12)
    monkeypatch.setenv("LLAVA_MINI_HOST_CACHE_BYTES", "lots")
    with pytest.raises(ValueError, match="LLAVA_MINI_HOST_CACHE_BYTES must be a number of bytes; got 'lots'"):
        CacheSizes.from_env()
