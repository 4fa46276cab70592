"""The benchmarks run every day, at toy sizes: what they compare agrees, and what they count is right."""

import json
import subprocess
import sys

import pytest
import torch

from llava_mini_fast.bench import flops, frontend, timing
from llava_mini_fast.bench.published import PublishedFrontEnd
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.preprocess.views import normalize


def real_size(**changes):
    return LlavaMiniConfig.from_dict(frontend.LLAMA_8B | {"compressor_size": 1} | changes)


def test_the_gemms_are_most_of_the_operations():
    """What torch.mm is timed on is what the front end multiplies, but for attention and the compressor."""
    config = real_size()
    gemms = sum(gemm.flops for gemm in flops.front_gemms(config, 3, 60))
    assert 0.9 < gemms / sum(flops.front_flops(config, 3, 60).values()) < 1


@pytest.mark.parametrize(("model", "kv_heads", "inner"), [("llama", 8, 14336), ("vicuna", 32, 11008)])
def test_widths_are_the_published_models(model, kv_heads, inner):
    config = frontend.front_config(model)
    assert (config.hidden_size, config.num_key_value_heads, config.intermediate_size) == (4096, kv_heads, inner)
    assert (config.vision["num_hidden_layers"], config.num_compressed) == (24, 1)
    assert frontend.front_config(model, hd=True).num_compressed == 64


def test_the_flop_bound_of_a_cold_image():
    config = real_size()
    ours, published = (sum(flops.front_flops(config, 1, 60, p).values()) for p in (False, True))
    assert published / ours == pytest.approx(1.21, abs=0.02)
    assert flops.front_flops(config, 3, 60)["vision tower"] == 3 * flops.front_flops(config, 1, 60)["vision tower"]
    hd = real_size(resolution_ratio=2, compressor_size=8)
    assert flops.front_flops(hd, 1, 60)["vision tower"] == 5 * flops.front_flops(config, 1, 60)["vision tower"]


def test_flops_count_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    front = frontend.build(torch.float32, hd=False, small=True)
    media = frontend.make_views(1, 1, seed=1)
    for published in (False, True):
        run = PublishedFrontEnd(front).embed if published else lambda ids, pixels: front.fuse([(ids, media)])
        # the counter doesn't know the CPU's fused attention
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run([1, -200, *range(2, frontend.TEXT_ROWS + 1)], normalize(media.pixels))
        counted = sum(flops.front_flops(front.config, 1, frontend.TEXT_ROWS, published).values())
        assert counter.get_total_flops() == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("hd", [False, True])
def test_the_baseline_computes_the_same(hd):
    front = frontend.build(torch.float32, hd=hd, small=True)
    media = frontend.make_views(1 if hd else 2, 5 if hd else 1, seed=3)
    ids = [1, 5, 0, -200, 9, 17]
    (rows,) = front.fuse([(ids, media)])
    assert torch.allclose(rows, PublishedFrontEnd(front).embed(ids, normalize(media.pixels)), atol=2e-4)


def test_a_red_check_reports_no_number(monkeypatch):
    monkeypatch.setattr(frontend, "CHECK_TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(SystemExit, match="red: fused rows differ"):
        frontend.run(["float32"], rounds=1, small=True)


def test_frontend_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(frontend.SIZES, "cpu", frontend.Sizes(clips=(2,), questions=2, images=2))
    monkeypatch.setattr(frontend, "BASELINE_FRAMES", 1)
    path = tmp_path / "result.json"
    frontend.main(["--small", "--rounds", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    keys = {"cold_image", "second_question", "video2", "hd", "gemm_share"}
    assert set(result["ratios"]) == set(result["ratios_bf16"]) == keys
    assert all(row["ours"]["median_s"] > 0 for row in result["rows_float32"])
    assert any("relative_error" in row for row in result["rows_bfloat16"])
    assert result["peak_memory_bytes"] > 0 and result["machine"]["torch"]
    assert "cold image" in capsys.readouterr().out


def test_interleave_takes_turns():
    order = []
    times = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and len(times["a"].seconds) == 2
    assert timing.Timing((1.0, 2.0, 4.0)).median == 2.0 and timing.Timing((1.0, 2.0, 4.0)).spread == 1.5


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip():
    """500 frames peak where 100 do, but for their fused rows; each clip in a process of its own."""
    results = []
    for frames in (100, 500):
        command = [sys.executable, "-m", "llava_mini_fast.bench.video", "--frames", str(frames)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    short, long = results
    assert (short["rows"], long["rows"]) == (106, 506)
    assert all(r["order_kept"] and r["finite"] and r["text_mean_error"] < 1e-5 for r in results)
    grown = long["peak_growth_bytes"] - short["peak_growth_bytes"]
    # two runs of one length differ by up to 20 MiB; the pixels of 400 frames, were they kept, are 129 MiB
    assert grown < 2 * (long["fused_bytes"] - short["fused_bytes"]) + 48 * 2**20
