"""What an MP4's index lists: never less than FFmpeg makes of it, and bombs are refused before FFmpeg sees them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from llava_mini_fast.preprocess import video
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.preprocess.mp4 import entries_listed
from llava_mini_fast.testing.serving import boxes, clip, mp4_bomb, rebuilt

av = pytest.importorskip("av")
ENOUGH = 10**9
SAMPLES = 48_000


def recorded(fmt="mp4", codec="mpeg4", sound=None, frames=50, **options):
    """A clip of grey, with some seconds of silence where `sound` names a codec."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=fmt, options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream(sound, rate=16000, layout="mono") if sound else None
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
        for at in range(0, SAMPLES if sound else 0, 1024):
            kind = "fltp" if sound == "aac" else "s16"
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32 if sound == "aac" else np.int16), kind, "mono"
            )
            frame.sample_rate, frame.pts = 16000, at
            container.mux(audio.encode(frame))
        if sound:
            container.mux(audio.encode(None))
    return buffer.getvalue()


def packets(blob):
    with av.open(io.BytesIO(blob)) as container:
        return sum(1 for packet in container.demux() if packet.size)


def listed(blob, enough=ENOUGH):
    return entries_listed(io.BytesIO(blob), enough)


def written(kind, *numbers):
    """A change for `rebuilt`: these big-endian words in place of a box's content."""
    return lambda found, content: struct.pack(f">{len(numbers)}I", *numbers) if found == kind else content


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sound": "aac"},
        {"fmt": "mov", "sound": "pcm_s16le"},
        {"movflags": "frag_keyframe+empty_moov+default_base_moof"},
        {"movflags": "frag_keyframe+empty_moov", "sound": "aac"},
    ],
    ids=str,
)
def test_as_many_as_there_are(options):
    blob = recorded(**options)
    parts = 320 + 40 * blob.count(b"moof")  # boxes count too
    assert packets(blob) <= listed(blob) <= packets(blob) + parts + SAMPLES // 160
    assert 20 < listed(blob, 20) < listed(blob)


def animation():
    buffer = io.BytesIO()
    first, *others = (Image.new("L", (8, 8), shade) for shade in range(9))
    first.save(buffer, "GIF", save_all=True, append_images=others)
    return buffer.getvalue()


OTHERS = {
    "matroska": lambda: recorded("matroska"),
    "avi": lambda: recorded("avi"),
    "mpegts": lambda: recorded("mpegts"),
    "webm": lambda: recorded("webm", "libvpx"),
    "gif": animation,
}


@pytest.mark.parametrize("fmt", OTHERS)
def test_other_formats_list_nothing(fmt):
    assert listed(OTHERS[fmt]()) < 20


def hidden(blob):
    """The index in a box named `free`, where FFmpeg finds it all the same."""
    out = b""
    for kind, content in boxes(blob):
        out += struct.pack(">I4s", 8 + len(content), b"free" if kind == b"moov" else kind) + content
    return out


def grown(blob):
    """A box ahead of the index that says it is longer than what holds it."""
    assert b"edts" in blob

    def change(kind, content):
        return struct.pack(">I4s", 2**31, b"skip") + content if kind == b"edts" else content

    return rebuilt(blob, change)


BOMBS = {
    "chunks": lambda: mp4_bomb(60_000_000),
    "fragments": lambda: rebuilt(
        recorded(movflags="frag_keyframe+empty_moov+default_base_moof"), written(b"trun", 1, 10**7, 0)
    ),
    "edits": lambda: rebuilt(recorded(), written(b"elst", 0, 200_000, *[2000, 0, 0x10000] * 200_000)),
    "pcm chunks": lambda: rebuilt(recorded("mov", sound="pcm_s16le"), written(b"stsc", 0, 1, 1, 2**31, 1)),
    "pcm chunks behind a first row that begins late": lambda: rebuilt(
        recorded("mov", sound="pcm_s16le"), written(b"stsc", 0, 1, 10**6, 2**31, 1)
    ),
    "in a free box": lambda: hidden(mp4_bomb(60_000_000)),
    "behind a box that is too long": lambda: grown(mp4_bomb(60_000_000)),
    "empty boxes": lambda: struct.pack(">I4s", 8, b"skip") * 2_100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_ffmpeg_reads_them(name, monkeypatch):
    monkeypatch.setattr(video, "_container", lambda file: pytest.fail("FFmpeg was asked"))
    with pytest.raises(MediaError, match="lists more than 8,000,000 packets"):
        next(video.decode(BOMBS[name]()))


def test_ffmpeg_finds_an_index_in_a_free_box():
    assert packets(hidden(clip())) == packets(clip())


def test_without_a_bound_ffmpeg_is_asked():
    assert list(video.decode(clip(), Limits(max_packets=None)))


def test_packets_are_counted_in_every_format():
    blob = recorded("matroska")
    assert list(video.decode(blob, Limits(max_packets=packets(blob) + 5)))
    with pytest.raises(MediaError, match="lists more than 30 packets"):
        next(video.decode(blob, Limits(max_packets=30)))


def test_the_same_bytes_over_and_over():
    with pytest.raises(MediaError, match="lists the same bytes over and over"):
        next(video.decode(mp4_bomb(1_000_000)))
