"""Hostile input: each a 4xx with one sentence that gives nothing away, and the next good request is answered."""

import io
import json
import re
import struct
import urllib.error
import urllib.request
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import llava_mini_fast as lmf
from llava_mini_fast.preprocess.prompt import LLAMA_SYSTEM
from llava_mini_fast.testing.serving import MODEL, about, bomb, clip, data_url, mp4_bomb, picture, png

psutil = pytest.importorskip("psutil", reason="the server is vLLM's")

FORBIDDEN = re.compile(
    r"/\w+/\w+|0x[0-9a-f]{4}|Traceback|\bobject at\b|\d+\.\d+\.\d+\.\d+|localhost|passwd|[<{]\w+[ '\"]"
)
"""What an answer must not hold: a path, an address, a Python object's repr, or markup."""


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def video_part(url):
    return {"type": "video_url", "video_url": {"url": url}}


def asking(*parts):
    return {
        "model": MODEL,
        "max_tokens": 2,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}],
    }


def saved(kind, **options):
    buffer = io.BytesIO()
    picture(0).save(buffer, kind, **options)
    return buffer.getvalue()


def gif_bomb():
    """A GIF whose screen is 65,535 by 65,535."""
    blob = bytearray(saved("GIF"))
    blob[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(blob)


def webp_bomb():
    """A WebP whose header says 16,383 by 16,383."""
    blob = bytearray(saved("WEBP", lossless=True))
    blob[21:25] = struct.pack("<I", (16382 << 14) | 16382)
    return bytes(blob)


def wide_mp4():
    """A clip of 12,000 x 9,000 pixels: two grey JPEGs."""
    import av

    jpeg, buffer = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (12000, 9000), "gray").save(jpeg, "JPEG", quality=1)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 12000, 9000, "yuvj420p"
        for second in range(2):
            mux(container, stream, jpeg.getvalue(), second)
    return buffer.getvalue()


