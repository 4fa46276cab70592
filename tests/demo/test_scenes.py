"""The demo model's data: answers that fit what is drawn, splits that share nothing, files that our own loaders read."""

import json
from dataclasses import replace
from itertools import islice
from random import Random

import numpy as np
import pytest

import llava_mini_fast as lmf
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.demo.data import clips, make_data, scenes
from llava_mini_fast.demo.questions import CLIP_KINDS, KINDS, PICTURE_KINDS, about_clip, about_scene, caption
from llava_mini_fast.demo.scenes import COLOURS, DIRECTIONS, FRAMES, SIZE, Scene, Shape, draw_clip, draw_scene
from llava_mini_fast.preprocess.views import views

RED_CIRCLE = Shape("circle", "red", "large", 0.2, 0.2)
BLUE_SQUARE = Shape("square", "blue", "small", 0.8, 0.5)
SCENE = Scene((RED_CIRCLE, BLUE_SQUARE), "plain", ((200, 200, 180), (200, 200, 180)), 1)


def answers(scene, kind):
    """Every question of a kind that the scene is asked, with its answer."""
    return {q.text: q.answer for seed in range(60) for q in about_scene(scene, Random(seed)) if q.kind == kind}


def test_answers_fit_the_scene():
    assert answers(SCENE, "colour") == {"What colour is the circle?": "red", "What colour is the square?": "blue"}
    assert answers(SCENE, "shape") == {"Which shape is red?": "circle", "Which shape is blue?": "square"}
    assert answers(SCENE, "place") == {"Where is the red circle?": "top left", "Where is the blue square?": "right"}
    counts = answers(SCENE, "count")
    assert counts["How many shapes are there?"] == "two" and counts["How many crosses are there?"] == "no"
    asked = answers(SCENE, "yes/no")
    assert asked["Is there a red circle?"] == "yes" and asked["Is there a blue circle?"] == "no"
    compared = answers(SCENE, "compare")
    for word in ("larger", "further left", "higher"):
        for names in ("the red circle or the blue square", "the blue square or the red circle"):
            assert compared[f"Which is {word}, {names}?"] == "red circle"
    assert caption(SCENE) == "A large red circle at the top left and a small blue square at the right."


def test_what_differs_too_little_is_not_compared():
    beside = replace(BLUE_SQUARE, y=0.22)
    assert {text.split(",")[0] for text in answers(replace(SCENE, shapes=(RED_CIRCLE, beside)), "compare")} == {
        "Which is larger", "Which is further left",
    }  # fmt: skip
    near = replace(beside, size="large", x=0.3)
    assert not answers(replace(SCENE, shapes=(RED_CIRCLE, near)), "compare")


def test_pictures_show_what_is_said():
    picture = np.asarray(SCENE.picture()).astype(int)
    assert picture.shape == (SIZE, SIZE, 3)
    for shape in SCENE.shapes:
        assert tuple(picture[int(shape.y * SIZE), int(shape.x * SIZE)]) == COLOURS[shape.colour]
    assert tuple(picture[-1, 0]) == (200, 200, 180)
    for scene in islice(scenes(3, "train"), 40):
        drawn = np.asarray(scene.picture()).astype(int)
        for shape in scene.shapes:
            assert tuple(drawn[int(shape.y * SIZE), int(shape.x * SIZE)]) == COLOURS[shape.colour]


def test_every_kind_is_asked():
    kinds = {q.kind for scene in islice(scenes(0, "train"), 30) for q in about_scene(scene, Random(0))}
    kinds |= {about_clip(clip, Random(0)).kind for clip in islice(clips(0, "train"), 3)}
    assert kinds == set(KINDS) == set(PICTURE_KINDS + CLIP_KINDS)


def test_clips_do_what_their_answers_say():
    for seed in range(20):
        rng = Random(seed)
        moving = draw_clip(rng, "direction")
        first, last = moving.scenes[0].shapes[0], moving.scenes[-1].shapes[0]
        moved = np.sign([round(last.x - first.x, 3), round(last.y - first.y, 3)])
        assert tuple(moved) == DIRECTIONS[moving.answer]
        order = draw_clip(rng, "order")
        seen = [[shape.name for shape in scene.shapes] for scene in order.scenes]
        assert len(seen) == FRAMES and next(names for names in seen if names) == [order.answer] and len(seen[-1]) == 2
        change = draw_clip(rng, "change")
        assert change.scenes[-1].shapes[0].colour == change.answer != change.scenes[0].shapes[0].colour
    with pytest.raises(ValueError, match="kind must be 'direction'"):
        draw_clip(Random(0), "dance")


def test_splits_share_no_scene():
    found = {
        split: {scene.digest for scene in islice(scenes(7, split), 60)} for split in ("train", "validation", "held_out")
    }
    assert not set.intersection(*found.values()) and sum(map(len, found.values())) == 180
    assert all(scene.split == "held_out" for scene in islice(scenes(8, "held_out"), 5))
    assert draw_scene(Random(5)).digest == draw_scene(Random(5)).digest != draw_scene(Random(6)).digest
    with pytest.raises(ValueError, match="split must be one of train, validation, held_out"):
        scenes(0, "test")


def test_files_are_llavas_and_read_by_our_loaders(tmp_path):
    done = []
    out = make_data(tmp_path / "data", 2, 1, "held_out", seed=4, progress=done.append)
    assert done == [1, 1, 1]
    questions, captions = (json.loads((out / f"{name}.json").read_text()) for name in ("questions", "captions"))
    assert len(questions) == 3 and len(captions) == 2
    for entry in questions:
        said = entry["conversations"]
        assert said[0]["value"].startswith("<image>\n") and [turn["from"] for turn in said] == ["human", "gpt"] * (
            len(said) // 2
        )
        assert len(entry["kinds"]) == len(said) // 2 and (out / entry.get("image", entry.get("video"))).is_file()
    config = LlavaMiniConfig.from_dict({
        "model_type": "llava_mini_llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 100, "mm_vision_tower": "clip", "image_aspect_ratio": "pad",
    })  # fmt: skip
    assert views(lmf.video(out / questions[2]["video"]), config).num_frames == FRAMES
    with pytest.raises(FileExistsError, match="is not empty"):
        make_data(out, 1, 1)
    with pytest.raises(ValueError, match="must be 0 or more"):
        make_data(tmp_path / "other", -1, 0)
