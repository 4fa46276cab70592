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


def wrong(vllm, cases):
    """Names of the cases whose tokens on two ranks differ from the published ones."""
    cases[0].start(vllm, tensor_parallel_size=2, max_num_batched_tokens=128)
    found = []
    for order in (cases, cases[::-1]):  # the second time from the caches on both sides of the engine's door
        answers = vllm.generate([case.prompt for case in order], [len(case.row.tokens) for case in order])
        found += [case.name for case, answer in zip(order, answers) if not case.matches(answer.tokens)]
    return found


def test_two_tensor_parallel_ranks(vllm, goldens):
    assert wrong(vllm, list(goldens("llama31").values())) == []


@pytest.mark.slow
def test_two_tensor_parallel_ranks_on_every_checkpoint(vllm, cases):
    assert wrong(vllm, cases) == []
