"""The public interface, against the published numbers and the wishes of people who ask in words."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast.image_cache import CacheSizes
from llava_mini_fast.preprocess.views import normalize, views
from llava_mini_fast.reference import Reference
from llava_mini_fast.testing.cases import load_cases
from llava_mini_fast.testing.goldens import run
from llava_mini_fast.testing.numerics import assert_law

PICTURE = Image.new("RGB", (40, 30), (200, 30, 60))


def test_every_compact_golden(request):
    goldens = request.path.parent / "goldens"
    results = run(load_cases(goldens), lambda directory, dtype: lmf.load(directory, dtype=dtype))
    assert len(results) == 20
    assert [r for r in results if not r.passed] == []


@pytest.mark.parametrize(("cached_frames", "chunk"), [(0, 1), (1, 3), (100, 64)], ids=["off", "tiny", "on"])
def test_every_golden_with_any_cache_and_chunk(request, cached_frames, chunk):
    def engine(directory, dtype):
        model = lmf.load(directory, dtype=dtype)
        model.front.configure(CacheSizes(cached_frames * model.front.cache.frame_bytes, 0), chunk)
        return model

    results = run(load_cases(request.path.parent / "goldens"), engine)
    assert len(results) == 20 and [r for r in results if not r.passed] == []


def test_embed_cuts_with_a_warning_and_ask_refuses(checkpoint, golden):
    row = golden("truncated")
    model = lmf.load(checkpoint("llama31_c2", {"tokenizer_model_max_length": 100}))
    with pytest.warns(UserWarning, match="144 rows are cut at tokenizer_model_max_length = 100"):
        assert model.embed(row.prompt_ids, row.media).shape[0] == 100
    with pytest.raises(ValueError, match=r"needs \d+ rows and the context holds 100"):
        model.ask(lmf.image(PICTURE), "What is this? " * 30)


def test_placeholder_and_media(model):
    m, picture = model("llama31"), lmf.image(PICTURE)
    with pytest.raises(ValueError, match="2 media placeholders"):
        m.embed([5, -200, 6, -200], picture)
    with pytest.raises(ValueError, match="placeholder and no image or video"):
        m.embed([5, -200])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        m.embed([5, 1024])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        m.embed([5, -1])
    assert m.embed([5, 6, 7], picture).shape == (3, 256)  # fused text, no vision rows, as published


def test_generation_stops_after_the_first_stop_id(model):
    m = model("llama31")
    greedy = m.generate_ids([5, 6, 7], max_new_tokens=8)
    stopping = dataclasses.replace(m.config, eos_token_ids=(greedy[3],))
    assert m.config.eos_token_ids and greedy[3] not in greedy[:3]
    m.llm.generation_config.eos_token_id = list(stopping.eos_token_ids)
    try:
        assert m.generate_ids([5, 6, 7], max_new_tokens=8) == greedy[:4]
    finally:
        m.llm.generation_config.eos_token_id = list(m.config.eos_token_ids)


def test_ask_streams_what_it_answers(model):
    m, picture = model("llama31"), lmf.image(PICTURE)
    whole = m.ask(picture, "What is this?", max_new_tokens=12)
    pieces = list(m.ask(picture, "What is this?", max_new_tokens=12, stream=True))
    assert whole and "".join(pieces) == whole and len(pieces) > 1


def test_a_batch_answers_as_one_by_one(model):
    m, picture = model("llama31"), lmf.image(PICTURE)
    questions = [(picture, "What is this?"), (None, "Hello?"), (picture, "Its colour?")]
    assert m.ask_batch(questions, 8) == [m.ask(media, question, 8) for media, question in questions]
    assert m.ask_batch([]) == []
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        m.ask_batch(questions, 0)
    with pytest.raises(ValueError, match="the context holds"):
        m.ask_batch([(picture, "What? " * 5000)])


def test_ask_is_generate_on_prompt_ids(model):
    m, picture = model("llama31"), lmf.image(PICTURE)
    messages = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Its colour?"},
    ]
    for style in ("chat", "published"):
        ids = m.prompt_ids(messages, style)
        answer = m.ask(picture, "Its colour?", 8, history=[("What is this?", "A square.")], style=style)
        assert answer == m.tokenizer.decode(m.generate_ids(ids, picture, 8), skip_special_tokens=True)


def test_ask_without_media_and_with_sampling(model):
    m = model("llama31")
    assert m.ask(None, "Hello?", 6)
    torch.manual_seed(0)
    first = m.ask(None, "Hello?", 12, temperature=1.5, top_p=0.95)
    assert first != m.ask(None, "Hello?", 12, temperature=1.5, top_p=0.95)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1}, "temperature at least 0"),
        ({"top_p": 0}, "top_p above 0"),
        ({"style": "old"}, "style must be 'chat' or 'published'"),
    ],
)
def test_ask_checks_its_parameters(model, options, words):
    with pytest.raises(ValueError, match=words):
        model("llama31").ask(None, "Hello?", **options)


def test_ask_refuses_a_placeholder_in_the_text(model):
    with pytest.raises(ValueError, match="contains <image>"):
        model("llama31").ask(lmf.image(PICTURE), "What is <image>?")


def test_a_failing_stream_raises_in_the_reader(model, monkeypatch):
    m = model("llama31")
    monkeypatch.setattr(m.llm, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(m.ask(None, "Hello?", stream=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("case", "name"), [("image", "llama31"), ("video", "llama31"), ("image_c2", "llama31_c2"), ("vicuna", "vicuna")]
)
def test_low_precision_obeys_the_law(model, checkpoint, golden, case, name, dtype):
    """At most twice the error that the published structure itself has in plain torch at this dtype."""
    row, low = golden(case), getattr(torch, dtype)
    pixels = normalize(views(row.media, model(name).config).pixels, low)
    plain = Reference(checkpoint(name), low).embed(row.prompt_ids, pixels if pixels.shape[0] > 1 else pixels[0])
    rows = model(name, dtype).embed(row.prompt_ids, row.media)
    assert rows.dtype == low
    assert_law(rows, row.fused, plain, case)


def test_importing_the_package_is_light():
    code = (
        "import sys, llava_mini_fast\n"
        "heavy = {'vllm', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
