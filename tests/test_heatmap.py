"""Heat maps: the published weights, over the picture that the model sees."""

import numpy as np
import pytest
import torch
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast.heatmap import MOST_FRAMES, attention, heatmap
from llava_mini_fast.preprocess.views import normalize, views


def picture(seed=0, size=(80, 40)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def published(engine, features):
    """What nn.MultiheadAttention calls its weights, of the unfolded compressor."""
    from llava_mini_fast.model.compressor import resized_positions

    c = engine.front.compressor
    side = int(features.shape[1] ** 0.5)
    values = c.ln_kv(features)
    mha = torch.nn.MultiheadAttention(c.width, 8, batch_first=True)
    mha.load_state_dict(c.attn.state_dict())
    queries = (c.ln_q(c.query) + c.pos_embed)[None]
    return mha(queries, values + resized_positions(c.pos_embed, side), values)[1]


@pytest.mark.parametrize("name", ["llama31", "llama31_c2"])
@torch.inference_mode()
def test_weights_are_the_published_ones(model, name):
    engine, media = model(name), lmf.image(picture())
    weights, seen = attention(engine, media)
    q = engine.config.num_compressed
    assert weights.shape == (1, q, 24, 24) and torch.allclose(weights.sum((2, 3)), torch.ones(1, q))
    assert torch.equal(seen[0], views(media, engine.config).pixels[0, 0])
    wanted = published(engine, engine.front.vision_tower(normalize(seen)))
    assert torch.allclose(weights.flatten(2), wanted, atol=1e-5)


def test_hd_and_clips(model):
    weights, seen = attention(model("llama31_hd"), lmf.image(picture()))
    assert weights.shape == (1, 64, 48, 48) and seen.shape == (1, 3, 336, 336)
    frames = np.random.RandomState(1).randint(0, 256, (MOST_FRAMES + 2, 20, 20, 3), dtype=np.uint8)
    assert heatmap(model("llama31"), lmf.video(frames[:3])).size == (3 * 336, 336)
    assert heatmap(model("llama31"), lmf.video(frames)).size == (MOST_FRAMES * 336, 336)


def test_the_brightest_place_is_the_largest_weight(model):
    engine, media = model("llama31"), lmf.image(Image.new("RGB", (336, 336)))
    weights, _ = attention(engine, media)
    row, column = divmod(int(weights[0, 0].argmax()), 24)
    drawn = np.asarray(heatmap(engine, media)).astype(int).sum(-1)
    patch = drawn[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
    assert patch.max() == drawn.max()


def test_floats_are_refused(model):
    with pytest.raises(ValueError, match="not floats"):
        heatmap(model("llama31"), lmf.image(torch.zeros(1, 3, 336, 336)))


def test_a_front_end_for_heat_maps_has_no_image_cache(checkpoint, model):
    from llava_mini_fast.heatmap import load_front

    front = load_front(checkpoint("llama31"))
    assert not hasattr(front.front, "cache")
    media = lmf.image(picture())
    assert torch.allclose(attention(front, media)[0], attention(model("llama31"), media)[0], atol=1e-5)
