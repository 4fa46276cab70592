"""Engines that start in other ways."""

import pytest
from PIL import Image

from llava_mini_fast.vllm_plugin import prompt

PICTURE = Image.new("RGB", (40, 30), (200, 30, 60))
REQUEST = {"prompt": "USER: <image>\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": PICTURE}}


def test_dummy_weights(v1, checkpoint):
    v1.start(checkpoint("llama31"), load_format="dummy")
    image, text = v1.generate([REQUEST, "Hello"], 6, ignore_eos=True)
    assert len(image.tokens) == len(text.tokens) == 6
    assert v1.call("counted")["sound"] == [True]


@pytest.mark.parametrize("limits", [{"image": 0, "video": 0}, {"video": 0}])
def test_media_switched_off(v1, checkpoint, model, limits):
    v1.start(checkpoint("llama31"), limit_mm_per_prompt=limits)
    ids = [1008, 50, 60, 70]
    assert v1.generate([prompt(ids)], 8)[0].tokens == model("llama31").generate_ids(ids, None, 8)
    if "image" not in limits:
        assert v1.generate([REQUEST], 4)[0].tokens
        return
    with pytest.raises(ValueError, match="not available for text-only models"):
        v1.generate([REQUEST])


def test_without_the_processor_cache(v1, checkpoint, goldens):
    case = goldens("llama31")["image"]
    v1.start(checkpoint("llama31"), mm_processor_cache_gb=0)
    for _ in range(2):
        assert v1.generate([case.prompt], len(case.row.tokens))[0].tokens == case.row.tokens


def test_a_checkpoint_that_lacks_a_tensor(v1, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    for entry in checkpoint("llama31").iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.compressor.query"]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks tensor model\.compressor\.query"):
        v1.start(tmp_path)
    v1.start(checkpoint("llama31"))
    assert v1.generate([REQUEST], 4)[0].tokens
