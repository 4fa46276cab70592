"""Draws examples/shapes.png and examples/moving.mp4: a picture and a clip that the demo model can be asked about.

python examples/draw.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_mini_fast.demo.data import write_clip
from llava_mini_fast.demo.scenes import FRAMES, Scene, Shape

HERE = Path(__file__).parent
SKY, SAND = ((206, 222, 236), (190, 208, 226)), ((186, 178, 150), (170, 164, 140))

SHAPES = Scene(
    (
        Shape("circle", "red", "large", 0.18, 0.2),
        Shape("square", "blue", "small", 0.5, 0.52),
        Shape("triangle", "yellow", "large", 0.82, 0.8),
    ),
    "stripes",
    SKY,
    grain=4,
)
BALL = Shape("circle", "red", "large", 0.2, 0.5)


def moments() -> np.ndarray:
    """The clip: a red circle on its way from left to right."""
    along = np.linspace(0.2, 0.75, FRAMES)
    scenes = [Scene((replace(BALL, x=round(float(x), 4)),), "checks", SAND, grain=2) for x in along]
    return np.stack([np.asarray(scene.picture()) for scene in scenes])


if __name__ == "__main__":
    SHAPES.picture().save(HERE / "shapes.png", optimize=True)
    write_clip(moments(), HERE / "moving.mp4")
    print(f"Drew {HERE / 'shapes.png'} and {HERE / 'moving.mp4'}.")
