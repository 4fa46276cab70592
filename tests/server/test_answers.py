"""The official client gets the offline answers, token for token."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast.preprocess.prompt import LLAMA_SYSTEM
from llava_mini_fast.testing.serving import MODEL, about, clip, data_url, picture, png

TOKENS = 8


def offline(model, medium, question, history=(), of="llama31"):
    """The standalone engine's text for what `about` sends."""
    ours = None if medium is None else lmf.video(medium) if isinstance(medium, bytes) else lmf.image(medium)
    # vLLM leaves out a last character that is not whole yet
    return model(of).ask(ours, question, TOKENS, history=history).rstrip("\ufffd")


def converse(server, model, medium, of="llama31"):
    """Three turns about a medium, each answered as offline."""
    questions, messages, history = ("What?", "Where is it?", "Why so?"), [], []
    for turn, question in enumerate(questions):
        messages.append(about(None if turn else medium, question))
        answer = server.ask(messages, TOKENS)
        assert answer == offline(model, medium, question, history, of)
        messages.append({"role": "assistant", "content": answer})
        history.append((question, answer))


@pytest.mark.parametrize("kind", ["image", "clip", "text"])
def test_answers_are_the_offline_ones(server, model, kind):
    medium = {"image": picture(1), "clip": clip(), "text": None}[kind]
    assert server.ask([about(medium, "What is this?")], TOKENS) == offline(model, medium, "What is this?")


def test_a_picture_with_transparency_and_another_format(server, model):
    image = picture(2).convert("RGBA")
    image.putalpha(100)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    sent = about(data_url("image/webp", buffer.getvalue()), "What is this?")
    assert server.ask([sent], TOKENS) == offline(model, Image.open(buffer), "What is this?")


def test_three_turns(server, model):
    converse(server, model, picture(3))


@pytest.mark.slow
def test_vicuna(start, model):
    server = start(of="vicuna")
    for medium in (picture(3), clip(), None):
        converse(server, model, medium, of="vicuna")


@pytest.mark.slow
def test_the_documentations_client_is_answered_right(start, capsys, monkeypatch):
    """docs/serving.md's example, word for word, against the demo model."""
    root = Path(__file__).parents[2]
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "serving.md").read_text(encoding="utf-8"), re.DOTALL)
    server = start("--served-model-name", "demo", of=None)
    monkeypatch.chdir(root)
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out == "three\n"


def test_streaming_gives_the_same_text_in_pieces(server, model):
    stream = server.client().chat.completions.create(
        model=MODEL, messages=[about(picture(4), "What?")], max_tokens=TOKENS, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == offline(model, picture(4), "What?")


def test_a_system_message_of_ones_own_takes_the_place_of_the_published(server):
    usual = server.ask([about(picture(5), "What?")], TOKENS)
    same = server.ask([{"role": "system", "content": LLAMA_SYSTEM}, about(picture(5), "What?")], TOKENS)
    other = server.ask([{"role": "system", "content": "Answer in rhymes."}, about(picture(5), "What?")], TOKENS)
    assert usual == same != other


def test_several_choices_log_probabilities_and_models(server):
    client = server.client()
    answer = client.chat.completions.create(
        model=MODEL, messages=[about(picture(6), "What?")], max_tokens=4, n=2, temperature=1.0, seed=1, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    assert len(answer.choices) == 2 and all(len(choice.logprobs.content) == 4 for choice in answer.choices)
    assert [entry.id for entry in client.models.list()] == [MODEL]


def test_a_second_question_runs_no_vision_tower(server):
    """Metrics prove it, and the prefix cache has the system prompt and the vision row in whole blocks."""
    medium = picture(7)
    server.ask([about(medium, "What is this?")], TOKENS)
    before = {name: server.metric(f"llava_mini_cache_{name}_total") for name in ("misses", "hits")}
    assert before["misses"] >= 1
    answer = server.client().chat.completions.create(
        model=MODEL, messages=[about(medium, "Is there anything else in it?")], max_tokens=2, temperature=0
    )
    assert server.metric("llava_mini_cache_misses_total") == before["misses"]
    assert server.metric("llava_mini_cache_hits_total") == before["hits"] + 1
    assert answer.usage.prompt_tokens_details.cached_tokens >= 96


def test_a_uuid_never_stands_for_another_picture(server, model):
    def named(medium):
        message = about(medium, "What is this?")
        message["content"][0]["uuid"] = "mine"
        return message

    for seed in (8, 9, 8):
        assert server.ask([named(picture(seed))], TOKENS) == offline(model, picture(seed), "What is this?")


def test_files_of_pictures_are_read_as_they_are(server, model):
    sent = about(data_url("image/png", png(picture(10))), "What?")
    assert server.ask([sent], TOKENS) == offline(model, picture(10), "What?")


def test_vllms_own_metrics_are_there(server):
    assert server.metric("vllm:request_success_total") > 0
