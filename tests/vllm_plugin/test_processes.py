"""vLLM as it runs by default, the engine in a process of its own, and here two ranks that each hold half of the LLM."""

import os

import pytest


@pytest.fixture(scope="module")
def vllm(runner):
    cores = sorted(os.sched_getaffinity(0))[:2]
    yield from runner(
        "processes",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, cores)) if len(cores) > 1 else "nobind",
    )


@pytest.mark.parametrize("checkpoint", ["llama31", pytest.param("vicuna", marks=pytest.mark.slow)])
def test_two_tensor_parallel_ranks(vllm, goldens, checkpoint):
    cases = list(goldens(checkpoint).values())
    vllm.start(
        cases[0].case.checkpoint_directory(),
        tensor_parallel_size=2,
        max_num_batched_tokens=128,
    )
    for order in (cases, cases[::-1]):  # the second time from the caches on both sides of the engine's door
        answers = vllm.generate([case.prompt for case in order], [len(case.row.tokens) for case in order])
        assert [case.name for case, answer in zip(order, answers) if answer.tokens != case.row.tokens] == []
