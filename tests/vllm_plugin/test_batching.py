"""How much the front end runs for what vLLM asks of it."""

import pytest

from llava_mini_fast.vllm_plugin import prompt


def run(vllm, cases):
    answers = vllm.generate([case.prompt for case in cases], [len(case.row.tokens) for case in cases])
    assert [answer.tokens for answer in answers] == [case.row.tokens for case in cases]
    return vllm.call("counted")


@pytest.mark.parametrize(
    ("checkpoint", "name", "items", "views"),
    [
        ("llama31", "image", 2, 1),
        ("llama31", "multi_turn", 6, 1),
        ("llama31", "video", 2, 4),  # five frames, of which two are equal
        ("llama31_hd", "hd", 2, 5),
        ("llama31_hd", "hd_video", 2, 5),  # two equal frames of five views
    ],
)
def test_the_segments_of_a_prompt_run_the_tower_once(v1, goldens, checkpoint, name, items, views):
    case = goldens(checkpoint)[name]
    v1.start(case.case.checkpoint_directory())
    found = run(v1, [case])
    assert found == {"tower": [views], "embed": [items], "sound": [True]}


def test_prompts_of_one_batch_share_the_tower(v1, goldens):
    """Seven prompts about two pictures: one call of the front end, one run of the tower, two views."""
    cases = [case for case in goldens("llama31").values() if case.row.media_name in ("landscape.png", "portrait.png")]
    assert len(cases) == 8
    v1.start(cases[0].case.checkpoint_directory())
    found = run(v1, cases)
    assert found["tower"] == [2]
    assert len(found["embed"]) == 1


def test_a_second_question_runs_no_tower(v1, goldens):
    """The front end's own image cache, below vLLM's: rows are computed, frames are not."""
    cases = goldens("llama31")
    v1.start(cases["video"].case.checkpoint_directory())
    assert run(v1, [cases["image"]])["tower"] == [1]
    found = run(v1, [cases["image_other_question"], cases["multi_turn"]])
    assert found["tower"] == []
    assert sum(found["embed"]) > 0


def test_a_second_question_about_a_clip_runs_no_tower(v1, goldens, model):
    golden = goldens("llama31")["video"]
    v1.start(golden.case.checkpoint_directory())
    assert run(v1, [golden])["tower"] == [4]
    placeholder = golden.row.prompt_ids.index(-200)
    ids = [*golden.row.prompt_ids[: placeholder + 1], 198, 54, 706, 30]
    (answer,) = v1.generate([prompt(ids, golden.row.media)])
    assert answer.tokens == model("llama31").generate_ids(ids, golden.row.media)
    assert v1.call("counted")["tower"] == []
    vision_rows = placeholder + 5
    assert answer.cached >= vision_rows // 32 * 32
