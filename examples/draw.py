"""Draws examples/shapes.png and examples/moving.mp4: a picture and a clip to ask about.

python examples/draw.py
"""

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SKY, GRASS = (214, 230, 244), (142, 180, 120)
RED, BLUE, YELLOW = (214, 48, 44), (44, 92, 200), (244, 196, 48)
FPS, SECONDS, WIDTH, HEIGHT = 24, 5, 336, 240


def shapes() -> Image.Image:
    """A red circle, a blue square and a yellow triangle that stand on the ground."""
    picture = Image.new("RGB", (640, 480), SKY)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 330, 640, 480), fill=GRASS)
    pen.ellipse((60, 190, 220, 350), fill=RED)
    pen.rectangle((270, 210, 410, 350), fill=BLUE)
    pen.polygon([(460, 350), (600, 350), (530, 200)], fill=YELLOW)
    return picture


def moment(t: float) -> Image.Image:
    """The clip at t (0 to 1): a red ball on its way from left to right, past a blue square."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), SKY)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 170, WIDTH, HEIGHT), fill=GRASS)
    pen.rectangle((140, 60, 200, 120), fill=BLUE)
    x = 30 + t * (WIDTH - 60)
    pen.ellipse((x - 25, 130, x + 25, 180), fill=RED)
    return picture


def draw_clip(path: Path) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FPS * SECONDS):
            pixels = np.asarray(moment(i / (FPS * SECONDS - 1)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    shapes().save(HERE / "shapes.png", optimize=True)
    draw_clip(HERE / "moving.mp4")
    print(f"Drew {HERE / 'shapes.png'} and {HERE / 'moving.mp4'}.")
