"""Pictures: the same pixels as vLLM's loader, bit for bit CLIP's resize, sentences for what can't be read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.preprocess import image as module
from llava_mini_fast.preprocess.image import PAD_COLOR, image_views, load_rgb, square_view
from llava_mini_fast.preprocess.limits import Limits, MediaError

ORIENTATION = 0x0112


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(width * 31 + height).randint(0, 256, (height, width, channels)).astype(np.uint8)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(width, height))


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


def hole(mode: str) -> Image.Image:
    """A picture with an alpha channel that runs from clear to opaque."""
    image = picture(40, 30).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))))
    return image.convert(mode)


FILES = {
    "RGB": lambda: encode(picture(40, 30)),
    "1x1": lambda: encode(picture(1, 1)),
    "3x3": lambda: encode(picture(3, 3)),
    "L": lambda: encode(picture(40, 30).convert("L")),
    "1": lambda: encode(picture(40, 30).convert("1")),
    "P": lambda: encode(picture(40, 30).convert("P")),
    "P transparent": lambda: encode(picture(40, 30).quantize(16), transparency=3),
    "L transparent": lambda: encode(picture(40, 30).convert("L"), transparency=90),
    "RGB transparent": lambda: encode(Image.new("RGB", (9, 9), (1, 2, 3)), transparency=(1, 2, 3)),
    "RGBA": lambda: encode(hole("RGBA")),
    "LA": lambda: encode(hole("LA")),
    "RGBA webp": lambda: encode(hole("RGBA"), "WEBP", lossless=True),
    "CMYK": lambda: encode(picture(40, 30).convert("CMYK"), "JPEG"),
    "CMYK tiff": lambda: encode(picture(40, 30).convert("CMYK"), "TIFF"),
    "F": lambda: encode(picture(40, 30).convert("F"), "TIFF"),
    "I;16": lambda: encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))),
    "jpeg upside": lambda: encode(picture(40, 30), "JPEG", exif=rotated_exif()),
    "png upside": lambda: encode(picture(40, 30), exif=rotated_exif()),
    "tiff upside": lambda: encode(picture(40, 30), "TIFF", exif=rotated_exif()),
    "RGBA upside": lambda: encode(hole("RGBA"), exif=rotated_exif()),
    "animated gif": lambda: encode(picture(40, 30), "GIF", save_all=True, append_images=[picture(40, 30)] * 2),
    "animated webp": lambda: encode(picture(40, 30), "WEBP", save_all=True, append_images=[picture(40, 30)] * 2),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_vllms_loader(name, tmp_path):
    loader = pytest.importorskip("vllm.multimodal.media.image").ImageMediaIO()
    data = FILES[name]()
    expected = np.asarray(loader.load_bytes(data).media)
    ours = load_rgb(data)
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), expected)
    path = tmp_path / "picture"
    path.write_bytes(data)
    np.testing.assert_array_equal(np.asarray(load_rgb(str(path))), expected)
    np.testing.assert_array_equal(np.asarray(load_rgb(Image.open(io.BytesIO(data)))), expected)


@pytest.mark.parametrize("name", FILES)
def test_as_published_is_convert_alone(name):
    data = FILES[name]()
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_rgb(data, as_published=True)), np.asarray(expected))


def test_exif_and_alpha_by_hand():
    original = picture(40, 30)
    upright = load_rgb(encode(original, exif=rotated_exif()))
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(original), -1))
    clear = Image.new("RGBA", (5, 4), (10, 20, 30, 0))
    assert np.asarray(load_rgb(clear)).min() == 255
    assert np.asarray(load_rgb(clear, as_published=True))[0, 0].tolist() == [10, 20, 30]


def test_callers_picture_stays_as_it_was():
    original = picture(40, 30)
    original.getexif()[ORIENTATION] = 6
    assert load_rgb(original).size == (30, 40)
    assert original.size == (40, 30) and original.getexif()[ORIENTATION] == 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason_to_refuse():
    assert load_rgb(encode(picture(40, 30), "JPEG", exif=b"Exif\0\0II*\0broken")).size == (40, 30)


def test_arrays():
    pixels = noise(8, 6)
    np.testing.assert_array_equal(np.asarray(load_rgb(pixels)), pixels)
    np.testing.assert_array_equal(np.asarray(load_rgb(torch.from_numpy(pixels))), pixels)
    np.testing.assert_array_equal(np.asarray(load_rgb(pixels[::-1, ::2])), pixels[::-1, ::2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(kind):
    data = encode(picture(200, 150), kind)
    for share in (0.3, 0.7):
        with pytest.raises(MediaError, match=r"damaged|not a picture"):
            load_rgb(data[: int(len(data) * share)])


def test_truncated_says_so():
    data = encode(picture(200, 150))
    with pytest.raises(MediaError, match="The picture is truncated or damaged"):
        load_rgb(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"hello, I am text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0" * 500])
def test_not_a_picture(data):
    with pytest.raises(MediaError, match="not a picture that can be read; readable formats are AVIF, BMP"):
        load_rgb(data)


def test_formats_that_start_other_programs_are_not_opened():
    with pytest.raises(MediaError, match="not a picture"):
        load_rgb(encode(picture(8, 8), "EPS"))


def test_empty_missing_folder(tmp_path):
    with pytest.raises(MediaError, match="The picture is empty"):
        load_rgb(b"")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.png"):
        load_rgb(str(tmp_path / "absent.png"))
    with pytest.raises(MediaError, match="is a folder; a picture is given as the path of a file"):
        load_rgb(str(tmp_path))


def test_size_is_refused_before_decoding(monkeypatch):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self))
    limits = Limits(max_pixels=1000)
    with pytest.raises(MediaError, match=r"The picture is 40 x 30 \(1,200 pixels\); at most 1,000 pixels are allowed"):
        load_rgb(encode(picture(40, 30)), limits=limits)
    assert not decoded
    for source in (picture(40, 30), noise(40, 30)):
        with pytest.raises(MediaError, match="at most 1,000 pixels"):
            load_rgb(source, limits=limits)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("side", "size"), [(30_000, "900,000,000 pixels"), (10_000, r"10000 x 10000 \(100,000,000")])
def test_bomb(side, size):
    bomb = bytearray(encode(Image.new("1", (side, 1))))
    bomb[20:24] = side.to_bytes(4, "big")
    bomb[29:33] = __import__("zlib").crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(MediaError, match=f"{size}.*; at most [0-9,]+ pixels are allowed"):
        load_rgb(bytes(bomb))


def test_long_sides_and_large_files():
    with pytest.raises(MediaError, match="70000 x 1; at most 65,535 pixels a side"):
        load_rgb(Image.new("RGB", (70_000, 1)))
    with pytest.raises(MediaError, match=r"has \d+ bytes; at most 10 bytes"):
        load_rgb(encode(picture(4, 4)), limits=Limits(max_bytes=10))


def clip_processor():
    transformers = pytest.importorskip("transformers")
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    return transformers.CLIPImageProcessorPil(do_rescale=False, do_normalize=False, **size)


def padded(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


SIZES = [(1, 1), (2, 3), (3, 3), (5, 1), (1, 7), (77, 101), (336, 336), (337, 335), (335, 337), (100, 336), (672, 672),
         (640, 480), (481, 641), (1000, 667), (900, 9), (7, 1200), (3000, 1), (2, 2500)]  # fmt: skip


@pytest.mark.parametrize(("band", "tall"), [(1 << 22, 16), (1000, 1), (1 << 22, 1 << 20)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_square_view_equals_clip_processor(size, band, tall, monkeypatch):
    monkeypatch.setattr(module, "_BAND_PIXELS", band)
    monkeypatch.setattr(module, "_TALL", tall)
    image, processor = picture(*size), clip_processor()
    expected = torch.from_numpy(processor(padded(image))["pixel_values"][0])
    assert torch.equal(square_view(image, pad=True), expected)
    if max(size) <= 400 * min(size):
        expected = torch.from_numpy(processor(image)["pixel_values"][0])
        assert torch.equal(square_view(image, pad=False), expected)


def test_thin_picture_is_never_padded_at_full_size(monkeypatch):
    largest = 0
    new, resize = Image.new, Image.Image.resize

    def spy_new(mode, size, *rest):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return new(mode, size, *rest)

    def spy_resize(self, size, *rest):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *rest)

    monkeypatch.setattr(Image, "new", spy_new)
    monkeypatch.setattr(Image.Image, "resize", spy_resize)
    for size in ((20_000, 100), (100, 20_000), (65_535, 1), (1, 40_000)):
        view = square_view(new("RGB", size, (200, 100, 50)), pad=True)
        assert view[:, 0, 0].tolist() == list(PAD_COLOR)
    assert largest <= 65_535 * 336
    square_view(new("RGB", (20_000, 100)), pad=False)
    with pytest.raises(MediaError, match="2000 x 1; its longer side may be at most 1,024 times the shorter"):
        square_view(new("RGB", (2000, 1)), pad=False)
    assert largest <= 65_535 * 336


def config(ratio: int, aspect: str | None = "pad") -> LlavaMiniConfig:
    return LlavaMiniConfig.from_dict(
        {"model_type": "llava_mini_llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 1, "vocab_size": 10, "mm_vision_tower": "clip", "resolution_ratio": ratio,
         "image_aspect_ratio": aspect}
    )  # fmt: skip


@pytest.mark.parametrize("aspect", ["pad", None])
@pytest.mark.parametrize("size", [(77, 101), (640, 480), (2, 2), (3, 5)])
def test_tiles(size, aspect):
    image = picture(*size)
    views = image_views(image, config(2, aspect))
    assert views.shape == (5, 3, 336, 336) and views.dtype == torch.uint8
    width, height = size[0] // 2, size[1] // 2
    boxes = [(x, y, x + width, y + height) for y in (0, height) for x in (0, width)]
    for view, box in zip(views[:4], boxes, strict=True):
        assert torch.equal(view, square_view(image.crop(box), aspect == "pad"))
    assert torch.equal(views[4], image_views(image, config(1, aspect))[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (8, 1)])
def test_tiles_of_a_side_of_one_pixel_are_not_empty(size):
    image = picture(*size)
    views = image_views(image, config(2))
    assert views.shape == (5, 3, 336, 336)
    if size == (1, 1):
        assert all(torch.equal(view, views[4]) for view in views)
    if size == (1, 8):
        assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
