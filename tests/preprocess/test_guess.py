"""Picture or clip, by content."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from llava_mini_fast.preprocess.guess import guess
from llava_mini_fast.preprocess.limits import Limits, MediaError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a", "a.txt"])
def test_the_name_does_not_matter(tmp_path, name):
    shutil.copyfile(EXAMPLES / "shapes.png", tmp_path / name)
    assert guess(tmp_path / name).kind == "image"
    shutil.copyfile(EXAMPLES / "moving.mp4", tmp_path / name)
    assert guess(tmp_path / name).kind == "video"


def test_animations_are_clips_and_pages_are_not(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name, kind in {"a.gif": "video", "a.webp": "video", "a.png": "video", "a.tiff": "image"}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert guess(tmp_path / name).kind == kind, name
        frames[0].save(tmp_path / name)
        assert guess(tmp_path / name).kind == "image", name


def test_unreadable_files_are_named_for_what_they_claim_to_be(tmp_path):
    for name, words in {
        "a.png": "not a picture",
        "a.mp4": "not a video",
        "a.txt": "no picture that can be read",
    }.items():
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(MediaError, match=words):
            guess(tmp_path / name)


def test_limits_hold_before_reading():
    with pytest.raises(MediaError, match="at most 10 bytes"):
        guess(EXAMPLES / "shapes.png", Limits(max_bytes=10))
