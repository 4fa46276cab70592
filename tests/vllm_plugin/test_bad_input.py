"""What can't be answered is refused with a sentence, as a ValueError or vLLM's error for bad requests; the engine goes on."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast.testing.cases import load_cases
from llava_mini_fast.vllm_plugin import prompt
from llava_mini_fast.vllm_plugin.segments import PromptMedia

PICTURE = Image.new("RGB", (40, 30), (200, 30, 60))
FRAMES = np.zeros((2, 30, 40, 3), np.uint8)
TEXT = "USER: <image>\nWhat is this? ASSISTANT:"
IDS = [5, -200, 6, 7]


def text(image=None, prompt=TEXT, uuids=None, media=None):
    media = {"image": image} if media is None else media
    return {"prompt": prompt, "multi_modal_data": media} | ({"multi_modal_uuids": uuids} if uuids else {})


@pytest.fixture
def vllm(v1, checkpoint):
    """An engine that, after the test, still gives the right answer to a good request."""
    v1.start(checkpoint("llama31"))
    (before,) = v1.generate([text(PICTURE)], 8)
    yield v1
    (after,) = v1.generate([text(PICTURE)], 8)
    assert after.tokens == before.tokens


SEVERAL = "several media; LLaVA-Mini takes one image or one video a conversation"
UNUSABLE = {
    "two placeholders": (text(PICTURE, "<image> and <image>"), "2 media placeholders"),
    "no placeholder": (text(PICTURE, "What is this?"), "no <image> placeholder"),
    "two images": (text([PICTURE, PICTURE]), SEVERAL),
    "two videos": (text(media={"video": [FRAMES, FRAMES]}), SEVERAL),
    "image and video": (text(media={"image": PICTURE, "video": FRAMES}), SEVERAL),
    "two of our media": (text([lmf.image(PICTURE), lmf.image(PICTURE)]), SEVERAL),
    "uuid alone": (text([None], uuids={"image": ["mine"]}), "named by a uuid without its data"),
    "uuid and no list": (text(uuids={"image": "mine"}), "named by a uuid without its data"),
    "nothing at all": (text(), "empty"),
    "broken bytes": (prompt(IDS, lmf.image(b"\x89PNG\r\n\x1a\n" + bytes(40))), "picture"),
    "no picture": (prompt(IDS, lmf.image(b"hello")), "not a picture that can be read"),
    "no clip": (prompt(IDS, lmf.video(b"hello")), "not a video that can be read"),
    "wrong shape": (text(torch.zeros(3, 100, 100)), "must be"),
    "views of another kind": (text(torch.zeros(5, 3, 336, 336)), "5 views a frame; this checkpoint takes 1"),
    "an id too large": (prompt([5, 70000]), "out of vocabulary"),
    "an id too large beside media": (prompt([5, -200, 70000], lmf.image(PICTURE)), "outside the vocabulary"),
    "another negative id": (prompt([5, -200, -7], lmf.image(PICTURE)), "outside the vocabulary"),
    "the placeholder's own id": ({"prompt_token_ids": [5, -200, 6]}, "out of vocabulary"),
    "long text": (text(PICTURE, TEXT + " why?" * 300), "context length is 512"),
    "long ids": (
        prompt([-200] + [5] * 505, lmf.video(np.zeros((9, 8, 8, 3), np.uint8))),
        r"514 rows \(9 of them vision\)",
    ),
    "long text alone": (prompt([5] * 600), "512"),
    "long video": (prompt(IDS, lmf.video(np.zeros((510, 8, 8, 3), np.uint8))), r"513 rows \(510 of them vision\)"),
    "a full context": (prompt([5] * 512), "512"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_refused_with_a_sentence(vllm, name):
    request, sentence = UNUSABLE[name]
    with pytest.raises(ValueError, match=sentence):
        vllm.generate([request], 4)
    # and so is a batch that it is part of
    with pytest.raises(ValueError, match=sentence):
        vllm.generate([text(PICTURE), request], 4)


def test_refused_in_chat(vllm):
    def url(blob, kind="image_url", mime="image/png"):
        return {"type": kind, kind: {"url": f"data:{mime};base64,{base64.b64encode(blob).decode()}"}}

    def ask(*content):
        vllm.chat([[{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]], 4)

    image = {"type": "image_pil", "image_pil": PICTURE}
    with pytest.raises(ValueError, match="At most 1 image"):
        ask(image, image)
    with pytest.raises(ValueError, match="more '<image>' placeholders"):
        ask(image, {"type": "text", "text": "<image> and <image>"})
    with pytest.raises(ValueError, match="cannot identify image"):
        ask(url(b"hello"))
    with pytest.raises(ValueError, match="not a video that can be read"):
        ask(url(b"hello", "video_url", "video/mp4"))
    with pytest.raises(ValueError, match="named by a uuid without its data"):
        ask({"type": "image_pil", "image_pil": None, "uuid": "mine"})
    ask(image)


def test_prompt_refuses_before_vllm_is_asked():
    with pytest.raises(ValueError, match="no <image> placeholder"):
        prompt([5, 6], lmf.image(PICTURE))
    with pytest.raises(ValueError, match="placeholder and no image or video"):
        prompt([5, -200, 6])
    with pytest.raises(ValueError, match="2 media placeholders"):
        prompt([-200, 5, -200], lmf.image(PICTURE))


def test_a_hand_made_prompt_is_checked_too(vllm):
    """Media that carries ids of its own, built without `prompt`: nothing else has looked at them."""
    outside = "outside the vocabulary: allowed are 0..1023"
    refused = {(5, 6): "no <image> placeholder", (-200, -200): "2 media", (-200, 1024): outside, (-200, -7): outside}
    for ids, sentence in refused.items():
        with pytest.raises(ValueError, match=sentence):
            vllm.generate(
                [{"prompt_token_ids": [5], "multi_modal_data": {"image": PromptMedia(lmf.image(PICTURE), ids)}}]
            )


def test_prompts_beyond_the_models_own_limit(v1, checkpoint, goldens_directory, model):
    """`truncated`: the published code cuts the prompt; every door but the raw one refuses it."""
    (case,) = [case for case in load_cases(goldens_directory) if case.name == "truncated"]
    row = case.rows[0]
    assert row.raw_only == "cut at 100 rows"
    v1.start(case.checkpoint_directory())
    sentence = r"needs 144 rows \(4 of them vision\) and tokenizer_model_max_length allows 100; .* through hf_overrides"
    with pytest.raises(ValueError, match=sentence):
        v1.generate([prompt(row.prompt_ids, row.media)])
    short = prompt(row.prompt_ids[-60:], row.media)
    assert len(short["prompt_token_ids"]) == 60 and v1.generate([short], 4)[0].tokens

    # raised by the caller, the same prompt is answered
    v1.start(case.checkpoint_directory(), hf_overrides={"tokenizer_model_max_length": 512})
    (answer,) = v1.generate([prompt(row.prompt_ids, row.media)], 12)
    assert answer.tokens == model("llama31_c2").generate_ids(row.prompt_ids, row.media, 12)
