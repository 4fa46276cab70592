"""What a request may take from earlier ones, and what it must not."""

from llava_mini_fast.vllm_plugin import prompt

BLOCK = 32


def ask(vllm, golden):
    (answer,) = vllm.generate([golden.prompt], len(golden.row.tokens))
    return answer


def first_segment(golden):
    """Rows up to the last vision row."""
    row = golden.row
    return row.prompt_ids.index(-200) + len(row.fused) - len(row.prompt_ids) + 1


def test_another_question_reuses_the_first_segment(v1, goldens):
    cases = goldens("llama31")
    v1.start(cases["image"].case.checkpoint_directory())
    first, other = cases["image"], cases["image_other_question"]
    assert ask(v1, first).tokens == first.row.tokens
    covered = first_segment(other) // BLOCK * BLOCK
    assert covered == 128
    v1.call("counted")
    answer = ask(v1, other)
    assert answer.tokens == other.row.tokens
    assert answer.cached >= covered
    assert sum(v1.call("counted")["embed"]) == 1  # the question's own segment


def test_the_next_turn_reuses_all_turns_before(v1, goldens):
    golden = goldens("llama31")["multi_turn"]
    v1.start(golden.case.checkpoint_directory())
    assert ask(v1, golden).tokens == golden.row.tokens
    again = ask(v1, golden)
    assert again.tokens == golden.row.tokens
    assert again.cached == (len(golden.row.fused) - 1) // BLOCK * BLOCK


def test_the_same_question_about_another_image_reuses_nothing(v1, goldens):
    cases = goldens("llama31")
    v1.start(cases["image"].case.checkpoint_directory())
    first, other = cases["image"], cases["image_other_image"]
    assert first.row.prompt_ids == other.row.prompt_ids
    assert ask(v1, first).tokens == first.row.tokens
    answer = ask(v1, other)
    assert answer.tokens == other.row.tokens
    # the item begins with the prompt, and its pixels are in the hash of its first block
    assert answer.cached == 0


def test_text_shares_no_blocks_with_images(v1, goldens):
    """The stand-in ids of vision rows are ordinary text for a request that has no image."""
    golden = goldens("llama31")["image"]
    v1.start(golden.case.checkpoint_directory())
    with_image = ask(v1, golden)
    (text,) = v1.generate([prompt(with_image.prompt)])
    assert text.cached == 0
    assert text.tokens != with_image.tokens
    assert ask(v1, golden).tokens == golden.row.tokens


def test_without_the_prompt_ids_in_the_hash_the_goldens_fail(v1, goldens):
    """Negative control: what the other tests rest on."""
    cases = list(goldens("llama31").values())
    directory = cases[0].case.checkpoint_directory()
    v1.start(directory)
    v1.call("leave_ids_out_of_the_hash")
    answers = [ask(v1, golden) for golden in cases]
    differ = [golden.name for golden, answer in zip(cases, answers) if answer.tokens != golden.row.tokens]
    assert "image_other_question" in differ
    v1.start(directory)
    assert [golden.name for golden in cases if ask(v1, golden).tokens != golden.row.tokens] == []
