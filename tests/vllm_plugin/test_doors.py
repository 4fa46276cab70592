"""Every way into vLLM gives the tokens of the standalone engine for the same ids and media.

The seeds are such that the best logit leads the second by more than 0.005 at every step.
"""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast.preprocess.prompt import LLAMA_SYSTEM, encode
from llava_mini_fast.preprocess.video import frames
from llava_mini_fast.preprocess.views import normalize, views
from llava_mini_fast.vllm_plugin import prompt

QUESTION = "What is in this picture?"
TEXT = f"USER: <image>\n{QUESTION} ASSISTANT:"
STEPS = 12


def picture(seed, size=(60, 45), mode="RGB"):
    shape = (size[1], size[0], len(mode))
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8), mode)


def clip_frames(count=3, seed=7):
    return np.random.RandomState(seed).randint(0, 256, (count, 40, 56, 3), dtype=np.uint8)


def data_url(kind, blob):
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tokens_of(engine, text):
    """The ids of a text prompt: vLLM asks the tokenizer for its special tokens, which are one BOS."""
    return [1008, *encode(engine.tokenizer, text)]


@pytest.fixture(scope="module")
def mp4():
    """A clip of 2.5 s at 8 frames a second, of coarse noise that changes with every frame."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(20):
            coarse = np.random.RandomState(n).randint(0, 256, (6, 8, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(coarse.repeat(8, 0).repeat(8, 1), "rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture
def llama31(v1, checkpoint, model):
    """(vLLM, standalone engine) on the same checkpoint."""
    v1.start(checkpoint("llama31"))
    return v1, model("llama31")


def same(vllm, engine, request, ids, media):
    """vLLM's tokens for a request are the engine's for ids and media, and are about the media."""
    (answer,) = vllm.generate([request], STEPS)
    assert answer.tokens == engine.generate_ids(ids, media, STEPS)
    return answer


def test_text_with_placeholder(llama31):
    vllm, engine = llama31
    request = {"prompt": TEXT, "multi_modal_data": {"image": picture(1)}}
    ids = tokens_of(engine, TEXT)
    answer = same(vllm, engine, request, ids, lmf.image(picture(1)))
    # one row an id, the placeholder's being the picture's
    assert len(answer.prompt) == len(ids) and answer.prompt[: ids.index(-200)] == ids[: ids.index(-200)]


def test_text_tokenized_by_vllm(llama31):
    vllm, engine = llama31
    tokens = vllm.call("tokenize", TEXT)
    assert -200 not in tokens and tokens != tokens_of(engine, TEXT)
    request = {"prompt_token_ids": tokens, "multi_modal_data": {"image": picture(1)}}
    same(vllm, engine, request, tokens_of(engine, TEXT), lmf.image(picture(1)))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes(llama31, mode):
    vllm, engine = llama31
    image = picture(2, mode="RGBA") if mode == "RGBA" else picture(2).convert(mode)
    request = {"prompt": TEXT, "multi_modal_data": {"image": image}}
    same(vllm, engine, request, tokens_of(engine, TEXT), lmf.image(image))


def test_image_arrays(llama31):
    vllm, engine = llama31
    ids, array = tokens_of(engine, TEXT), np.asarray(picture(3))
    for given in (array, array[None], [array], [picture(3)]):
        same(vllm, engine, {"prompt": TEXT, "multi_modal_data": {"image": given}}, ids, lmf.image(array))
    tensor = torch.from_numpy(array.copy())
    same(vllm, engine, prompt(ids, lmf.image(tensor)), ids, lmf.image(array))


def test_chosen_frames(llama31):
    vllm, engine = llama31
    ids, array = tokens_of(engine, TEXT), clip_frames()
    pictures = [Image.fromarray(frame) for frame in array]
    metadata = {"fps": 1.0, "total_num_frames": 3}
    for given in (array, list(array), pictures, [array], [pictures], (array, metadata), [(array, metadata)]):
        same(vllm, engine, {"prompt": TEXT, "multi_modal_data": {"video": given}}, ids, lmf.video(array))
    for given in (array, pictures):
        same(vllm, engine, prompt(ids, lmf.video(given)), ids, lmf.video(array))


def test_frames_that_differ_in_size_and_mode(llama31):
    vllm, engine = llama31
    pictures = [picture(1), picture(2, (30, 50)), picture(3, mode="RGBA")]
    ids = tokens_of(engine, TEXT)
    same(vllm, engine, {"prompt": TEXT, "multi_modal_data": {"video": pictures}}, ids, lmf.video(pictures))


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("llama31", "image", (1, 3, 336, 336)),
        ("llama31", "video", (2, 1, 3, 336, 336)),
        ("llama31_hd", "image", (5, 3, 336, 336)),
        ("llama31_hd", "video", (2, 5, 3, 336, 336)),
    ],
)
def test_preprocessed_floats(v1, checkpoint, model, name, kind, shape):
    engine = model(name)
    v1.start(checkpoint(name))
    ids = tokens_of(engine, TEXT)
    floats = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    medium = getattr(lmf, kind)(floats)
    text = {"prompt": TEXT, "multi_modal_data": {kind: floats}}
    listed = {"prompt": TEXT, "multi_modal_data": {kind: [floats]}}
    array = {"prompt": TEXT, "multi_modal_data": {kind: floats.numpy()}}
    wrapped = {"prompt": TEXT, "multi_modal_data": {kind: medium}}
    answers = v1.generate([text, listed, array, wrapped, prompt(ids, medium)], STEPS)
    assert [answer.tokens for answer in answers] == [engine.generate_ids(ids, medium, STEPS)] * 5


def test_floats_are_what_pixels_become(llama31):
    """A picture and its own preprocessing give the same answer."""
    vllm, engine = llama31
    ids, medium = tokens_of(engine, TEXT), lmf.image(picture(4))
    floats = normalize(views(medium, engine.config).pixels[0], torch.float32)
    same(vllm, engine, {"prompt": TEXT, "multi_modal_data": {"image": floats}}, ids, medium)


def test_vllms_loader_gives_our_frames(llama31, mp4):
    vllm, _ = llama31
    assert np.array_equal(vllm.call("load_video", data_url("video/mp4", mp4)), np.stack(list(frames(mp4))))


def test_chat(llama31, mp4):
    vllm, engine = llama31
    jpeg = io.BytesIO()
    picture(5).save(jpeg, "JPEG")
    parts = [
        ({"type": "image_pil", "image_pil": picture(5)}, lmf.image(picture(5))),
        ({"type": "image_url", "image_url": {"url": data_url("image/png", png(picture(6)))}}, lmf.image(picture(6))),
        (
            {"type": "image_url", "image_url": {"url": data_url("image/jpeg", jpeg.getvalue())}},
            lmf.image(jpeg.getvalue()),
        ),
        ({"type": "video_url", "video_url": {"url": data_url("video/mp4", mp4)}}, lmf.video(mp4)),
    ]
    system = {"role": "system", "content": LLAMA_SYSTEM}
    text = {"type": "text", "text": QUESTION}
    # wherever the media stands in the message, its placeholder goes first
    orders = [[text, parts[0][0]], *[[part, text] for part, _ in parts[1:]]]
    answers = vllm.chat([[system, {"role": "user", "content": content}] for content in orders], STEPS)
    ids = engine.prompt_ids([{"role": "user", "content": f"<image>\n{QUESTION}"}])
    assert ids.count(1008) == 1  # one BOS, the template's
    assert [answer.tokens for answer in answers] == [engine.generate_ids(ids, media, STEPS) for _, media in parts]


def test_chat_of_several_turns_in_the_published_style(llama31):
    vllm, engine = llama31
    image = {"type": "image_pil", "image_pil": picture(5)}
    asked = {"role": "user", "content": [{"type": "text", "text": QUESTION}, image]}
    rest = [{"role": "assistant", "content": "A square."}, {"role": "user", "content": "Its colour?"}]
    system = {"role": "system", "content": LLAMA_SYSTEM}
    ours = [{"role": "user", "content": f"<image>\n{QUESTION}"}, *rest]
    (answer,) = vllm.chat([[system, asked, *rest]], STEPS)
    assert answer.tokens == engine.generate_ids(engine.prompt_ids(ours), lmf.image(picture(5)), STEPS)


def test_text_alone(llama31):
    vllm, engine = llama31
    text = "How are you?"
    same(vllm, engine, text, tokens_of(engine, text), None)
    same(vllm, engine, prompt(tokens_of(engine, text)), tokens_of(engine, text), None)
    # there is no media, so this is text like any other
    same(
        vllm,
        engine,
        f"{text} <image>",
        [1008, *engine.tokenizer.encode(f"{text} <image>", add_special_tokens=False)],
        None,
    )
    (answer,) = vllm.chat([[{"role": "system", "content": LLAMA_SYSTEM}, {"role": "user", "content": text}]], STEPS)
    ids = engine.prompt_ids([{"role": "user", "content": text}])
    assert answer.tokens == engine.generate_ids(ids, None, STEPS)


def test_the_pixels_decide_and_not_the_uuid(v1, checkpoint, model):
    v1.start(checkpoint("llama31"))
    engine = model("llama31")
    ids = tokens_of(engine, TEXT)
    answers = []
    for seed in (1, 8):
        request = {"prompt": TEXT, "multi_modal_data": {"image": picture(seed)}, "multi_modal_uuids": {"image": "mine"}}
        answers.append(same(v1, engine, request, ids, lmf.image(picture(seed))).tokens)
    assert answers[0] != answers[1]
