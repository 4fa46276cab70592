"""Media objects: what is accepted, sentences for the rest, and that nothing is read too early."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini_fast import Media, image, video

PIXELS = np.zeros((6, 8, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


@pytest.mark.parametrize(
    "x",
    ["picture.png", Path("picture.png"), b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), PICTURE, PIXELS, PIXELS[None],
     torch.from_numpy(PIXELS), torch.zeros(1, 3, 336, 336), torch.zeros(5, 3, 336, 336).half(),
     np.zeros((5, 3, 336, 336), np.float32)],
    ids=lambda x: f"{type(x).__name__}{tuple(getattr(x, 'shape', ()))}",
)  # fmt: skip
def test_images(x):
    media = image(x)
    assert isinstance(media, Media) and media.kind == "image" and media.as_published is False
    assert image(x, as_published=True).as_published is True


@pytest.mark.parametrize(
    "x",
    ["clip.mp4", Path("clip.mp4"), b"bytes", [PICTURE], (PIXELS, PICTURE), PIXELS[None], torch.from_numpy(PIXELS)[None],
     torch.zeros(2, 1, 3, 336, 336), np.zeros((1, 5, 3, 336, 336), np.float32)],
    ids=lambda x: f"{type(x).__name__}{tuple(getattr(x, 'shape', ()))}",
)  # fmt: skip
def test_videos(x):
    assert video(x).kind == "video"


@pytest.mark.parametrize(
    ("make", "x", "error", "words"),
    [
        (image, None, TypeError, "An image must be a path, bytes, a PIL image.*not NoneType"),
        (image, [PICTURE], TypeError, "not list"),
        (image, 3, TypeError, "not int"),
        (image, PIXELS[..., 0], ValueError, r"uint8 of shape \(h, w, 3\).*this is uint8 of shape \(6, 8\)"),
        (image, np.zeros((6, 8, 4), np.uint8), ValueError, r"this is uint8 of shape \(6, 8, 4\)"),
        (image, np.zeros((2, 6, 8, 3), np.uint8), ValueError, r"this is uint8 of shape \(2, 6, 8, 3\)"),
        (image, PIXELS.astype(np.int64), ValueError, "this is int64 of shape"),
        (image, torch.zeros(3, 336, 336), ValueError, r"\(views, 3, 336, 336\); this is float32 of shape \(3, 336"),
        (image, torch.zeros(1, 3, 224, 224), ValueError, r"must be \(views, 3, 336, 336\)"),
        (image, torch.zeros(2, 1, 3, 336, 336), ValueError, r"must be \(views, 3, 336, 336\)"),
        (image, "https://example.org/a.png", ValueError, "not as a URL; fetch it first"),
        (image, "data:image/png;base64,AAAA", ValueError, "not as a URL; fetch it first"),
        (video, None, TypeError, "A video must be a path, bytes, a list of frames.*not NoneType"),
        (video, PICTURE, TypeError, r"One PIL image is no clip; give image\(x\)"),
        (video, PIXELS, ValueError, r"\(T, h, w, 3\); this is uint8 of shape \(6, 8, 3\)"),
        (video, torch.zeros(1, 3, 336, 336), ValueError, r"must be \(T, views, 3, 336, 336\)"),
        (video, PIXELS[None][:0], ValueError, "no frames"),
        (video, torch.zeros(0, 1, 3, 336, 336), ValueError, "no frames"),
        (video, [], ValueError, "no frames"),
        (video, ["a.png"], TypeError, "A frame must be a PIL image or a uint8 array.*not str"),
        (video, [PIXELS.astype(float)], ValueError, r"A frame must be uint8 of shape \(h, w, 3\); this is float64"),
        (video, "rtsp://example.org/stream", ValueError, "not as a URL"),
    ],
)
def test_sentences(make, x, error, words):
    with pytest.raises(error, match=words) as caught:
        make(x)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_nothing_is_read():
    assert image("absent.png").source == "absent.png"
    assert video(b"no video").source == b"no video"


def test_import_is_light():
    code = "import sys, llava_mini_fast; print(sorted({'torch', 'numpy', 'PIL', 'av', 'vllm', 'triton'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip() == "[]"
