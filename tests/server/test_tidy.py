"""Error messages made sentences, and vLLM's flags with our defaults."""

import asyncio
import doctest
import json

import pytest

from llava_mini_fast.server import tidy


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("too long", "too long."),
        ("1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': {'model': 'm'}}",
         "messages: Field required."),
        ("1 validation error:\n  {'type': 'x', 'loc': 'body', 'msg': \"Value error, it's no good\", 'input': 5}", "it's no good."),
        ("2 validation errors:\n  {'odd'", "The request is not of the form that this address takes."),
        ("n is bad (parameter=n, value=[1, 2])", "n is bad."),
        ("got <PIL.Image.Image object at 0x7f00>!", "got an object!"),
        ("no /home/me/models/x.bin here", "no a path here."),
        ("see file:///etc/passwd or http://a/b/c", "see a path or a path."),
        ("word " * 100, "word " * 60 + "..."),
    ],
)  # fmt: skip
def test_sentences(said, wanted):
    assert tidy.sentence(said) == wanted


def test_the_docstrings_example():
    assert doctest.testmod(tidy).failed == 0


def answered(status, body, kind=b"application/json", pieces=1):
    """What a client sees of an inner application's answer."""
    sent = []

    async def inner(scope, receive, send):
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind), (b"content-length", b"9")],
            }
        )
        size = max(1, len(body) // pieces)
        parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        for n, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": n < len(parts) - 1})

    async def send(message):
        sent.append(message)

    asyncio.run(tidy.Tidy(inner)({"type": "http"}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part["body"] for part in sent[1:])


def test_only_errors_are_rewritten():
    body = json.dumps({"error": {"message": "bad /tmp/a/b.png", "code": 400}}).encode()
    for pieces in (1, 4):
        status, headers, text = answered(400, body, pieces=pieces)
        assert status == 400 and json.loads(text)["error"] == {"message": "bad a path.", "code": 400}
        assert headers[b"content-length"] == str(len(text)).encode()
    assert answered(200, body)[2] == body
    assert answered(404, b"plain", kind=b"text/plain")[2] == b"plain"
    assert answered(404, b"{}")[2] == b"{}"
    assert json.loads(answered(400, b'{"detail": "no"}')[2])["error"]["message"] == "no."
