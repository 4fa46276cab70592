"""Error answers as one sentence: no Python object, path or address in them."""

from __future__ import annotations

import json
import re
from typing import Any

_ENTRY = re.compile(r"'loc': '(?P<loc>[^']*)'.*?'msg': (?P<quote>['\"])(?P<msg>.*?)(?P=quote), 'input'", re.DOTALL)
_PATH = re.compile(r"(?<![\w/])(?:[a-z]+:)?/{1,3}[\w.\-]+(?:/[\w.\-]+)+")
_VALUES = re.compile(r" ?\((?:parameter|value)=[^()]*\)")
_OBJECT = re.compile(r"<[^<>]* (?:object|at 0x)[^<>]*>")
_LONGEST = 300
"""Characters of a message: longer ones repeat what was sent."""


class Tidy:
    """ASGI middleware for vLLM's `--middleware`: rewrites the message of every JSON error answer by `sentence`."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started: dict[str, Any] | None = None
        body = b""

        async def tidied(message: dict[str, Any]) -> None:
            nonlocal started, body
            if message["type"] == "http.response.start" and message["status"] >= 400 and _is_json(message):
                started = message
                return
            if started is None or message["type"] != "http.response.body":
                return await send(message)
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            text = rewritten(body)
            headers = [(key, value) for key, value in started["headers"] if key.lower() != b"content-length"]
            await send(started | {"headers": [*headers, (b"content-length", str(len(text)).encode())]})
            await send({"type": "http.response.body", "body": text})

        await self.app(scope, receive, tidied)


def rewritten(body: bytes) -> bytes:
    """The body of an error answer with its message made a sentence; unchanged where it is none of vLLM's."""
    try:
        answer = json.loads(body)
        if "detail" in answer:  # FastAPI's own
            answer = error(str(answer["detail"]))
        answer["error"]["message"] = sentence(str(answer["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return body
    return json.dumps(answer).encode()


def error(message: str, code: int | None = None) -> dict[str, Any]:
    """An error answer of vLLM's form."""
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


def sentence(message: str) -> str:
    """One sentence for people of what vLLM or pydantic says.

    >>> sentence("1 validation error:\\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': {}}")
    'messages: Field required.'
    """
    entry = _ENTRY.search(message)
    if entry is not None:
        where = entry["loc"].removeprefix("body").lstrip(".")
        what = entry["msg"].removeprefix("Value error, ")
        message = f"{where}: {what}" if where else what
    elif "validation error" in message:
        message = "The request is not of the form that this address takes."
    message = _OBJECT.sub("an object", _PATH.sub("a path", _VALUES.sub("", " ".join(message.split()))))
    if len(message) > _LONGEST:
        message = message[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    return message if message.endswith((".", "!", "?")) else f"{message}."


def _is_json(message: dict[str, Any]) -> bool:
    return any(key.lower() == b"content-type" and b"json" in value for key, value in message.get("headers", []))
