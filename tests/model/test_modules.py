"""Compressor, tower, projector and pre-fusion, each against the specification on a seeded checkpoint's weights."""

import pytest
import torch

from llava_mini_fast import reference as spec
from llava_mini_fast.model.splice import placeholder_index, splice
from llava_mini_fast.model.vision_tower import PatchEmbedding, VisionTower, grid_of_tiles
from llava_mini_fast.ops.segments import Segments


@pytest.fixture(scope="module")
def weights(checkpoint):
    return spec.read_weights(checkpoint("llama31_c2"), torch.float32)


def features(frames, patches, seed=0):
    return torch.randn(frames, patches, 1024, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [24, 48])
def test_folded_compressor_equals_the_published_attention(model, weights, grid):
    x = features(2, grid * grid)
    folded = model("llama31_c2").front.compressor(x)
    for frame in range(2):
        expected = spec.compressor(x[frame], spec.part(weights, "model.compressor."))
        assert (folded[frame] - expected).abs().max() < 2e-5


def test_attention_map_is_a_distribution_and_the_average_of_the_heads(model):
    compressor = model("llama31_c2").front.compressor
    weights = compressor.attention_map(features(1, 576))
    assert weights.shape == (1, 4, 576)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4)) and (weights >= 0).all()


def test_refold_follows_new_weights(model, checkpoint):
    compressor = model("llama31_c2").front.compressor
    before = compressor.folded(576)
    assert compressor.folded(576) is before
    compressor.refold()
    assert compressor.folded(576) is not before and torch.equal(compressor.folded(576)[0], before[0])


def test_grid_of_tiles_is_spatial_order():
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    whole = torch.stack([y, x], dim=-1).float()
    tiles = torch.stack([whole[24 * i :][:24, 24 * j :][:, :24].reshape(576, 2) for i in range(2) for j in range(2)])
    assert torch.equal(grid_of_tiles(tiles[None])[0], whole.reshape(2304, 2))
    assert torch.equal(grid_of_tiles(tiles[None])[0], spec.tiles_to_grid(tiles))


def test_patches_are_the_published_convolution_as_a_product(model):
    """A convolution would be rounded to TF32 on CUDA; its weight has the published shape."""
    generator = torch.Generator().manual_seed(0)
    conv, patches = torch.nn.Conv2d(3, 8, 14, 14, bias=False).double(), PatchEmbedding(8, 14).double()
    patches.load_state_dict(conv.state_dict())
    pixels = torch.randn(2, 3, 42, 42, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(patches(pixels), conv(pixels))
    assert not [m for m in model("llama31").front.modules() if isinstance(m, torch.nn.Conv2d)]


def test_tower_runs_only_the_layers_that_are_read(model, checkpoint):
    tower = model("llama31").front.vision_tower
    assert len(tower.clip.encoder.layers) == 1  # two in the checkpoint, -2 selects the first one's output
    with pytest.raises(ValueError, match="outside the vision tower's 2 layers"):
        VisionTower(model("llama31").config.clip_config(), -4)


def test_text_part_equals_the_published_prefusion_row_by_row(model, weights):
    front = model("llama31_c2").front
    config = model("llama31_c2").config
    generator = torch.Generator().manual_seed(4)
    patches, compressed, text = (torch.randn(n, 256, generator=generator) for n in (50, 4, 9))
    ids = torch.tensor([3, 4, 0, -200, 8, 9, 10, 0, 12])
    layers = [spec.part(weights, f"model.prefusion_layers.{i}.") for i in range(config.prefusion_layer_num)]
    vision, fused = spec.prefusion(patches, compressed, text, ids, layers, config)

    layers, two, _, *heads = front.prefusion_layers.slot_shape()
    state = torch.full((3, layers, two, 54, *heads), float("nan"))
    ours = front.prefusion_layers.image_part(patches[None], compressed[None], state, [2])[0]
    kept = text[ids > 0]
    assert (ours - vision).abs().max() < 1e-4
    assert (
        front.prefusion_layers.text_part(kept, Segments.of([len(kept)], [2], "cpu"), state) - fused[ids > 0]
    ).abs().max() < 1e-4


def test_splice():
    text, vision = torch.arange(4.0)[:, None], torch.tensor([[10.0], [11.0]])
    assert splice(text, vision, 1).flatten().tolist() == [0, 10, 11, 2, 3]
    assert splice(text, vision, 0).flatten().tolist() == [10, 11, 1, 2, 3]
    assert splice(text, vision, 3).flatten().tolist() == [0, 1, 2, 10, 11]
    assert splice(text, vision, None) is text
    assert placeholder_index([1, -200, 3]) == 1 and placeholder_index([1]) is None
    with pytest.raises(ValueError, match="3 media placeholders"):
        placeholder_index([-200, -200, -200])
