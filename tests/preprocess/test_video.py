"""Clips: which frames, in which containers, and what is said about those that are damaged. Clips are drawn here."""

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.preprocess.video import decode, frame_indices, frame_rate, frames, resize_nearest

av = pytest.importorskip("av")
GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def draw(tmp_path):
    """Makes the bytes of a clip whose frames tell their number by their gray level, 5 * i."""

    def draw(
        count=50,
        fmt="mp4",
        codec="mpeg4",
        rate=10,
        size=(64, 48),
        ms=None,
        turn=0,
        sound=False,
        index_first=True,
        pix="yuv420p",
        **options,
    ):
        path = tmp_path / f"clip.{fmt}"
        with av.open(str(path), "w", format=fmt, options={"movflags": "faststart"} if index_first else {}) as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = *size, pix
            stream.bit_rate = 4_000_000
            if turn:
                stream.set_display_rotation(turn)
            if ms:
                stream.codec_context.time_base = Fraction(1, 1000)
            audio = container.add_stream("aac", rate=16000) if sound else None
            container.start_encoding()
            for i in range(count):
                pixels = np.full((size[1], size[0], 3), 5 * i % 256, np.uint8)
                pixels[: size[1] // 4, : size[0] // 4] = (255, 0, 0)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if ms:
                    frame.pts, frame.time_base = ms(i), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if audio:
                silence = np.zeros((1, 1024), np.float32)
                for i in range(20):
                    frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                    frame.sample_rate, frame.pts = 16000, 1024 * i
                    container.mux(audio.encode(frame))
                container.mux(audio.encode(None))
        return path.read_bytes()

    return draw


def numbers(source, limits=None) -> list[int]:
    """The numbers of the frames that were taken, read from their gray levels."""
    return [round(float(frame[-40:, -40:].mean()) / 5) for frame in frames(source, limits)]


RECORDED = json.loads((GOLDENS / "preprocess.json").read_text())["frame_indices"]


@pytest.mark.parametrize("key", RECORDED)
def test_recorded_frame_indices(key):
    total, fps = key.split("@")
    assert frame_indices(int(total), float(fps)) == RECORDED[key]


def test_frame_indices_by_hand():
    assert frame_indices(315, 30000 / 1001) == [15, 47, 78, 110, 141, 172, 204, 235, 267, 298]
    assert frame_indices(315, 30000 / 1001, cap=5) == [31, 94, 157, 219, 282]
    assert frame_indices(2, 1) == [0, 0]
    assert frame_indices(1, 30) == [0]
    assert frame_indices(20, 30) == [9], "shorter than a second: the middle frame"
    assert frame_indices(5, 0.001) == [0, 1, 2, 2, 3], "never more than there are"
    for total, fps in ((0, 25), (10, 0), (10, float("nan"))):
        with pytest.raises(ValueError, match="total must be at least 1 and fps above 0"):
            frame_indices(total, fps)


def test_frame_rate():
    assert frame_rate(Fraction(30000, 1001), 100, 50.0) == pytest.approx(29.97, abs=0.001)
    assert frame_rate(None, 100, 50.0) == 2.0
    with pytest.warns(UserWarning, match="doesn't state its frame rate; 25 frames a second are assumed"):
        assert frame_rate(0, 100, None) == 25.0


@pytest.mark.parametrize("height", [1, 2, 3, 167, 168, 335, 336, 337, 480, 671, 672, 673, 719, 1080, 1344, 2160])
def test_resize_equals_torch_interpolate(height):
    width = height * 4 // 3 + 1
    frame = np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)
    expected = torch.nn.functional.interpolate(torch.from_numpy(frame).permute(2, 0, 1)[None].float(), size=(336, 336))
    ours = resize_nearest(frame)
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, expected[0].permute(1, 2, 0).to(torch.uint8).numpy())


