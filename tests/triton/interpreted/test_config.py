"""Tile choices: pure functions of shape, dtype and architecture, over which a card's rows of the tuned table are written."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from llava_mini_fast.triton_kernels import (
    compressor_attention,
    frame_mean,
    launch,
    prefix_attention,
    rms_norm,
    rope,
    swiglu,
)

HALF, SINGLE = torch.bfloat16, torch.float32


H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"


def test_the_table_is_written_over_the_kernels_own_choice(monkeypatch):
    own = swiglu.config(14336, HALF, 90)
    assert launch.key("swiglu", H200, HALF, width=14336) == "swiglu nvidia-h200 bfloat16 width=14336"
    monkeypatch.setitem(launch.TABLE, "swiglu nvidia-h200 bfloat16 width=14336", {"num_warps": 8})
    assert swiglu.config(14336, HALF, 90, H200) == own | {"num_warps": 8}
    assert swiglu.config(14336, SINGLE, 90, H200) == own == swiglu.config(11008, HALF, 90, H200)


def test_a_cards_rows_are_its_own(monkeypatch):
    """H100 and H200 are both sm_90, and differ in bandwidth."""
    configs = {
        "rms_norm": (rms_norm.config, {"width": 4096}),
        "rope": (rope.config, {"head_dim": 128, "total_heads": 48}),
        "swiglu": (swiglu.config, {"width": 14336}),
        "add_frames": (frame_mean.config, {"width": 4096}),
    }
    for op, (config, shape) in configs.items():
        monkeypatch.setitem(launch.TABLE, launch.key(op, H100, HALF, **shape), {"num_warps": 1})
        given = {"dtype": HALF, "arch": 90} | shape
        assert config(**given, card=H100)["num_warps"] == 1
        assert config(**given, card=H200) == config(**given) != config(**given, card=H100)
    key = launch.key("prefix_attention", H100, HALF, packed=256, head_dim=128)
    monkeypatch.setitem(launch.TABLE, key, {"STAGES": 1})
    assert prefix_attention.config(60, 4, 128, HALF, 90, H100)["STAGES"] == 1
    assert prefix_attention.config(60, 4, 128, HALF, 90, H200)["STAGES"] == 3
    key = launch.key("compressor_attention", H100, HALF, queries=8, rows=576, width=1024)
    monkeypatch.setitem(launch.TABLE, key, {"STAGES": 1})
    assert compressor_attention.config(1, 8, 576, 1024, HALF, 90, H100)["STAGES"] == 1
    assert compressor_attention.config(1, 8, 576, 1024, HALF, 90, H200)["STAGES"] == 4


class TwoDevices:
    """Triton's driver and torch.cuda on a machine with an A100 and an H200, of which one is current."""

    ARCHITECTURES, NAMES = (80, 90), ("NVIDIA A100-SXM4-80GB", "NVIDIA H200")

    def __init__(self):
        self.current = 0

    def get_current_target(self):
        return GPUTarget("cuda", self.ARCHITECTURES[self.current], 32)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def get_device_name(self, device):
        return self.NAMES[device.index]


def test_settings_are_for_the_device_of_the_tensor(monkeypatch):
    machine = TwoDevices()
    monkeypatch.setattr(driver, "_active", machine)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", machine.get_device_name)
    launch._hardware.cache_clear()
    compiled = object()  # a kernel that is not interpreted
    for current, index in [(0, 1), (1, 0), (0, 0), (1, 1)]:
        machine.current = current
        x = SimpleNamespace(device=torch.device("cuda", index))
        expected = [(80, "nvidia-a100-sxm4-80gb"), (90, "nvidia-h200")][index]
        launch._hardware.cache_clear()
        assert launch.hardware(x, compiled) == expected and machine.current == current
        assert launch.hardware(x, rms_norm.rms_norm_kernel) == (80, "interpreter")
    launch._hardware.cache_clear()


def test_the_table_is_a_file_that_may_be_missing(tmp_path):
    assert launch._read(tmp_path / "none.json") == {}
    table = {"rope nvidia-h200 bfloat16 head_dim=128": {"num_warps": 2}}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    assert launch._read(tmp_path / "tuned.json") == table


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
