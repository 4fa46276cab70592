"""The model runner V2, which is the default on GPUs: its kernels run in Triton's interpreter (see v2shim/README.md).

A token takes so long there that each test stays under 64 of them; the goldens' first tokens stand for the rest.
"""

import pytest

from llava_mini_fast.vllm_plugin import prompt

BLOCK = 32


def wrong(vllm, cases, steps):
    """Names of the cases whose first tokens differ from the published ones."""
    answers = vllm.generate([case.prompt for case in cases], steps)
    return [case.name for case, answer in zip(cases, answers) if answer.tokens != case.row.tokens[:steps]]


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


@pytest.mark.parametrize("checkpoint", ["llama31", "llama31_c2", "llama31_hd", "tower_inside", "vicuna"])
def test_goldens(v2, goldens, checkpoint):
    cases = list(goldens(checkpoint).values())
    v2.start(cases[0].case.checkpoint_directory())
    assert wrong(v2, cases, min(16, 63 // len(cases))) == []


def test_sampling_and_grammars_run(v2, checkpoint, goldens):
    """What the shim's two repairs are for."""
    case = goldens("vicuna")["vicuna"]
    v2.start(checkpoint("vicuna"))
    (sampled,) = v2.generate([case.prompt], 4, temperature=1.0, top_p=0.9, top_k=20, seed=1)
    assert len(sampled.tokens) == 4
    (chosen,) = v2.generate([case.prompt], 8, choice=["red", "blue"])
    assert chosen.text in ("red", "blue")


def test_chunked_prefill_and_preemption(v2, goldens):
    """A text request grows into the last block while cases run whose encoder outputs don't fit beside one another."""
    by_name = goldens("llama31")
    cases = [by_name[name] for name in ("multi_turn", "image_other_image", "video")]
    blocks = [-(-len(case.row.fused) // BLOCK) for case in cases]
    v2.start(
        cases[0].case.checkpoint_directory(),
        max_model_len=256,
        enable_prefix_caching=False,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        num_gpu_blocks_override=1 + 1 + blocks[0] + blocks[1],
    )
    growing = prompt(range(100, 124))
    before = v2.call("metric", "vllm:num_preemptions")
    answers = v2.generate([growing, *[case.prompt for case in cases]], [14, 16, 16, 16], ignore_eos=True)
    assert [answer.tokens for answer in answers[1:]] == [case.row.tokens for case in cases]
    assert v2.call("metric", "vllm:num_preemptions") > before
