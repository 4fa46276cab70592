"""Scenes of coloured shapes, drawn from a seed: what the demo model learns from and is judged on.

A scene is data; its picture and its answers follow from it. Its split follows from its own digest, so that no scene is in
two splits, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 336
"""Side of a picture in pixels: the vision tower's input, so that nothing is resized."""
COLOURS = {
    "red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 210), "yellow": (244, 208, 40),
    "purple": (140, 60, 170), "orange": (244, 130, 30), "white": (246, 246, 246), "black": (24, 24, 24),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.075, "large": 0.125}
"""Half the side of a shape, as a share of the picture's."""
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""The ninths of a picture, row by row."""
GROUNDS = ("plain", "stripes", "checks", "noise")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPLITS = {"train": 0.9, "validation": 0.95, "held_out": 1.0}
"""Upper end of each split's share of all digests."""
FRAMES = 5
"""Moments of a clip, one a second: what the published frame rule takes of its file."""
_OVERSAMPLING = 2
"""Edges are drawn this much larger and averaged, as a camera would."""


@dataclass(frozen=True)
class Shape:
    """One shape; x and y are its centre, from 0 to 1, rightwards and downwards."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The ninth of the picture that holds the centre, of `PLACES`."""
        return PLACES[min(int(self.y * 3), 2) * 3 + min(int(self.x * 3), 2)]


@dataclass(frozen=True)
class Scene:
    """Shapes on a ground: `tints` are the ground's two colours, `grain` the seed of its texture."""

    shapes: tuple[Shape, ...]
    ground: str
    tints: tuple[tuple[int, int, int], tuple[int, int, int]]
    grain: int

    @property
    def digest(self) -> str:
        """Hex digest of everything that can be seen."""
        return _digest(asdict(self))

    @property
    def split(self) -> str:
        return split_of(self.digest)

    def picture(self) -> Image.Image:
        """(336, 336) RGB."""
        side = SIZE * _OVERSAMPLING
        ground = self._ground().resize((side, side), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(ground)
        for shape in self.shapes:
            draw_shape(pen, shape, side, COLOURS[shape.colour])
        return ground.resize((SIZE, SIZE), Image.Resampling.BOX)

    def _ground(self) -> Image.Image:
        rng, steps = np.random.default_rng(self.grain), np.arange(SIZE)
        if self.ground == "plain":
            share = np.zeros((SIZE, SIZE))
        elif self.ground == "noise":
            share = rng.random((SIZE, SIZE))
        else:
            width = int(rng.integers(10, 30))
            bands = steps // width % 2
            both = bands[:, None] ^ bands if self.ground == "checks" else np.broadcast_to(bands, (SIZE, SIZE))
            share = both if rng.random() < 0.5 else both.T
        first, second = (np.array(tint, dtype=np.float64) for tint in self.tints)
        return Image.fromarray((first + share[..., None] * (second - first)).round().astype(np.uint8))


@dataclass(frozen=True)
class Clip:
    """What happens to a scene: `kind` says what, `scenes` are its moments.

    "direction": the first shape moves by `answer`. "order": two shapes appear one after the other, the one named by `answer`
    first. "change": the first shape's colour becomes `answer`.
    """

    kind: str
    answer: str
    scenes: tuple[Scene, ...]

    @property
    def digest(self) -> str:
        return _digest([self.kind, *(scene.digest for scene in self.scenes)])

    @property
    def split(self) -> str:
        return split_of(self.digest)

    def frames(self) -> np.ndarray:
        """(moments, 336, 336, 3) uint8."""
        return np.stack([np.asarray(scene.picture()) for scene in self.scenes])


def split_of(digest: str) -> str:
    """ "train", "validation" or "held_out", for good."""
    share = int(digest[:8], 16) / 2**32
    return next(name for name, end in SPLITS.items() if share < end)


def draw_scene(rng: Random, count: int | None = None) -> Scene:
    """One to four shapes (or `count`) that don't touch, no two of one colour and shape."""
    count = count or rng.randint(1, 4)
    names = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
    while True:
        shapes = [Shape(*name, rng.choice(tuple(SIZES)), *_centre(rng)) for name in names]
        if all(_apart(a, b) for i, a in enumerate(shapes) for b in shapes[:i]):
            return Scene(tuple(shapes), *_ground_for(rng, {colour for _, colour in names}))


def draw_clip(rng: Random, kind: str) -> Clip:
    """A clip in which one thing happens.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "direction":
        scene, direction = draw_scene(rng, 1), rng.choice(tuple(DIRECTIONS))
        (dx, dy), reach = DIRECTIONS[direction], rng.uniform(0.4, 0.6)
        start = rng.uniform(0.15, 0.85 - reach)
        (shape,) = scene.shapes

        def at(step: int) -> Scene:
            along = start + reach * step / (FRAMES - 1)
            x = shape.x if not dx else along if dx > 0 else 1 - along
            y = shape.y if not dy else along if dy > 0 else 1 - along
            return replace(scene, shapes=(replace(shape, x=round(x, 4), y=round(y, 4)),))

        return Clip(kind, direction, tuple(at(step) for step in range(FRAMES)))
    if kind == "order":
        scene = draw_scene(rng, 2)
        first = rng.randrange(2)
        one, two = sorted(rng.sample(range(1, FRAMES), 2))

        def seen(step: int) -> Scene:
            shown = [i for i in (0, 1) if step >= (one if i == first else two)]
            return replace(scene, shapes=tuple(scene.shapes[i] for i in shown))

        return Clip(kind, scene.shapes[first].name, tuple(seen(step) for step in range(FRAMES)))
    if kind == "change":
        scene = draw_scene(rng, 1)
        (shape,) = scene.shapes
        taken = {shape.colour, *_colours_like(scene.tints)}
        colour = rng.choice([name for name in COLOURS if name not in taken])
        after, when = replace(scene, shapes=(replace(shape, colour=colour),)), rng.randint(1, FRAMES - 1)
        return Clip(kind, colour, tuple(after if step >= when else scene for step in range(FRAMES)))
    raise ValueError(f"kind must be 'direction', 'order' or 'change', not {kind!r}.")


def _centre(rng: Random) -> tuple[float, float]:
    """Well inside a ninth of the picture, so that its place has one name."""
    return tuple(round((rng.randrange(3) + rng.uniform(0.3, 0.7)) / 3, 4) for _ in range(2))


def _apart(a: Shape, b: Shape) -> bool:
    gap = SIZES[a.size] + SIZES[b.size] + 0.02
    return max(abs(a.x - b.x), abs(a.y - b.y)) > gap


def _ground_for(rng: Random, colours: set[str]) -> tuple[str, tuple, int]:
    """A ground on which every one of the colours stands out."""
    while True:
        base = [rng.randint(70, 225) for _ in range(3)]
        tints = tuple(tuple(min(255, max(0, c + rng.randint(-28, 28))) for c in base) for _ in range(2))
        if not colours & _colours_like(tints):
            return rng.choice(GROUNDS), tints, rng.randrange(2**31)


def _colours_like(tints) -> set[str]:
    return {name for name, rgb in COLOURS.items() if any(math.dist(rgb, tint) < 110 for tint in tints)}


def draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, side: int, fill: int | tuple[int, int, int]) -> None:
    """Draw a shape on a picture of `side` x `side` pixels."""
    x, y, r = shape.x * side, shape.y * side, SIZES[shape.size] * side
    if shape.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape.shape == "triangle":
        pen.polygon([(x - r, y + 0.9 * r), (x + r, y + 0.9 * r), (x, y - r)], fill=fill)
    else:
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
