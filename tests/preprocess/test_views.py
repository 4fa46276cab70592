"""The door from media to pixels: recorded goldens, normalisation, digests, float tensors, limits from the environment."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_mini_fast import image, video
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.preprocess.video import frames
from llava_mini_fast.preprocess.views import normalize, views

GOLDENS = Path(__file__).parents[1] / "goldens"
RECORDED = json.loads((GOLDENS / "preprocess.json").read_text())
SAMPLES = load_file(GOLDENS / "preprocess.safetensors")


def config(ratio: int = 1) -> LlavaMiniConfig:
    return LlavaMiniConfig.from_dict(
        {"model_type": "llava_mini_llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 1, "vocab_size": 10, "mm_vision_tower": "clip", "resolution_ratio": ratio,
         "image_aspect_ratio": "pad"}
    )  # fmt: skip


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_recorded_pixels(name, as_published):
    stem, ratio = name.rsplit(".n", 1)
    if stem == "clip":
        chosen = [Image.open(GOLDENS / "media" / f"clip_{i}.png") for i in RECORDED[name]["frames_asked"]]
        found = views(video(chosen, as_published=as_published), config(int(ratio)))
        pixels, sums = normalize(found.pixels), "abs_sum_per_frame"
    else:
        found = views(image(GOLDENS / "media" / stem, as_published=as_published), config(int(ratio)))
        pixels, sums = normalize(found.pixels)[0], "abs_sum_per_view"
    assert found.pixels.dtype == torch.uint8 and list(pixels.shape) == RECORDED[name]["views"]
    assert found.num_views == config(int(ratio)).views_per_frame == found.pixels.shape[1]
    assert torch.equal(pixels[..., ::7, ::7], SAMPLES[name])
    assert pixels.double().abs().flatten(1).sum(1).tolist() == pytest.approx(RECORDED[name][sums], rel=1e-12)


def clip_processor():
    transformers = pytest.importorskip("transformers")
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    return transformers.CLIPImageProcessorPil(**size)


def test_normalize_is_clips_for_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([values, values, values])
    expected = clip_processor()(pixels, do_resize=False, do_center_crop=False, input_data_format="channels_first")
    expected = torch.from_numpy(expected["pixel_values"][0])
    assert expected.dtype == torch.float32
    assert torch.equal(normalize(torch.from_numpy(pixels)), expected)


def test_normalize_is_clips_on_a_picture():
    picture = Image.open(GOLDENS / "media" / "square.png").convert("RGB")
    expected = torch.from_numpy(clip_processor()(picture)["pixel_values"][0])
    assert torch.equal(normalize(views(image(picture), config()).pixels)[0, 0], expected)


@pytest.mark.gpu
def test_normalize_is_the_same_on_a_gpu():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert torch.equal(normalize(pixels.cuda()).cpu(), normalize(pixels))


def test_normalize_casts():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    before = pixels.clone()
    assert torch.equal(normalize(pixels, torch.bfloat16), normalize(pixels).bfloat16())
    floats = torch.randn(2, 3, 4, 4)
    assert torch.equal(normalize(floats, torch.float16), floats.half())
    assert torch.equal(pixels, before)


def test_every_form_of_a_picture_gives_the_same_views(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    forms = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.open(path), pixels, pixels[None],
             torch.from_numpy(pixels)]  # fmt: skip
    found = [views(image(form), config(2)) for form in forms]
    assert all(v.kind == "image" and v.num_frames == 1 and v.pixels.shape == (1, 5, 3, 336, 336) for v in found)
    assert len({v.digests for v in found}) == 1


def test_video_views():
    chosen = np.random.RandomState(0).randint(0, 256, (4, 50, 60, 3)).astype(np.uint8)
    found = views(video(chosen), config(2))
    assert found.kind == "video" and found.num_frames == 4 and found.pixels.shape == (4, 5, 3, 336, 336)
    for frame, pixels in zip(frames(chosen), found.pixels, strict=True):
        assert torch.equal(pixels[4], torch.from_numpy(frame).permute(2, 0, 1))
        assert torch.equal(pixels, views(image(frame), config(2)).pixels[0])


def test_digests_follow_pixels_alone():
    a, b = (np.full((8, 8, 3), level, np.uint8) for level in (1, 2))
    found = views(video([a, b, a]), config())
    assert [len(digest) for digest in found.digests] == [16] * 3
    assert found.digests[0] == found.digests[2] != found.digests[1]
    assert views(image(np.full((336, 336, 3), 1, np.uint8)), config()).digests[0] == found.digests[0]
    assert views(image(a), config(2)).digests[0] != found.digests[0]
    floats = views(image(torch.zeros(1, 3, 336, 336)), config())
    nudged = torch.zeros(1, 3, 336, 336)
    nudged[0, 2, 335, 335] = 1e-6
    assert views(image(nudged), config()).digests != floats.digests


def test_float_tensors():
    still = torch.randn(5, 3, 336, 336)
    found = views(image(still), config(2))
    assert torch.equal(found.pixels, still[None]) and found.pixels.dtype == torch.float32
    clip = torch.randn(2, 1, 3, 336, 336)
    found = views(video(clip.half()), config())
    assert torch.equal(found.pixels, clip.half().float()) and found.num_frames == 2
    found = views(video(clip.numpy()), config())
    assert torch.equal(found.pixels, clip)
    with pytest.raises(MediaError, match="float image has 1 views a frame; this checkpoint takes 5"):
        views(image(still[:1]), config(2))
    with pytest.raises(MediaError, match="float video has 1 views a frame; this checkpoint takes 5"):
        views(video(clip), config(2))
    with pytest.raises(MediaError, match="gives 2 frames; at most 1"):
        views(video(clip), config(), Limits(max_frames=1))


def test_limits_come_from_the_environment(monkeypatch):
    for variable in ("PIXELS", "SIDE", "BYTES", "SECONDS", "FRAMES"):
        monkeypatch.delenv(f"LLAVA_MINI_MAX_{variable}", raising=False)
    assert Limits.from_env() == Limits()
    monkeypatch.setenv("LLAVA_MINI_MAX_PIXELS", "100")
    with pytest.raises(MediaError, match="at most 100 pixels"):
        views(image(np.zeros((20, 20, 3), np.uint8)), config())
    views(image(np.zeros((20, 20, 3), np.uint8)), config(), Limits())
    assert Limits.from_env({"LLAVA_MINI_MAX_SECONDS": "1.5", "LLAVA_MINI_MAX_SIDE": "none"}) == Limits(
        max_seconds=1.5, max_side=None
    )
    assert Limits.from_env({"LLAVA_MINI_MAX_FRAMES": "180", "LLAVA_MINI_THIN_FRAMES": "0"}) == Limits(
        max_frames=180, thin_frames=False
    )
    for text in ("-1", "0", "many", "nan"):
        with pytest.raises(ValueError, match="LLAVA_MINI_MAX_SECONDS must be a positive number or none"):
            Limits.from_env({"LLAVA_MINI_MAX_SECONDS": text})
    with pytest.raises(ValueError, match="LLAVA_MINI_THIN_FRAMES must be 0 or 1"):
        Limits.from_env({"LLAVA_MINI_THIN_FRAMES": "maybe"})
