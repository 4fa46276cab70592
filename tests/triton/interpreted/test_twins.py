"""Broken twins: each is a kernel with one thing wrong, made from its own source; the checks catch every one."""

import importlib.util
from pathlib import Path
from unittest import mock

import checks
import pytest
import torch
from triton.runtime.errors import InterpreterError

from llava_mini_fast.ops import library
from llava_mini_fast.triton_kernels import compressor_attention, frame_mean, prefix_attention, rms_norm, rope, swiglu

SPLIT = dict(rows=100)  # seven tiles: three splits

TWINS = {
    "a missing bound of the row": (rms_norm, "(row < rows) & (columns < width)", "row < rows", {}),
    "a missing bound of the rows": (swiglu, "(row < rows) & (columns < width)", "columns < width", {}),
    "a mean over the block": (rms_norm, "/ width + eps", "/ BLOCK + eps", {}),
    "the residual left out": (rms_norm, "+ other.to(tl.float32)", "+ 0 * other.to(tl.float32)", {}),
    "up begins one late": (swiglu, "stride + width + columns", "stride + width + columns + 1", {}),
    "silu of the wrong sign": (swiglu, "gate * -1.44", "gate * 1.44", {}),
    "one head too many is q": (rope, "real & (head < heads)", "real & (head <= heads)", {}),
    "v lies where k does": (rope, "head - heads - kv_heads)", "head - heads)", {}),
    "the turn backwards": (rope, "wide_high * cos + wide_low", "wide_high * cos - wide_low", {}),
    "rows of one place": (frame_mean, "tl.load(target + row)", "tl.load(target + row * 0)", {}),
    "the first frame only": (frame_mean, "(frame * length + row)", "(frame * 0 + row)", {}),
    "no query sees itself": (prefix_attention, "row[None, :] <= own", "row[None, :] < own", {}),
    "a look at the next row": (prefix_attention, "row[None, :] <= own", "row[None, :] <= 1 + own", {}),
    "no bound of the keys": (prefix_attention, "inside = row < limit", "inside = row < limit + BLOCK_N", {}),
    "masked keys count": (prefix_attention, "visible = inside[None, :]\n", "visible = row[None, :] >= 0\n", {}),
    "groups that overlap": (prefix_attention, "kv_head * GROUP + packed", "kv_head + packed", {}),
    "the sums not rescaled": (
        prefix_attention, "acc * shrink[:, None]", "acc", dict(prefix=70, lengths=(40,), used=(1,)),
    ),
    "the keys of the first tile only": (
        prefix_attention, "(tile * BLOCK_M + BLOCK_M - 1)", "(BLOCK_M - 1)", dict(lengths=(33, 64), used=(0, 1), heads=2),
    ),
    "another segment's frame": (prefix_attention, "tl.load(slots + segment)", "tl.load(slots + segment * 0)", {}),
    "splits not weighed": (compressor_attention, "tl.exp2(top - tl.max(top, 0))", "tl.where(present, 1.0, 0.0)", SPLIT),
    "splits that overlap": (compressor_attention, "stop = tl.minimum(first + split_rows, rows)", "stop = rows", SPLIT),
    "splits in one place": (compressor_attention, "SPLIT:\n        place = (frame * splits + split)", "SPLIT:\n        place = (frame * splits)", SPLIT),
    "the mean not taken out": (compressor_attention, "acc -= shift[:, None]", "acc -= 0", {}),
    "queries beyond the last": (compressor_attention, "real = query < queries", "real = query < queries + 1", dict(queries=7)),
    "rows beyond the last": (compressor_attention, "present = row < stop", "present = row < stop + 1", {}),
}  # fmt: skip
CHECKS = {rms_norm: "rms_norm", swiglu: "swiglu", rope: "rope", frame_mean: "add_frames"}


def twin(module, old, new, tmp_path):
    """The module again, from its source with one place changed, its ops left unregistered."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has {old!r} {source.count(old)} times"
    path = tmp_path / "twin.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("twin", path)
    made = importlib.util.module_from_spec(spec)
    with mock.patch.object(library, "define", lambda namespace, schema, run, fake: run):
        spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("name", TWINS)
def test_is_caught(name, tmp_path):
    module, old, new, shape = TWINS[name]
    op = CHECKS.get(module) or module.__name__.rpartition(".")[2]
    run = getattr(twin(module, old, new, tmp_path), op)
    with pytest.raises((AssertionError, InterpreterError)) as caught:
        getattr(checks, op)(run, torch.float32, **shape)
    print(f"{name}: {caught.value}")


@pytest.mark.parametrize("module", {id(row[0]): row[0] for row in TWINS.values()}.values(), ids=lambda m: m.__name__)
def test_a_twin_with_nothing_wrong_passes(module, tmp_path):
    """With the shapes that the broken ones are given: what is caught is what was changed."""
    op = CHECKS.get(module) or module.__name__.rpartition(".")[2]
    run = getattr(twin(module, "import triton\n", "import triton\n", tmp_path), op)
    for shape in {repr(row[3]): row[3] for row in TWINS.values() if row[0] is module}.values():
        getattr(checks, op)(run, torch.float32, **shape)
