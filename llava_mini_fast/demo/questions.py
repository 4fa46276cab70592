"""Questions and answers about scenes and clips, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from llava_mini_fast.demo.scenes import COLOURS, SHAPES, SIZES, Clip, Scene, Shape

PICTURE_KINDS = ("colour", "shape", "count", "place", "yes/no", "compare")
CLIP_KINDS = ("direction", "order", "change")
KINDS = PICTURE_KINDS + CLIP_KINDS
NUMBERS = ("no", "one", "two", "three", "four")
NEAR = 0.15
"""Centres in the same column or row of ninths are no further apart than this, as a share of the picture."""


@dataclass(frozen=True)
class Question:
    """What is asked and what is right, in a few words."""

    kind: str
    text: str
    answer: str
    names: tuple[tuple[str, Shape | None], ...] = ()
    """Words of the text that name a shape, and the shape that they name, if there is one: what a tutor may ask about."""


FACTS = (
    Question("text", "How many sides does a triangle have?", "three"),
    Question("text", "How many sides does a square have?", "four"),
    Question("text", "Which shapes do you know?", "circle, square, triangle and cross"),
    Question("text", "Which colours do you know?", f"{', '.join(list(COLOURS)[:-1])} and {list(COLOURS)[-1]}"),
    Question("text", "What are you?", "a small model that knows coloured shapes"),
)
"""All that is asked without a picture."""


def caption(scene: Scene) -> str:
    """One sentence that says all that is to be seen."""
    seen = [f"a {s.size} {s.name} at the {s.place}" for s in scene.shapes]
    return f"{', '.join(seen[:-1])} and {seen[-1]}".removeprefix(" and ").capitalize() + "."


def about_scene(scene: Scene, rng: Random) -> list[Question]:
    """One question of every kind that the scene can be asked, in random order."""
    makers = (_colour, _shape, _count, _place, _yes_no, _compare)
    found = [question for make in makers if (question := make(scene, rng)) is not None]
    rng.shuffle(found)
    return found


def about_clip(clip: Clip, rng: Random) -> Question:
    """The question that the clip was made for."""
    if clip.kind == "direction":
        shape = clip.scenes[0].shapes[0]
        text = rng.choice((f"Which way does the {shape.shape} move?", f"Where does the {shape.name} go?"))
    elif clip.kind == "order":
        names = [shape.name for shape in clip.scenes[-1].shapes]
        rng.shuffle(names)
        text = f"Which appears first, the {names[0]} or the {names[1]}?"
    else:
        text = f"What colour does the {clip.scenes[0].shapes[0].shape} become?"
    return Question(clip.kind, text, clip.answer)


def _only(scene: Scene, attribute: str, rng: Random) -> Shape | None:
    """A shape that its colour, or its form, alone tells apart."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    alone = [shape for shape, value in zip(scene.shapes, values) if values.count(value) == 1]
    return rng.choice(alone) if alone else None


def _colour(scene: Scene, rng: Random) -> Question | None:
    shape = _only(scene, "shape", rng)
    return shape and Question("colour", f"What colour is the {shape.shape}?", shape.colour, ((shape.shape, shape),))


def _shape(scene: Scene, rng: Random) -> Question | None:
    shape = _only(scene, "colour", rng)
    return shape and Question("shape", f"Which shape is {shape.colour}?", shape.shape, ((shape.colour, shape),))


def _count(scene: Scene, rng: Random) -> Question:
    if rng.random() < 0.5:
        return Question("count", "How many shapes are there?", NUMBERS[len(scene.shapes)])
    form = rng.choice(SHAPES)
    return Question(
        "count", f"How many {_plural(form)} are there?", NUMBERS[sum(s.shape == form for s in scene.shapes)]
    )


def _place(scene: Scene, rng: Random) -> Question:
    shape = rng.choice(scene.shapes)
    return Question("place", f"Where is the {shape.name}?", shape.place, ((shape.name, shape),))


def _yes_no(scene: Scene, rng: Random) -> Question:
    shapes = {shape.name: shape for shape in scene.shapes}
    if rng.random() < 0.5:
        name = rng.choice(sorted(shapes))
    else:
        # a colour and a form that are both to be seen, apart, make the harder half of the noes
        seen = [f"{a.colour} {b.shape}" for a in scene.shapes for b in scene.shapes]
        everything = [f"{colour} {form}" for colour in COLOURS for form in SHAPES]
        other = [name for name in (seen if rng.random() < 0.5 else everything) if name not in shapes]
        name = rng.choice(other or [n for n in everything if n not in shapes])
    answer = "yes" if name in shapes else "no"
    return Question("yes/no", f"Is there a {name}?", answer, ((name, shapes.get(name)),))


def _compare(scene: Scene, rng: Random) -> Question | None:
    """Of two shapes that differ enough: another size, or centres in other columns or rows of ninths."""
    if len(scene.shapes) < 2:
        return None
    a, b = rng.sample(scene.shapes, 2)
    more = {"larger": SIZES[a.size] - SIZES[b.size], "further left": b.x - a.x, "higher": b.y - a.y}
    words = [word for word, lead in more.items() if abs(lead) > (0 if word == "larger" else NEAR)]
    if not words:
        return None
    word = rng.choice(words)
    text = f"Which is {word}, the {a.name} or the {b.name}?"
    return Question("compare", text, (a if more[word] > 0 else b).name, ((a.name, a), (b.name, b)))


def _plural(form: str) -> str:
    return f"{form}es" if form.endswith("s") else f"{form}s"
