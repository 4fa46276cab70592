"""The demo model's recipe, start to end at a tiny size: what is trained loads, answers, and goes on where it stopped."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast.demo import ablations, recipe
from llava_mini_fast.demo.fresh import make_tokenizer
from llava_mini_fast.demo.lessons import Album, Lessons
from llava_mini_fast.demo.questions import FACTS
from llava_mini_fast.demo.scenes import COLOURS, DIRECTIONS, PLACES, SHAPES
from llava_mini_fast.demo.tower import TARGETS
from llava_mini_fast.demo.tutor import Tutored
from llava_mini_fast.train.data import IGNORED

pytest.importorskip("accelerate", reason="the extra `train` is not installed")
PARTS = (recipe.Part(1, 1e-3, patches=100, turns=2, clips=1), recipe.Part(1, 1e-3))
TINY = recipe.Plan(tower_steps=2, tower_batch=2, scenes=6, clips=3, parts=PARTS, batch=3, save_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    recipe.train_demo(folder, TINY)
    return folder


@pytest.fixture
def engine(folder):
    return recipe.unpacked(folder / "trained")


@pytest.fixture
def album(folder, engine):
    return recipe.make_album(folder / "album", engine, TINY.scenes, TINY.clips)


def test_every_word_of_an_answer_is_one_token(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    words = [*SHAPES, *COLOURS, *DIRECTIONS, "yes", "no", "two", "middle", "top"]
    for word in (*words, *(f" {name}" for name in (*SHAPES, *COLOURS))):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    for text in (*PLACES, *(fact.text for fact in FACTS), "Zürich?"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_what_is_made_loads_and_is_small(folder):
    model = lmf.load(folder / "model")
    assert model.config.num_compressed == 1 and model.front.vision_tower.width == model.config.mm_hidden_size == 128
    assert isinstance(model.ask(None, FACTS[0].text, 4), str)
    weights = sum(path.stat().st_size for path in (folder / "model").rglob("*.safetensors"))
    assert weights <= 8 * 2**20
    assert isinstance(json.loads((folder / "losses.json").read_text()), list)


def test_a_finished_run_is_not_run_again(folder, monkeypatch):
    monkeypatch.setattr(recipe, "learn", lambda *_, **__: pytest.fail("trained again"))
    assert recipe.train_demo(folder, TINY) == folder / "model"


def test_an_album_holds_the_towers_features_once_a_picture(album, engine, tmp_path):
    shown = [*album.scenes, *(scene for clip in album.clips for scene in clip.scenes)]
    rows = album.frames(shown)
    assert set(rows) == set(range(len({scene.digest for scene in shown}))) and len(set(rows)) < len(rows)
    pixels = torch.from_numpy(np.asarray(shown[7].picture()).copy()).permute(2, 0, 1)[None]
    from llava_mini_fast.preprocess.views import normalize

    wanted = engine.front.vision_tower(normalize(pixels, torch.float32))
    assert torch.allclose(album.features([rows[7]])[0], wanted, atol=1e-2)


def test_an_album_goes_on_where_it_was_cut_off(album, engine, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_mini_fast.demo.lessons.CHUNK", 2)
    tower, calls = engine.front.vision_tower, []

    def until_the_third(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tower(pixels)

    until_the_third.width = tower.width
    with pytest.raises(KeyboardInterrupt):
        Album(tmp_path, until_the_third, album.scenes, album.clips)
    counted = []
    again = Album(tmp_path, tower, album.scenes, album.clips, progress=counted.append)
    rows = album.frames(album.scenes)
    assert counted[0] == 4 and torch.allclose(again.features(rows), album.features(rows), atol=1e-2)


def test_lessons_ask_anew_each_epoch_and_share_frames(album, engine):
    lessons = Lessons(album, [*album.scenes, *album.clips], engine.tokenizer, epochs=2)
    assert len(lessons) == 2 * (TINY.scenes + TINY.clips)
    first, again = lessons[0], lessons[TINY.scenes + TINY.clips]
    assert first.frames == again.frames and first.conversations != again.conversations
    assert first == lessons[0] and len(first.conversations) == 2
    made = lessons.collate([lessons[0], lessons[TINY.scenes]])
    assert [len(frames) for frames in made["frames"]] == [1, 1, 5] and made["frames"][0] == made["frames"][1]
    assert made["features"].shape[1:] == (1, 576, 128)
    answers = [label for label in made["labels"][0].tolist() if label != IGNORED]
    assert engine.tokenizer.decode(answers).count("<|eot_id|>") == 3


def test_a_tutor_asks_what_names_mean(album, engine):
    lessons = Lessons(album, album.scenes, engine.tokenizer, turns=6)
    asked = 0
    for scene, lesson in zip(album.scenes, (lessons[n] for n in range(len(album.scenes)))):
        shapes = {shape.name: shape for shape in scene.shapes}
        for (ids, labels), notes in zip(lesson.conversations, lesson.notes):
            for place, classes in notes:
                assert labels[place] == IGNORED, "a name in a question, not in an answer"
                words = engine.tokenizer.decode(ids[place - 1 : place + 1]).split()
                named = shapes.get(" ".join(words)) or next(
                    (s for s in scene.shapes if words[-1] in (s.shape, s.colour)), None
                )
                wanted = (
                    [values.index(getattr(named, key)) + 1 for key, values in TARGETS.items()]
                    if any(classes)
                    else [0] * 4
                )
                assert list(classes) == wanted
                asked += 1
    assert asked > 20


def test_a_tutors_questions_are_in_the_loss_and_reach_pre_fusion(album, engine):
    torch.manual_seed(0)
    model, lessons = Tutored(engine), Lessons(album, [*album.scenes, *album.clips], engine.tokenizer, patches=100)
    made = lessons.collate([lessons[0], lessons[TINY.scenes]])
    assert made["features"].shape == (len(made["kept"]), 1, 100, 128)
    out = model(**made)
    plain = model(**made | {"notes": [[] for _ in made["notes"]]})
    assert "tutor" not in plain and torch.allclose(out["loss"], plain["loss"] + out["tutor"])
    out["loss"].backward()
    assert all(
        weight.grad.abs().sum() > 0 for weight in (model.tutor.weight, model.front.prefusion_layers[0].qkv_proj.weight)
    )


def test_ablations_leave_out_what_they_say(folder, engine, album):
    lessons = Lessons(album, album.scenes, engine.tokenizer)
    made = lessons.collate([lessons[0]])
    rows = {
        model: [len(one) for one in model(engine).fused_rows(made["input_ids"], made["labels"], made["frames"], features=made["features"])]
        for model in (Tutored, ablations.WithoutCompression, ablations.WithoutPreFusion)
    }  # fmt: skip
    assert rows[ablations.WithoutPreFusion] == rows[Tutored]
    assert [n - 575 for n in rows[ablations.WithoutCompression]] == rows[Tutored]
    plain = ablations.WithoutPreFusion(engine)
    (fused, _) = plain.fused_rows(made["input_ids"], made["labels"], made["frames"], features=made["features"])
    ids = made["input_ids"][0]
    place = (ids == -200).nonzero().item()
    embedded = engine.llm.get_input_embeddings()(ids[place + 1 :])
    assert torch.equal(fused[place + 1 :], embedded)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(folder, tmp_path):
    """kill -9 between two saved steps; the same command then ends with the same weights, bit for bit."""
    command = [
        sys.executable,
        "-P",
        "-c",
        f"from llava_mini_fast.demo.recipe import *; train_demo(Path({str(tmp_path)!r}), {TINY!r})",
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while (
        not (tmp_path / "stage2" / "part-2" / "checkpoint-2" / "trainer_state.json").is_file() and child.poll() is None
    ):
        assert time.monotonic() < end
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (tmp_path / "trained" / "config.json").is_file(), "it was over before it could be killed"
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0
    whole, resumed = (one / "trained" / "model.safetensors" for one in (folder, tmp_path))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
def test_ablations_end_to_end(folder, tmp_path):
    rows = ablations.run(folder, (1, 1), 6, TINY, ablations.VARIANTS[3:])
    assert [row["vision_rows"] for row in rows] == [1, 576] and json.dumps(rows)
    assert rows == ablations.run(folder, (1, 1), 6, TINY, ablations.VARIANTS[3:]), (
        "finished variants are not trained again"
    )
    with pytest.raises(SystemExit):
        ablations.main([str(tmp_path / "nothing")])
