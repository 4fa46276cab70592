"""The model runner V2, which is the default on GPUs: its kernels run in Triton's interpreter (see v2shim/README.md).

A token takes so long there that each test stays under 64 of them; the goldens' first tokens stand for the rest.
"""

import pytest

from llava_mini_fast.vllm_plugin import prompt

BLOCK = 32


MOST = 63
"""Tokens of a test."""


def wrong(vllm, cases, budget=MOST):
    """Names of the cases whose first tokens, `budget` together, differ from the published ones."""
    steps = min(16, max(1, budget // len(cases)))
    wanted = [min(steps, len(case.row.tokens)) for case in cases]
    answers = vllm.generate([case.prompt for case in cases], wanted)
    return [case.name for case, answer in zip(cases, answers) if not case.matches(answer.tokens, steps)]


def test_it_is_v2(v1, v2, checkpoint):
    v2.start(checkpoint("llama31"))
    v1.start(checkpoint("llama31"))
    *classes, kernel = v2.call("runner")
    assert "vllm.v1.worker.gpu.model_runner" in classes and kernel == "triton.runtime.interpreter"
    assert "vllm.v1.worker.gpu.model_runner" not in v1.call("runner")


def test_prefix_caching(v2, goldens):
    cases = goldens("llama31")
    v2.start(cases["image"].case.checkpoint_directory())
    for name, cached in (("image", 0), ("image_other_question", 128), ("image_other_image", 0), ("image", 128)):
        (answer,) = v2.generate([cases[name].prompt], 15)
        assert answer.tokens == cases[name].row.tokens[:15]
        assert answer.cached == cached


def test_goldens_in_one_batch(v2, cases):
    cases[0].start(v2)
    assert wrong(v2, cases) == []


@pytest.mark.slow
def test_goldens_one_at_a_time_and_again_from_the_prefix_cache(v2, cases):
    cases[0].start(v2)
    for _ in range(2):
        assert [case.name for case in cases if wrong(v2, [case], MOST // 2 // len(cases))] == []


def test_sampling_and_grammars_run(v2, checkpoint, goldens):
    """What the shim's two repairs are for."""
    case = goldens("vicuna")["vicuna"]
    v2.start(checkpoint("vicuna"))
    (sampled,) = v2.generate([case.prompt], 4, temperature=1.0, top_p=0.9, top_k=20, seed=1)
    assert len(sampled.tokens) == 4
    (chosen,) = v2.generate([case.prompt], 8, choice=["red", "blue"])
    assert chosen.text in ("red", "blue")


def squeezed(v2, cases):
    """Names of the cases that go wrong in chunks of 64 tokens, beside a text request that grows until one is sent away."""
    blocks = [-(-len(case.row.fused) // BLOCK) for case in cases]
    cases[0].start(
        v2,
        max_model_len=(max(blocks) + 1) * BLOCK,
        enable_prefix_caching=False,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        num_gpu_blocks_override=1 + 1 + sum(blocks[:2]),
    )
    before = v2.call("metric", "vllm:num_preemptions")
    growing = prompt(range(100, 124))
    steps = [len(case.row.tokens) for case in cases]
    answers = v2.generate([growing, *[case.prompt for case in cases]], [14, *steps], ignore_eos=True)
    assert v2.call("metric", "vllm:num_preemptions") > before
    return [case.name for case, answer in zip(cases, answers[1:]) if not case.matches(answer.tokens)]


def test_chunked_prefill_and_preemption(v2, goldens):
    """The encoder outputs of the three don't fit beside one another."""
    by_name = goldens("llama31")
    assert squeezed(v2, [by_name[name] for name in ("multi_turn", "image_other_image", "video")]) == []


@pytest.mark.slow
def test_every_golden_in_chunks_and_preempted(v2, cases):
    """Three at a time, the longest first."""
    cases = sorted(cases, key=lambda case: -len(case.row.fused))
    for start in range(0, len(cases), 3):
        three = cases[start : start + 3]
        assert squeezed(v2, three * (3 // len(three))) == []