def million_frames():
    """A clip of 10^6 frames, one a second, all but the first of which repeat it in a few bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        grey = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 128, np.uint8), "rgb24")
        first, repeat = (bytes(packet) for _ in range(2) for packet in stream.encode(grey))
        for second in range(10**6):
            mux(container, stream, repeat if second else first, second)
    return buffer.getvalue()


def mux(container, stream, data, second):
    import av

    packet = av.Packet(data)
    packet.stream, packet.time_base = stream, Fraction(1)
    packet.pts = packet.dts = second
    packet.duration, packet.is_keyframe = 1, True
    container.mux(packet)


def without_index():
    blob = clip()
    assert b"moov" in blob
    return blob[: blob.index(b"moov") - 4]


def zero_frames():
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(None))
    return buffer.getvalue()


def media(kind, blob):
    part = image_part if kind.startswith("image") else video_part
    return lambda: asking(part(data_url(kind, blob() if callable(blob) else blob)))


def body(**more):
    return lambda: {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]} | more


GOOD = png(picture(0))
CHAT = {
    "truncated png": media("image/png", GOOD[: len(GOOD) // 2]),
    "truncated jpeg": media("image/jpeg", lambda: saved("JPEG")[:200]),
    "header alone": media("image/png", GOOD[:33]),
    "empty image": media("image/png", b""),
    "noise": media("image/png", np.random.RandomState(0).bytes(500)),
    "text as a picture": media("image/png", b"I am a picture"),
    "html": media("image/png", b"<html><script>alert(1)</script></html>"),
    "svg": media("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "pdf": media("image/png", b"%PDF-1.7\n1 0 obj <<>> endobj"),
    "postscript": media("image/png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run"),
    "zip polyglot without a picture": media("image/png", b"PK\x03\x04" + GOOD),
    "clip as a picture": media("image/png", clip),
    "picture as a clip": media("video/mp4", b"RIFF0000WEBPVP8 "),
    "png bomb": media("image/png", lambda: bomb(30000, 30000)),
    "png just under Pillow's limit": media("image/png", lambda: bomb(13000, 13000)),
    "one long line": media("image/png", lambda: bomb(2_000_000, 1)),
    "empty png": media("image/png", lambda: bomb(0, 0)),
    "gif bomb": media("image/gif", gif_bomb),
    "webp bomb": media("image/webp", webp_bomb),
    "mp4 bomb": media("video/mp4", wide_mp4),
    "a million frames": media("video/mp4", million_frames),
    "an index of sixty million packets": media("video/mp4", lambda: mp4_bomb(60_000_000)),
    "an index of a million packets in the same bytes": media("video/mp4", lambda: mp4_bomb(1_000_000)),
    "no frames": media("video/mp4", zero_frames),
    "empty clip": media("video/mp4", b""),
    "truncated clip": media("video/mp4", lambda: clip()[:3000]),
    "clip without its index": media("video/mp4", without_index),
    "noise as a clip": media("video/mp4", np.random.RandomState(1).bytes(5000)),
    "playlist": media("video/mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
    "concat script": media("video/mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"),
    "jpeg frames that are none": lambda: asking(video_part("data:video/jpeg;base64,aaaa,bbbb")),
    "file url": lambda: asking(image_part("file:///etc/passwd")),
    "file url of a clip": lambda: asking(video_part("file:///etc/passwd")),
    "loopback": lambda: asking(image_part("http://127.0.0.1:22/a.png")),
    "loopback by name": lambda: asking(video_part("http://localhost/a.mp4")),
    "loopback, IPv6": lambda: asking(image_part("http://[::1]/a.png")),
    "loopback as a number": lambda: asking(image_part("http://2130706433/a.png")),
    "metadata service": lambda: asking(image_part("http://169.254.169.254/latest/meta-data")),
    "private network": lambda: asking(image_part("http://10.0.0.1/a.png")),
    "unknown host": lambda: asking(image_part("http://no-such-host.invalid/a.png")),
    "ftp": lambda: asking(image_part("ftp://example.org/a.png")),
    "javascript": lambda: asking(image_part("javascript:alert(1)")),
    "no scheme": lambda: asking(image_part("/etc/passwd")),
    "bad base64": lambda: asking(image_part("data:image/png;base64,@@@@")),
    "no base64": lambda: asking(image_part("data:image/png,abc")),
    "no comma": lambda: asking(image_part("data:image/png;base64")),
    "url of another type": lambda: asking(image_part(5)),
    "no url": lambda: asking({"type": "image_url", "image_url": {}}),
    "unknown part": lambda: asking({"type": "hologram", "hologram": {}}),
    "two pictures": lambda: asking(image_part(data_url("image/png", GOOD)), image_part(data_url("image/png", GOOD))),
    "picture and clip": lambda: asking(image_part(data_url("image/png", GOOD)), video_part(data_url("video/mp4", clip()))),
    "uuid without its picture": lambda: asking({"type": "image_url", "image_url": None, "uuid": "mine"}),
    "two placeholders": lambda: {"model": MODEL, "messages": [about(picture(0), "<image> or <image>?")]},
    "placeholder cut off": lambda: asking(image_part(data_url("image/png", GOOD))) | {"truncate_prompt_tokens": 3},
    "huge prompt": body(messages=[{"role": "user", "content": "word " * 100_000}]),
    "no messages": body(messages=[]),
    "messages of another type": body(messages="hi"),
    "unknown model": body(model="gpt-9"),
    "negative tokens": body(max_tokens=-1),
    "too many tokens": body(max_tokens=10**9),
    "temperature": body(temperature=-5),
    "log probabilities without end": body(logprobs=True, top_logprobs=10**6),
    "media options of one's own": body(media_io_kwargs={"video": {"video_backend": "opencv"}}),
}  # fmt: skip
RAW = {
    "deep json": ("/v1/chat/completions", b"[" * 200_000),
    "deep json in a field": ("/v1/chat/completions", b'{"model":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "no json": ("/v1/chat/completions", b"<html>"),
    "nothing": ("/v1/chat/completions", b""),
    "not utf-8": ("/v1/chat/completions", b'{"model": "\xff\xfe"}'),
    "ids out of range": ("/v1/completions", json.dumps({"model": MODEL, "prompt": [5, 10**6]}).encode()),
    "the placeholder's id": ("/v1/completions", json.dumps({"model": MODEL, "prompt": [5, -200]}).encode()),
    "embeddings": ("/v1/completions", json.dumps({"model": MODEL, "prompt_embeds": "AAAA"}).encode()),
    "no such address": ("/v1/nothing", b"{}"),
}
PLAIN_500 = {
    "png bomb", "gif bomb", "webp bomb", "file url", "file url of a clip", "loopback", "loopback by name",
    "loopback, IPv6", "unknown host", "no base64",
}  # fmt: skip
"""What plain `vllm serve` answers with an internal server error."""
OUTSIDE = {"metadata service", "private network"}
"""What plain `vllm serve` would look for in the network, for minutes where packets get lost."""


def posted(server, path, data):
    """(status, body) of a POST."""
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def refused(server, path, data):
    """The sentence of a 4xx."""
    status, answer = posted(server, path, data)
    assert 400 <= status < 500, (status, answer[:500])
    message = json.loads(answer)["error"]["message"]
    assert message.endswith((".", "?", "!")) and len(message) < 400, message
    assert not FORBIDDEN.search(message), message
    return message


def answers(server):
    """Whether a good request is answered."""
    return isinstance(server.ask([about(picture(1), "What is this?")], 2), str)


def test_there_are_enough():
    assert len(CHAT) + len(RAW) >= 40


@pytest.mark.parametrize("name", CHAT)
def test_hostile_conversations(server, name):
    refused(server, "/v1/chat/completions", json.dumps(CHAT[name]()).encode())
    assert answers(server)


@pytest.mark.parametrize("name", RAW)
def test_hostile_bodies(server, name):
    refused(server, *RAW[name])
    assert answers(server)


def test_a_polyglot_that_is_a_picture_is_read_as_one(server):
    sent = data_url("image/png", GOOD + b"PK\x03\x04<script>alert(1)</script>")
    clean = server.ask([about(data_url("image/png", GOOD), "What?")], 4)
    assert server.ask([about(sent, "What?")], 4) == clean


def test_memory_stays(server):
    """200 hostile requests leave less than 100 MB behind, in all of the server's processes."""

    def used():
        return sum(psutil.Process(pid).memory_info().rss for pid in (server.process.pid, *server.descendants()))

    bodies = [json.dumps(make()).encode() for make in CHAT.values()]
    assert answers(server)
    before = used()
    for n in range(200):
        posted(server, "/v1/chat/completions", bodies[n % len(bodies)])
    assert answers(server)
    assert used() - before < 100 * 2**20


@pytest.mark.slow
def test_plain_vllm_serves_too(start, model, host):
    """What docs/serving.md says of it: the same answers with the system message sent along, and these are errors of its own."""
    server = start(plain=True)
    said = server.ask([{"role": "system", "content": LLAMA_SYSTEM}, about(picture(1), "What is this?")], 8)
    assert said == model("llama31").ask(lmf.image(picture(1)), "What is this?", 8).rstrip("\ufffd")
    failed = {
        name
        for name, make in CHAT.items()
        if name not in OUTSIDE and posted(server, "/v1/chat/completions", json.dumps(make()).encode())[0] >= 500
    }
    assert failed == PLAIN_500
    fetched = asking(image_part(f"http://127.0.0.1:{host.server_port}/a.png"))
    assert posted(server, "/v1/chat/completions", json.dumps(fetched).encode())[0] == 200 and host.asked
    assert server.metric("llava_mini_cache_misses_total") == 0
    assert answers(server)


def test_formats_that_pass_are_pictures():
    """The makers above make what they say: the good ones open."""
    assert Image.open(io.BytesIO(GOOD)).size == (60, 45)
