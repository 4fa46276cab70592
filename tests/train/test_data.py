"""LLaVA-format files: prompts as they are asked, answers as labels, and sentences about what is wrong."""

import json

import pytest

from llava_mini_fast.demo.data import make_data
from llava_mini_fast.preprocess.prompt import prompt_ids
from llava_mini_fast.train.data import IGNORED, example, read_entries, tokenized

TURNS = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def test_prompts_are_those_that_are_asked(model):
    tokenizer = model("llama31").tokenizer
    ids, labels = tokenized(tokenizer, TURNS)
    asked, again = prompt_ids(tokenizer, TURNS[:1]), prompt_ids(tokenizer, TURNS[:3])
    assert ids[: len(asked)] == asked and ids[: len(again)] == again and ids.count(-200) == 1
    learned = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(learned) == "A cat.<|eot_id|>Yes.<|eot_id|>"
    assert len(ids) == len(labels) and all(label in (IGNORED, i) for i, label in zip(ids, labels))


def test_entries_of_the_demo_data(tmp_path, model):
    out = make_data(tmp_path / "data", 1, 1)
    entries = read_entries(out / "questions.json")
    picture, clip = (example(model("llama31").tokenizer, entry, out) for entry in entries)
    assert picture.media.kind == "image" and clip.media.kind == "video"
    assert -200 in picture.ids and any(label != IGNORED for label in clip.labels)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"image": "a.png"}, 'has no "conversations"'),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "must take turns"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "image": "a"}, "has 0 of <image> and 1 media"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}]}, "has 1 of <image> and 0 media"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "y"}], "image": "a", "video": "b"}, "about one medium"),
        ("text", 'has no "conversations"'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, entry, words):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=f"entry 0 of .*{words}"):
        read_entries(path)


def test_files_that_hold_no_conversations(tmp_path):
    path = tmp_path / "data.json"
    for text, words in (("{", "is not JSON"), ("[]", "must hold a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_entries(path)
