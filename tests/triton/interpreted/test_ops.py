"""The kernels as torch library ops behind the public functions, and what they read and write, by count."""

from unittest import mock

import checks
import pytest
import torch
from checks import DTYPES, draw
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_mini_fast.ops import compressor_attention, frame_mean, prefix_attention, rms_norm, rope, swiglu
from llava_mini_fast.ops.backend import resolve
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.triton_kernels import OPS, launch
from llava_mini_fast.triton_kernels import compressor_attention as compressor
from llava_mini_fast.triton_kernels import prefix_attention as prefix


def arguments(op, dtype=torch.float32):
    """Small inputs of an op, by its schema."""
    segments = Segments.of([3, 2], [1, 0], "cpu")
    return {
        "rms_norm": (draw(3, 64).to(dtype), draw(64).to(dtype), 1e-5, draw(3, 64, seed=1).to(dtype)),
        "rope": (draw(3, 8 * 32).to(dtype), torch.arange(3), draw(9, 32).float(), 4, 2),
        "swiglu": (draw(3, 64).to(dtype),),
        "add_frames": (draw(4, 32).float(), draw(6, 32).to(dtype), torch.tensor([3, 1]), torch.ones(3)),
        "causal_attention": tuple(draw(2, n, h, 32, seed=h).to(dtype) for n, h in ((2, 4), (5, 2), (5, 2))),
        "prefix_attention": (
            *(draw(5, h, 32, seed=h).to(dtype) for h in (4, 2, 2)),
            *(draw(2, 7, 2, 32, seed=n).to(dtype) for n in (7, 8)), segments.starts, segments.slots, 3,
        ),
        "compressor_attention": (draw(2, 40, 64).to(dtype), draw(8, 64).float(), draw(8, 40).float(), 1e-5, True),
    }[op]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    """Schema, fake implementation, and the two together under dynamic shapes, by torch's own checks."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS[op], arguments(op), test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("op", OPS)
def test_fake_results_are_like_the_real_ones(op, dtype):
    real = _tensors(OPS[op](*arguments(op, dtype)))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments(op, dtype)]
        faked = _tensors(OPS[op](*fake))
    assert [(x.shape, x.dtype, x.stride(), x.device) for x in faked] == [
        (x.shape, x.dtype, x.stride(), x.device) for x in real
    ]


@pytest.mark.parametrize("op", ["rms_norm", "compressor_attention"])
def test_the_optional_results(op):
    args = arguments(op)
    args = (*args[:-1], None if op == "rms_norm" else False)
    real = OPS[op](*args)[1]
    with FakeTensorMode() as mode:
        faked = OPS[op](*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in args))[1]
    assert real.shape == faked.shape == (0,)


def _tensors(result):
    return [] if result is None else [result] if torch.is_tensor(result) else list(result)


def test_compiled_as_one_graph():
    """Every public op with backend="triton" inside one torch.compile(fullgraph=True)."""
    x, weight = draw(5, 64).float(), draw(64, seed=1).float()
    qkv, table = draw(64, 2 * 4 * 32 + 128, seed=2).float() / 8, draw(9, 32, seed=3).float()
    state = draw(2, 2, 7, 2, 32, seed=4).float()
    features, folded, bias = draw(1, 5, 64).float(), draw(8, 64, seed=5).float(), draw(8, 5, seed=6).float()
    segments, total = Segments.of([3, 2], [1, 0], "cpu"), torch.zeros(5, 64)
    resolve("triton", torch.device("cpu"))  # as loading a model does: it imports what torch.compile can't

    def layer(x, backend):
        normed, x = rms_norm.rms_norm(x, weight, 1e-5, x, backend=backend)
        q, k, v = rope.rope((normed @ qkv)[:, :256], torch.arange(5), table, 4, 2, backend=backend)
        attended = prefix_attention.prefix_attention(q, k, v, state[:, 0], state[:, 1], segments, backend=backend)
        image = prefix_attention.causal_attention(q[None], k[None], v[None], backend=backend)
        gated = swiglu.swiglu((attended + image[0]).flatten(1), backend=backend)
        sums = total.clone()
        frame_mean.add_frames(sums, gated, torch.arange(5), torch.ones(1), backend=backend)
        pooled = compressor_attention.compressor_attention(features, folded, bias, eps=1e-5, backend=backend)
        return sums + x, pooled

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(x, "triton"), layer(x, "torch")):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_one_query_reads_each_feature_once_and_writes_nothing_of_size_n(splits):
    frames, rows, width = 2, 96, 64
    seen = _compressor(frames, 8, rows, width, split_rows=-(-rows // splits))
    assert seen.loads["features"].tolist() == [1] * frames * rows * width
    assert seen.stores["features"].sum() == 0
    written = {name: int(counts.sum()) for name, counts in seen.stores.items() if counts.any()}
    partial = [frames * splits * 8 * n for n in (width, 1, 1)] if splits > 1 else []
    assert sorted(written.values(), reverse=True) == sorted([frames * 8 * width, *partial], reverse=True)


def test_many_queries_read_each_feature_once_a_tile():
    rows, queries = 48, 72
    seen = _compressor(1, queries, rows, 64, split_rows=rows)
    tile = compressor.config(1, queries, rows, 64, torch.float32, 80)["BLOCK_M"]
    assert set(seen.loads["features"].tolist()) == {-(-queries // tile)}
    assert all(counts.sum() in (0, queries * 64) for counts in seen.stores.values())  # pooled alone: nothing with N


def _compressor(frames, queries, rows, width, split_rows):
    name = launch.key(
        "compressor_attention", launch.INTERPRETER, torch.float32, queries=queries, rows=rows, width=width
    )
    with mock.patch.dict(launch.TABLE, {name: {"split_rows": split_rows}}):
        return checks.compressor_attention(OPS["compressor_attention"], torch.float32, frames, queries, rows, width)


@pytest.mark.parametrize("group", [1, 3])
def test_keys_and_values_are_read_once_a_query_tile(group):
    lengths, before, d, kv_heads = (5, 21), 40, 32, 2
    seen = checks.prefix_attention(
        OPS["prefix_attention"], torch.float32, group * kv_heads, kv_heads, d, before, lengths, used=(2, 0)
    )
    tile = prefix.config(max(lengths), group, d, torch.float32, 80)["BLOCK_M"]
    tiles = [-(-length * group // tile) for length in lengths]
    state = seen.loads["state"].reshape(3, 2, 2, before, kv_heads, d)
    assert (state[2, 1] == tiles[0]).all() and (state[0, 1] == tiles[1]).all()
    assert not state[1].any() and not state[:, 0].any()
    for name in "kv":
        read = seen.loads[name].reshape(-1, kv_heads, d)
        assert (read[:5] <= tiles[0]).all() and (read[5:] <= tiles[1]).all() and (read >= 1).all()
    assert (seen.loads["q"] == 1).all()
    assert [counts.sum() for counts in seen.stores.values() if counts.any()] == [sum(lengths) * group * kv_heads * d]