CONTAINERS = {
    "mp4": {},
    "h264": {"codec": "libx264"},
    "matroska": {"fmt": "matroska"},
    "vp8": {"fmt": "webm", "codec": "libvpx", "deadline": "realtime"},
    "vp9": {"fmt": "webm", "codec": "libvpx-vp9", "deadline": "realtime"},
    "avi": {"fmt": "avi"},
    "mpegts": {"fmt": "mpegts"},
    "gif": {"fmt": "gif", "codec": "gif", "pix": "rgb8"},
    "sound too": {"sound": True},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, draw):
    options = CONTAINERS[name]
    if options.get("codec", "mpeg4") not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {options['codec']}")
    taken = numbers(draw(**options))
    slack = 6 if name == "gif" else 0  # the palette has few grays
    assert len(taken) == 5
    assert np.abs(np.array(taken) - frame_indices(50, 10)).max() <= slack


def test_vp8s_hidden_frames_are_not_counted(draw):
    if "libvpx" not in av.codecs_available:
        pytest.skip("this PyAV has no encoder libvpx")
    data = bytearray(draw(**CONTAINERS["vp8"]))
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for number in (20, 21, 22, 23, 24, 25):
        data[data.index(packets[number])] &= ~0x10  # the bit that shows the frame
    shown = [number for number in range(50) if not 20 <= number <= 25]
    assert numbers(bytes(data)) == [shown[i] for i in frame_indices(44, 10)]


