"""How large a request may be: refused before it is in memory."""

from __future__ import annotations

import json
import os
from typing import Any

from llava_mini_fast.preprocess import limits
from llava_mini_fast.server.tidy import error

VARIABLE = "LLAVA_MINI_MAX_BODY_BYTES"
"""An environment variable: the largest body of a request, or `none`."""
DEFAULT = 512 * 2**20
"""Room for a clip of the size that vLLM downloads (256 MiB), in base64."""


def most() -> int | None:
    """The limit that the environment asks for, in bytes.

    Raises:
        ValueError: the variable is neither a positive number nor `none`.
    """
    return limits.limit(VARIABLE, os.environ.get(VARIABLE, str(DEFAULT)), int)


class Bounded:
    """ASGI middleware: 413 for a request that says that its body is larger; one that doesn't say is cut off, which is a 400.

    Errors as in `most`.
    """

    def __init__(self, app: Any):
        self.app, self.most = app, most()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self.most is None:
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            return await self._refuse(send)
        received = 0

        async def bounded() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most:
                raise ValueError("the body is too large")  # FastAPI answers that it can't parse the body
            return message

        await self.app(scope, bounded, send)

    async def _refuse(self, send: Any) -> None:
        message = f"The request is larger than the {self.most:,} bytes that this server takes."
        body = json.dumps(error(message, 413)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
