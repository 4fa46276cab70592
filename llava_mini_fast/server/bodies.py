"""How large a request may be: refused before it is in memory."""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "LLAVA_MINI_MAX_BODY_BYTES"
"""An environment variable: the largest body of a request."""
DEFAULT = 512 * 2**20
"""Room for a clip of the size that vLLM downloads (256 MiB), in base64."""


class Bounded:
    """ASGI middleware: 413 for a request that says that its body is larger; one that doesn't say is cut off, which is a 400.

    Raises:
        ValueError: the variable is no positive number.
    """

    def __init__(self, app: Any):
        self.app = app
        text = os.environ.get(VARIABLE, str(DEFAULT))
        if not text.isdecimal() or not int(text):
            raise ValueError(f"{VARIABLE} must be a positive number; got {text!r}.")
        self.most = int(text)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
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
        body = json.dumps(
            {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 413}}
        ).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
