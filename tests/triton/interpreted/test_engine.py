"""The engine with backend="triton" against the published numbers, and HD's shapes against the specification."""

from pathlib import Path

import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast import reference as spec
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.model.compressor import Compressor
from llava_mini_fast.model.prefusion import PreFusion
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.testing.cases import load_cases
from llava_mini_fast.testing.checkpoints import cached
from llava_mini_fast.testing.goldens import run
from llava_mini_fast.triton_kernels import launch

GOLDENS = Path(__file__).parents[2] / "goldens"

TILES = {
    ("rms_norm", "width=256"): {"ROWS": 256},
    ("swiglu", "width=512"): {"ROWS": 256},
    ("rope", "head_dim=64 total_heads=8"): {"ROWS": 256},
    ("rope", "head_dim=64 total_heads=4"): {"ROWS": 256},
    ("prefix_attention", "packed=256 head_dim=64"): {"BLOCK_M": 256, "BLOCK_N": 256},
    ("prefix_attention", "packed=16 head_dim=64"): {"BLOCK_N": 256},
    ("compressor_attention", "queries=8 rows=576 width=1024"): {"BLOCK_N": 64, "split_rows": 320},
    ("compressor_attention", "queries=512 rows=144 width=1024"): {"BLOCK_M": 512, "BLOCK_N": 256, "split_rows": 144},
    ("compressor_attention", "queries=512 rows=2304 width=1024"): {"BLOCK_M": 512, "BLOCK_N": 256, "split_rows": 2304},
}
"""The interpreter takes a millisecond an operation, whatever its size: tiles that no GPU could hold."""


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    for (op, shape), settings in TILES.items():
        monkeypatch.setitem(launch.TABLE, f"{op} interpreter float32 {shape}", settings)


@pytest.mark.parametrize(
    "names", [("image", "video"), pytest.param(("hd",), marks=pytest.mark.slow)], ids=["image and video", "hd"]
)
def test_goldens(names):
    used = []

    def engine(directory, dtype):
        model = lmf.load(directory, dtype=dtype, backend="triton")
        # the interpreter copies whole storages, the cache's arena too: a small one
        model.front.configure(CacheSizes(6 * model.front.cache.frame_bytes, 0))
        used.append(model.front.backend)
        return model

    results = run([case for case in load_cases(GOLDENS) if case.name in names], engine)
    assert len(results) == len(names) and set(used) == {"triton"}
    assert [r for r in results if not r.passed] == []


def test_hd_on_a_small_grid():
    """HD's modules, Q = 64 and a picture's worth of patch rows, on a 12 x 12 grid, against the specification in float64."""
    config = LlavaMiniConfig.from_pretrained(cached("llama31_hd", GOLDENS))
    weights = spec.read_weights(cached("llama31_hd", GOLDENS), torch.float32)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(144, config.mm_hidden_size, generator=draw)
    small = spec.part(weights, "model.compressor.")
    compressor = Compressor(config.compressor_size, config.mm_hidden_size, "triton")
    compressor.load_state_dict(small)
    expected = spec.compressor(features.double(), {name: x.double() for name, x in small.items()})
    compressed = compressor(features[None])[0]
    assert (compressed - expected).abs().max() < 1e-4

    hidden = config.hidden_size
    patches, latent, text = (torch.randn(n, hidden, generator=draw) / 4 for n in (144, len(compressed), 20))
    layers = [spec.part(weights, f"model.prefusion_layers.{n}.") for n in range(config.prefusion_layer_num)]
    prefusion = PreFusion(config, "triton")
    for layer, published in zip(prefusion, layers):
        for name, piece in layer.published_slices().items():
            piece.copy_(published[name])
    _, _, _, kv_heads, head_dim = prefusion.slot_shape()
    state = torch.full((1, len(layers), 2, 144 + len(latent), kv_heads, head_dim), float("nan"))
    with torch.no_grad():
        vision = prefusion.image_part(patches[None], latent[None], state, [0])[0]
        fused = prefusion.text_part(text, Segments.of([20], [0], "cpu"), state)
    layers = [{name: x.double() for name, x in layer.items()} for layer in layers]
    ids = torch.arange(1, 21)
    wanted = spec.prefusion(patches.double(), latent.double(), text.double(), ids, layers, config)
    assert (vision - wanted[0]).abs().max() < 1e-4 and (fused - wanted[1]).abs().max() < 1e-4
