"""How the server gets media: vLLM's connector, with our loaders and limits, and every failure a sentence for the sender.

vLLM chooses a connector by `VLLM_MEDIA_CONNECTOR`, which `llava-mini serve` sets to `NAME`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp
from PIL import Image

from llava_mini_fast.preprocess.image import load_rgb
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.vllm_plugin.compat.logging import logger
from llava_mini_fast.vllm_plugin.compat.media import (
    MEDIA_CONNECTOR_REGISTRY,
    HTTPConnection,
    ImageMediaIO,
    MediaConnector,
    MediaWithBytes,
    VideoMediaIO,
    image_timeout,
    video_timeout,
)

NAME = "llava_mini"
PRIVATE = "LLAVA_MINI_ALLOW_PRIVATE_ADDRESSES"
"""An environment variable: 1 lets media come from loopback, private and link-local addresses."""


class PictureIO(ImageMediaIO):
    """Our own reading of a picture's bytes: limits before decoding, the same pixels as everywhere else."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        return MediaWithBytes(load_rgb(bytes(data), limits=Limits.from_env()), data)


class ClipIO(VideoMediaIO):
    """vLLM's, with a bound on the frames of a clip that is sent as single pictures."""

    def load_base64(self, media_type: str, data: str) -> Any:
        if media_type.lower() == "video/jpeg":
            limits = Limits.from_env()
            limits.check_frames(data.count(",") + 1)
        return super().load_base64(media_type, data)


class PublicResolver(aiohttp.ThreadedResolver):
    """Refuses a host whose address is not public at the moment of the connection, whatever its name stood for before.

    A proxy of the environment's may be inside.
    """

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> Any:
        found = await super().resolve(host, port, family)
        if host not in {urlsplit(proxy).hostname for proxy in getproxies().values()}:
            _check_public(entry["host"] for entry in found)
        return found


class PublicConnection(HTTPConnection):
    """vLLM's, to public addresses only."""

    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._async_client is None:
            public = aiohttp.TCPConnector(resolver=PublicResolver())
            self._async_client = aiohttp.ClientSession(trust_env=True, connector=public)
        return self._async_client


_public_connection = PublicConnection()


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class Connector(MediaConnector):
    """Images and clips only. Addresses must be public, or of an allowed domain.

    Addresses are checked before the fetch, and in the server, which fetches by the async methods, at the connection too.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self._public_only():
            self.connection = _public_connection

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        with _sentences("image"):
            self._check_address(image_url)
            return self.load_from_url(image_url, self._picture_io(), fetch_timeout=image_timeout())

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        with _sentences("image"):
            await self._check_address_async(image_url)
            return await self.load_from_url_async(image_url, self._picture_io(), fetch_timeout=image_timeout())

    def fetch_video(self, video_url: str, **_: Any) -> Any:
        with _sentences("video"):
            self._check_address(video_url)
            return self.load_from_url(video_url, self._clip_io(), fetch_timeout=video_timeout())

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        with _sentences("video"):
            await self._check_address_async(video_url)
            return await self.load_from_url_async(video_url, self._clip_io(), fetch_timeout=video_timeout())

    def _picture_io(self) -> PictureIO:
        return PictureIO(**self.media_io_kwargs.get("image", {}))

    def _clip_io(self) -> ClipIO:
        return ClipIO(self._picture_io(), video_backend=NAME)

    def _check_address(self, url: str) -> None:
        """Refuse what is no data: or http(s) URL, and hosts that are not public, before a connection is made.

        Raises:
            MediaError: in words for the sender.
        """
        if url[:5].lower() == "data:":
            return
        parts = urlsplit(url)
        if parts.scheme == "file" and self.allowed_local_media_path is not None:
            return
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MediaError("Media must come as a data: URL or from an http or https address.")
        if self.allowed_media_domains:
            if parts.hostname not in self.allowed_media_domains:
                raise MediaError("This server takes media from other domains only.")
            return
        if self._public_only():
            _check_public(_addresses(parts.hostname))

    def _public_only(self) -> bool:
        return not self.allowed_media_domains and os.environ.get(PRIVATE) != "1"

    async def _check_address_async(self, url: str) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._check_address, url)


def _addresses(host: str) -> set[str]:
    """Every address that a host's name stands for.

    Raises:
        MediaError: the name is unknown.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise MediaError("The address's host is unknown.") from None
    return {str(entry[4][0]) for entry in found}


def _check_public(addresses: Iterable[str]) -> None:
    """Raises: MediaError: one of a host's addresses is not public."""
    if not all(ipaddress.ip_address(found.partition("%")[0]).is_global for found in addresses):
        raise MediaError("This server takes media from public addresses only.")


@contextmanager
def _sentences(noun: str) -> Iterator[None]:
    """Every failure as a ValueError, which the server answers with 400: whoever sent the medium can mend it."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        logger.debug("%s refused", noun, exc_info=True)
        if isinstance(error.__cause__, MediaError):  # vLLM wraps what the connection raises
            raise error.__cause__ from None
        raise MediaError(_why(error, noun)) from None


def _why(error: Exception, noun: str) -> str:
    """A sentence without the address, path or object that vLLM's own message may hold."""
    name = type(error).__name__
    if isinstance(error, NotImplementedError):
        return f"A data: URL of {noun} must be in base64."
    if name in ("Error", "ValueError") and ("base64" in str(error).lower() or name == "Error"):
        return f"The data: URL of the {noun} is not valid base64."
    if isinstance(error, asyncio.TimeoutError | TimeoutError) or "Timeout" in name:
        return f"The {noun} did not arrive in time."
    if "HTTP 4" in str(error):
        return f"The {noun} could not be fetched: its server does not give it out."
    if "size" in str(error).lower() and "exceed" in str(error).lower():
        return f"The {noun} is larger than this server downloads."
    if name.startswith(("Client", "Connection", "HTTP", "VLLMUnprocessable", "TooMany")):
        return f"The {noun} could not be fetched from its address."
    return f"The {noun} can't be read."
