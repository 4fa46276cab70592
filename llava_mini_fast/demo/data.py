"""`llava-mini make-data`: pictures, clips and their questions as files, in the JSON that LLaVA's training reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from llava_mini_fast.demo.questions import CLIP_KINDS, about_clip, about_scene, caption
from llava_mini_fast.demo.scenes import SPLITS, Clip, Scene, draw_clip, draw_scene

FPS = 4
"""Of the clips' files: each moment is held for a second."""


def scenes(seed: int, split: str, count: int | None = None) -> Iterator[Scene]:
    """Scenes of one split, of one to four shapes or of `count`, endlessly, the same for the same seed.

    Raises:
        ValueError: an unknown split.
    """
    return _of_split(seed, split, lambda rng: draw_scene(rng, count))


def clips(seed: int, split: str) -> Iterator[Clip]:
    """Clips of one split, endlessly, their kinds in turn. Errors as in `scenes`."""
    kinds = iter(range(10**12))
    return _of_split(seed, split, lambda rng: draw_clip(rng, CLIP_KINDS[next(kinds) % len(CLIP_KINDS)]))


def _of_split(seed: int, split: str, draw: Callable[[Random], Any]) -> Iterator[Any]:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    rng = Random(seed)
    return (drawn for drawn in iter(lambda: draw(rng), None) if drawn.split == split)


def make_data(
    directory: str | Path,
    num_scenes: int,
    num_clips: int,
    split: str = "train",
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write `num_scenes` pictures and `num_clips` clips of one split, and what is asked about them.

    `directory` gets images/*.png, videos/*.mp4, captions.json (stage 1) and questions.json (stage 2). Entries have LLaVA's
    keys ("id", "image" or "video", "conversations") and "kinds", the kind of each question in turn.

    Args:
        directory: made where it isn't there; must be empty.
        progress: called with 1 for each picture or clip that is done.

    Returns:
        `directory`.

    Raises:
        ValueError: an unknown split, or a negative number.
        FileExistsError: the directory has files in it.
    """
    directory = Path(directory)
    if num_scenes < 0 or num_clips < 0:
        raise ValueError(f"the numbers of scenes and clips must be 0 or more; got {num_scenes} and {num_clips}.")
    drawn_scenes, drawn_clips = scenes(seed, split), clips(seed, split)
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; name a new directory.")
    for folder in ("images", "videos"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    rng, captions, questions = Random(seed), [], []
    for index in range(num_scenes):
        scene = next(drawn_scenes)
        name = f"images/{index:06d}.png"
        scene.picture().save(directory / name)
        captions.append(_entry(name, [("Describe the picture.", caption(scene))]))
        asked = about_scene(scene, rng)
        questions.append(_entry(name, [(q.text, q.answer) for q in asked], [q.kind for q in asked]))
        progress(1)
    for index in range(num_clips):
        clip = next(drawn_clips)
        name, asked = f"videos/{index:06d}.mp4", about_clip(clip, rng)
        write_clip(clip.frames(), directory / name)
        questions.append(_entry(name, [(asked.text, asked.answer)], [asked.kind]))
        progress(1)
    for name, entries in (("captions", captions), ("questions", questions)):
        (directory / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return directory


def write_clip(frames: np.ndarray, path: Path) -> None:
    """Frames (T, h, w, 3) uint8, h and w even, each held for a second, as an MP4 file."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            for _ in range(FPS):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _entry(name: str, turns: list[tuple[str, str]], kinds: list[str] | None = None) -> dict[str, Any]:
    said = [(who, text) for turn in turns for who, text in zip(("human", "gpt"), turn)]
    said[0] = ("human", f"<image>\n{said[0][1]}")
    entry = {
        "id": Path(name).with_suffix("").as_posix(),
        "image" if name.endswith(".png") else "video": name,
        "conversations": [{"from": who, "value": text} for who, text in said],
    }
    return entry | ({"kinds": kinds} if kinds else {})
