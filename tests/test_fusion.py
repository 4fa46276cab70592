"""The front end as a batch engine: how requests and frames are grouped never changes what comes out."""

import dataclasses

import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast.checkpoint import front_end_weights
from llava_mini_fast.fusion import FusionFrontEnd, frames_that_fit
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.model import packed
from llava_mini_fast.testing.numerics import law_bound

TEXT = [5, 17, -200, 301, 44, 0, 9]


def frames(count, seed=0):
    return torch.randn(count, 1, 3, 336, 336, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def front(model):
    front = model("llama31").front
    front.configure()
    yield front
    front.configure()


def close(a, b):
    return a.shape == b.shape and (a - b).abs().max().item() < 1e-4


def test_a_batch_gives_what_each_request_gives_alone(front):
    clip, other = lmf.video(frames(3)), lmf.image(frames(1, seed=7)[0])
    requests = [(TEXT, clip), ([1, 2, 3], None), ([-200], other), (TEXT + [8] * 40, other), ([4, 5], clip)]
    together = front.fuse(requests)
    for request, rows in zip(requests, together):
        assert close(rows, front.fuse([request])[0])


OFF, TINY = CacheSizes(0, 0), CacheSizes(1_200_000, 0)  # a frame of this checkpoint takes 1.18 MB: TINY keeps one


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("sizes", [OFF, TINY, CacheSizes()], ids=["off", "tiny", "default"])
def test_neither_chunks_nor_the_cache_change_results(front, sizes, chunk):
    requests = [(TEXT, lmf.video(frames(5))), (TEXT[:4], lmf.image(frames(1, seed=3)[0]))]
    expected = front.fuse(requests)
    front.configure(sizes, chunk)
    for _ in range(2):  # cold, then warm
        assert all(close(a, b) for a, b in zip(front.fuse(requests), expected))


def count_views(front, monkeypatch):
    seen = []
    forward = front.vision_tower.forward
    monkeypatch.setattr(
        front.vision_tower, "forward", lambda pixels: (seen.append(pixels.shape[0]), forward(pixels))[1]
    )
    return seen


def test_equal_frames_are_computed_once(front, monkeypatch):
    seen = count_views(front, monkeypatch)
    clip = frames(2)
    twice = torch.cat([clip, clip[:1]])
    a, b, c = front.fuse([(TEXT, lmf.video(twice)), (TEXT[:4], lmf.image(clip[0])), (TEXT, lmf.image(clip[0]))])
    assert sum(seen) == 2
    assert a.shape == (len(TEXT) - 1 + 3, 256)
    assert torch.equal(a[2], a[4])  # vision rows of the equal frames
    text = torch.stack([front.fuse([(TEXT, lmf.image(f))])[0] for f in twice])
    keep = [0, 1, 3, 4, 6]
    assert close(a[[0, 1, 5, 6, 8]], text[:, keep].mean(0))
    assert close(b, c[:4])


def test_a_second_question_runs_neither_tower_nor_image_part(front, monkeypatch):
    seen = count_views(front, monkeypatch)
    clip, picture = lmf.video(frames(3)), lmf.image(frames(1, seed=9)[0])
    front.fuse([(TEXT, clip), (TEXT, picture)])
    assert sum(seen) == 4
    front.fuse([([7, -200, 8], clip)])
    front.fuse([([7, 8, 9, -200], picture), ([5, -200], clip)])
    assert sum(seen) == 4
    assert front.cache.stats.misses == 4 and front.cache.stats.hits == 7


@pytest.fixture
def plain(model, checkpoint):
    """A front end that is not packed, and a function that loads its weights."""
    config = model("llama31").config
    front = FusionFrontEnd(config, model("llama31").llm.get_input_embeddings()).requires_grad_(False)
    return front, lambda: front.load_weights(front_end_weights(checkpoint("llama31"), config))


def test_new_weights_empty_the_cache(plain, monkeypatch):
    front, load = plain
    seen = count_views(front, monkeypatch)
    for _ in range(2):
        load()
        front.fuse([(TEXT, lmf.image(frames(1)[0]))])
    assert sum(seen) == 2


def test_packed_weights_give_the_same_and_are_not_loaded_over(plain, monkeypatch):
    monkeypatch.setattr(packed, "_intel", lambda: False)
    front, load = plain
    load()
    assert not front.packed
    (expected,) = front.fuse([(TEXT, lmf.video(frames(2)))])
    assert front.pack() and front.pack()
    front.configure()
    assert close(front.fuse([(TEXT, lmf.video(frames(2)))])[0], expected)
    with pytest.raises(RuntimeError, match="packed for this CPU and can't be loaded again"):
        load()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_float32_is_not_packed_where_mkl_is_faster(plain, monkeypatch):
    monkeypatch.setattr(packed, "_intel", lambda: True)
    front, load = plain
    load()
    assert not front.pack() and not front.packed
    assert not packed.can_pack(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(packed, "_intel", lambda: False)
    assert packed.can_pack(torch.device("cpu"), torch.float32) == packed.can_pack(torch.device("cpu"), torch.bfloat16)


def test_progress_counts_frames(front):
    done = []
    front.configure(OFF, frames_per_chunk=2)
    front.fuse([(TEXT, lmf.video(frames(5)))], progress=done.append)
    assert done == [2, 2, 1]
    with pytest.raises(ValueError, match="frames_per_chunk must be at least 1"):
        front.configure(frames_per_chunk=0)


def test_the_default_dtype_changes_nothing(front):
    """Sums over frames are float32 whatever torch makes by default, as in an engine that is built under bfloat16."""
    request = ([5, -200, 9, 17], lmf.video(frames(2)))
    (expected,) = front.fuse([request])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        (rows,) = front.fuse([request])
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(rows, expected)


def test_the_text_mean_is_exact_to_float32(front):
    clip = frames(12, seed=5)
    front.configure(OFF, frames_per_chunk=5)
    (rows,) = front.fuse([(TEXT, lmf.video(clip))])
    alone = [front.fuse([(TEXT, lmf.video(frame[None]))])[0] for frame in clip]
    text = [0, 1, 3, 4, 6]  # the placeholder and the masked id 0 left out
    mean = torch.stack([fused[text] for fused in alone]).double().mean(0)
    assert (rows[[i if i < 2 else i + 11 for i in text]] - mean).abs().max() < 2e-5
    assert all(close(rows[2 + i : 3 + i], fused[2:3]) for i, fused in enumerate(alone))  # in order


def test_rows_with_id_0_or_less_are_plain_embeddings_and_unseen(front):
    image = lmf.image(frames(1)[0])
    (with_zero,) = front.fuse([(TEXT, image)])
    (without,) = front.fuse([([i for i in TEXT if i], image)])
    assert torch.equal(with_zero[5], front.embed_text(torch.tensor([0]))[0])
    assert close(with_zero[[0, 1, 2, 3, 4, 6]], without)


def test_a_prompt_of_masked_rows_alone(front):
    (rows,) = front.fuse([([0, -200, 0], lmf.image(frames(1)[0]))])
    assert rows.isfinite().all() and torch.equal(rows[0], rows[2])


def test_requests_in_any_number(front):
    assert front.fuse([]) == []
    (empty,) = front.fuse([([], None)])
    assert empty.shape == (0, 256)


def test_low_precision_batches_obey_the_law(model):
    requests = [(TEXT, lmf.video(frames(3))), (TEXT[:4], lmf.image(frames(1, seed=3)[0]))]
    exact = model("llama31").front.fuse(requests)
    low = model("llama31", "bfloat16").front
    for request, rows, reference in zip(requests, low.fuse(requests), exact):
        (alone,) = low.fuse([request])
        assert (rows.float() - reference).abs().max().item() <= law_bound(reference, alone)


def test_chunks_are_sized_by_memory(model):
    small = model("llama31").config
    assert frames_that_fit(small, 4) == 64  # as many as are ever taken
    large = dataclasses.replace(small, hidden_size=4096, intermediate_size=14336, head_dim=128, num_attention_heads=32)
    assert 1 <= frames_that_fit(large, 4) < frames_that_fit(large, 2) < 64
    assert frames_that_fit(dataclasses.replace(large, resolution_ratio=2, compressor_size=8), 4) == 1