def test_paths_and_bytes_are_the_same(draw, tmp_path):
    data = draw()
    (tmp_path / "copy").write_bytes(data)
    for a, b in zip(frames(data), frames(tmp_path / "copy"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frames_come_before_the_clip_is_read_through(draw, monkeypatch):
    import llava_mini_fast.preprocess.video as module

    seen = []
    decoded = module._decoded
    monkeypatch.setattr(module, "_decoded", lambda *args: (seen.append(1) or frame for frame in decoded(*args)))
    stream = frames(draw())
    next(stream)
    assert len(seen) == frame_indices(50, 10)[0] + 1
    stream.close()


def test_short_clips(draw):
    assert numbers(draw(count=1)) == [0]
    assert numbers(draw(count=7)) == [3]
    assert numbers(draw(count=10)) == [4]
    assert numbers(draw(count=2, rate=1)) == [0, 0]


def test_fractional_rate(draw):
    assert numbers(draw(count=60, rate=Fraction(30000, 1001))) == frame_indices(60, 30000 / 1001)


def test_variable_rate_takes_the_average(draw):
    # 20 frames at 50 a second, then 20 at 5 a second: 4.4 s and about 9 frames a second.
    data = draw(count=40, fmt="mp4", rate=50, ms=lambda i: 20 * i if i < 20 else 400 + 200 * (i - 20))
    taken = numbers(data)
    assert taken == frame_indices(40, 9.09)


def test_unknown_rate_is_derived(draw, monkeypatch):
    import llava_mini_fast.preprocess.video as module

    asked = []
    monkeypatch.setattr(module, "frame_rate", lambda stated, *rest: asked.append(stated) or frame_rate(None, *rest))
    assert numbers(draw()) == frame_indices(50, 10)
    assert asked == [10]


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_clip_is_turned_upright(draw, turn):
    frame = next(decode(draw(count=1, size=(64, 48), turn=turn)))
    assert frame.shape == ((64, 48, 3) if turn in (90, -90) else (48, 64, 3))
    # The red corner starts at the top left and turns counterclockwise.
    y, x = {0: (2, 2), 90: (-3, 2), 180: (-3, -3), -90: (2, -3)}[turn]
    assert frame[y, x, 0] > 150 and frame[y, x, 1] < 90


CUT = r"cut off or damaged: the \d+ frames before the damage are used"


@pytest.mark.parametrize("name", ["mp4", "matroska", "avi", "vp8"])
def test_cut_off(name, draw):
    if CONTAINERS[name].get("codec", "mpeg4") not in av.codecs_available:
        pytest.skip("no encoder")
    data = draw(**CONTAINERS[name])
    with pytest.warns(UserWarning, match=CUT) as caught:
        taken = numbers(data[: len(data) * 7 // 10])
    kept = int(str(caught[0].message).split("the ")[1].split()[0])
    assert 10 <= kept < 50
    assert taken == frame_indices(kept, 10)


def test_damaged_in_the_middle(draw):
    data = bytearray(draw(codec="mjpeg", pix="yuvj420p", fmt="matroska"))
    middle = len(data) * 6 // 10
    data[middle : middle + 800] = bytes(800)
    with pytest.warns(UserWarning, match="damaged"):
        taken = numbers(bytes(data))
    assert 1 <= len(taken) <= 4 and taken == sorted(taken) and max(taken) < 40


def test_all_chosen_frames_behind_the_damage(draw, monkeypatch):
    import llava_mini_fast.preprocess.video as module

    decoded = module._decoded
    monkeypatch.setattr(module, "_decoded", lambda *args: (frame for _, frame in zip(range(3), decoded(*args))))
    with pytest.warns(UserWarning, match="damaged: 3 of 9 frames can be decoded, and those are used"):
        assert numbers(draw(count=9)) == [1]
    monkeypatch.setattr(module, "_decoded", lambda *args: iter(()))
    with pytest.raises(MediaError, match="No frame of the clip can be decoded"):
        numbers(draw(count=9))


def test_cut_off_before_the_first_frame(draw):
    data = draw(count=9, codec="mjpeg", pix="yuvj420p")
    start = data.index(b"mdat") + 4
    with pytest.raises(MediaError, match="cut off before its first frame"):
        numbers(data[: start + 4])


def test_index_cut_off(draw):
    with pytest.raises(MediaError, match=r"not a video that can be read: .*, or its index is cut off"):
        numbers(draw(index_first=False)[:-200])


def test_no_frames(draw):
    with pytest.raises(MediaError, match="has no frames"):
        numbers(draw(count=0, fmt="avi"))


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone(cover, tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    with pytest.raises(MediaError, match="no video stream"):
        numbers(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_picture_as_video(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, kind)
    with pytest.raises(MediaError, match=rf"is a picture \({kind}\), not a video; give it as an image"):
        numbers(buffer.getvalue())


@pytest.mark.parametrize("data", [b"not a video at all " * 50, b"\0" * 4096])
def test_not_a_video(data):
    with pytest.raises(MediaError, match=r"not a video that can be read: it is in no supported format \(MP4"):
        numbers(data)


def test_playlists_open_no_other_file(draw, tmp_path):
    (tmp_path / "secret.ts").write_bytes(draw(fmt="mpegts"))
    playlists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n",
    ]
    for text in playlists:
        (tmp_path / "list.m3u8").write_text(text)
        for source in (text.encode(), tmp_path / "list.m3u8"):
            with pytest.raises(MediaError, match="not a video that can be read"):
                numbers(source)


def test_empty_missing_folder(tmp_path):
    with pytest.raises(MediaError, match="The clip is empty"):
        numbers(b"")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.mp4"):
        numbers(tmp_path / "absent.mp4")
    with pytest.raises(MediaError, match="is a folder; a clip is given"):
        numbers(tmp_path)


def test_limits(draw):
    data = draw()
    assert numbers(data, Limits(max_frames=2)) == frame_indices(50, 10, cap=2)
    with pytest.raises(MediaError, match="gives 5 frames; at most 2 frames are allowed"):
        numbers(data, Limits(max_frames=2, thin_frames=False))
    with pytest.raises(MediaError, match=r"is longer than 3 s, the most that is allowed"):
        numbers(data, Limits(max_seconds=3))
    with pytest.raises(MediaError, match=r"clip's frame is 64 x 48 \(3,072 pixels\); at most 1,000"):
        numbers(data, Limits(max_pixels=1000))
    with pytest.raises(MediaError, match=r"The clip has [\d,]+ bytes; at most 100 bytes"):
        numbers(data, Limits(max_bytes=100))


def test_chosen_frames():
    levels = [np.full((20, 30, 3), 40 * i, np.uint8) for i in range(3)]
    expected = [np.full((336, 336, 3), 40 * i, np.uint8) for i in range(3)]
    for source in (np.stack(levels), torch.from_numpy(np.stack(levels)), levels, [Image.fromarray(f) for f in levels]):
        np.testing.assert_array_equal(list(frames(source)), expected)
    with pytest.raises(MediaError, match="gives 3 frames; at most 2"):
        list(frames(levels, Limits(max_frames=2)))
    with pytest.raises(MediaError, match="at most 100 pixels"):
        list(frames(levels, Limits(max_pixels=100)))
