"""Tile choices: pure functions of shape, dtype and architecture, over which the tuned table writes."""

import json

import pytest
import torch

from llava_mini_fast.triton_kernels import compressor_attention, launch, prefix_attention, rms_norm, rope, swiglu

HALF, SINGLE = torch.bfloat16, torch.float32


def test_the_table_is_written_over_the_kernels_own_choice(monkeypatch):
    own = swiglu.config(14336, HALF, 90)
    assert launch.key("swiglu", 90, HALF, width=14336) == "swiglu sm90 bfloat16 width=14336"
    monkeypatch.setitem(launch.TABLE, "swiglu sm90 bfloat16 width=14336", {"num_warps": 8})
    assert swiglu.config(14336, HALF, 90) == own | {"num_warps": 8}
    assert swiglu.config(14336, HALF, 80) == own == swiglu.config(14336, SINGLE, 90)


def test_the_table_is_a_file_that_may_be_missing(tmp_path):
    assert launch._read(tmp_path / "none.json") == {}
    (tmp_path / "tuned.json").write_text(json.dumps({"rope sm90 bfloat16 head_dim=128": {"num_warps": 2}}))
    assert launch._read(tmp_path / "tuned.json") == {"rope sm90 bfloat16 head_dim=128": {"num_warps": 2}}


@pytest.mark.parametrize("queries", [1, 4, 5, 60, 577])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_attention_takes_the_smallest_tile_that_holds_a_segment(queries, arch):
    tile = prefix_attention.config(queries, 4, 128, HALF, arch)
    assert tile["BLOCK_M"] == min(128, launch.power_of_2(4 * queries, 16))
    assert tile["num_warps"] == (8 if tile["BLOCK_M"] >= (64 if arch < 90 else 128) else 4)


@pytest.mark.parametrize("rows", [1, 16, 33, 576, 2304])
@pytest.mark.parametrize("frames", [1, 3, 64, 1000])
@pytest.mark.parametrize("queries", [1, 8, 512])
def test_splits_are_whole_tiles_and_never_empty(rows, frames, queries):
    chosen = compressor_attention.config(frames, queries, rows, 1024, HALF, 90)
    splits = launch.cdiv(rows, chosen["split_rows"])
    assert chosen["split_rows"] % chosen["BLOCK_N"] == 0
    assert splits == 1 or chosen["split_rows"] >= 2 * chosen["BLOCK_N"]
    assert (splits - 1) * chosen["split_rows"] < rows
    if frames == 1000:
        assert splits == 1  # there are programs enough


@pytest.mark.parametrize("width", [1, 96, 256, 4096, 5120, 16384])
def test_narrow_rows_share_a_program(width):
    chosen = rms_norm.config(width, HALF, 90)
    assert chosen["BLOCK"] >= width and chosen["ROWS"] * chosen["BLOCK"] >= 2048
    assert chosen["BLOCK"] == max(32, launch.power_of_2(width))
    assert rope.config(64, 8, HALF, 90)["ROWS"] == 4
