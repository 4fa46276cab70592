"""Which addresses media may come from, and what is said about those that may not: nothing is fetched here."""

import asyncio
import socket

import pytest

from llava_mini_fast.preprocess.limits import MediaError
from llava_mini_fast.testing.serving import bomb, data_url, picture, png

aiohttp = pytest.importorskip("aiohttp", reason="the server is vLLM's")
vllm = pytest.importorskip("vllm", reason="the server is vLLM's")
connector = pytest.importorskip("llava_mini_fast.server.connector")


@pytest.fixture
def names(monkeypatch):
    """names["host"] = address: what a host's name stands for."""
    known = {}

    def resolved(host, *_, **__):
        if host not in known:
            raise OSError("unknown")
        return [(2, 1, 6, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(connector.socket, "getaddrinfo", resolved)
    return known


@pytest.mark.parametrize(
    ("addresses", "allowed"),
    [(["93.184.216.34"], True), (["127.0.0.1"], False), (["10.1.2.3"], False), (["fe80::1%eth0"], False),
     (["93.184.216.34", "192.168.0.1"], False), (["2606:2800:220:1::1"], True), (["0.0.0.0"], False)],
)  # fmt: skip
def test_only_public_addresses(names, monkeypatch, addresses, allowed):
    names["example.org"] = addresses
    url = "https://example.org/a.png"
    if allowed:
        connector.Connector()._check_address(url)
        return
    with pytest.raises(MediaError, match="public addresses only"):
        connector.Connector()._check_address(url)
    monkeypatch.setenv(connector.PRIVATE, "1")
    connector.Connector()._check_address(url)


def test_allowed_domains_alone(names):
    inside = connector.Connector(allowed_media_domains=["files.internal"])
    inside._check_address("http://files.internal/a.png")  # named, so it need not be public
    with pytest.raises(MediaError, match="other domains only"):
        inside._check_address("http://example.org/a.png")
    with pytest.raises(MediaError, match="host is unknown"):
        connector.Connector()._check_address("http://example.org/a.png")


def test_pictures_are_read_by_our_loader():
    found = connector.Connector().fetch_image(data_url("image/png", png(picture(1)))).media
    assert found.tobytes() == picture(1).tobytes()
    with pytest.raises(MediaError, match="at most 89,478,485 pixels"):
        asyncio.run(connector.Connector().fetch_image_async(data_url("image/png", bomb(13000, 13000))))


@pytest.mark.parametrize(
    ("error", "words"),
    [(NotImplementedError("x"), "in base64"), (TimeoutError(), "in time"), (aiohttp.ClientError("at 10.0.0.1:80"), "could not be fetched"),
     (RuntimeError("/etc/passwd"), "can't be read"), (ValueError("HTTP 404 error (value='http://a')"), "does not give it out"),
     (ValueError("size 5 exceeds 4"), "larger than")],
)  # fmt: skip
def test_failures_are_sentences_that_give_nothing_away(error, words):
    with pytest.raises(MediaError, match=words) as caught, connector._sentences("image"):
        raise error
    assert not {"10.0.0.1", "/etc/passwd", "http://"} & set(str(caught.value).split())


def test_http_pictures_come_through_an_allowed_domain(host):
    allowed = connector.Connector(allowed_media_domains=["127.0.0.1"])
    found = allowed.fetch_image(f"http://127.0.0.1:{host.server_port}/a.png").media
    assert found.tobytes() == picture(2).tobytes()
    with pytest.raises(MediaError, match="does not give it out"):
        allowed.fetch_image(f"http://127.0.0.1:{host.server_port}/b.png")


@pytest.mark.parametrize("private", ["0", "1"])
def test_a_name_that_turns_inwards_after_the_check(host, monkeypatch, private):
    """DNS rebinding: the connection is made to no other address than one that was checked."""
    monkeypatch.setenv(connector.PRIVATE, private)
    stands_for = iter(["93.184.216.34", "127.0.0.1"]) if private == "0" else iter(["127.0.0.1"])

    def resolved(_, port, *__, **___):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(stands_for), port or 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)

    async def fetched():
        found = connector.Connector()
        # of this event loop alone, where the server has one for good
        found.connection = type(found.connection)()
        try:
            return await found.fetch_image_async(f"http://example.org:{host.server_port}/a.png")
        finally:
            await (await found.connection.get_async_client()).close()

    if private == "1":
        assert asyncio.run(fetched()).media.tobytes() == picture(2).tobytes()
        return
    with pytest.raises(MediaError, match="public addresses only"):
        asyncio.run(fetched())
    assert host.asked == []
