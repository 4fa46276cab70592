"""Tokens equal to the published code's, in every way that vLLM may cut, order, cache and repeat the work."""

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.vllm_plugin import prompt
from llava_mini_fast.vllm_plugin.segments import ids_of_segment, spans

CHECKPOINTS = ("llama31", "llama31_c2", "llama31_hd", "tower_inside", "vicuna")
BLOCK = 32
SMALL_STEPS = {"enable_prefix_caching": False, "max_num_batched_tokens": 64, "max_num_seqs": 16}


def wrong(goldens, answers):
    """Names of the cases whose tokens differ from the published ones."""
    assert len(goldens) == len(answers)
    return [golden.name for golden, answer in zip(goldens, answers) if not golden.matches(answer.tokens)]


def lengths(goldens):
    return [len(golden.row.tokens) for golden in goldens]


def ask(vllm, goldens):
    goldens = list(goldens)
    return vllm.generate([golden.prompt for golden in goldens], lengths(goldens))


def segments(case):
    """What tells the case's multimodal items apart from those of other cases, and the rows of each."""
    row = case.row
    if row.media is None:
        return {}
    turn_ends = LlavaMiniConfig.from_pretrained(case.case.checkpoint_directory()).eos_token_ids
    num_vision = len(row.fused) - len(row.prompt_ids) + 1
    cuts = spans(row.prompt_ids, row.prompt_ids.index(-200), num_vision, turn_ends)
    return {
        (row.media_name, start, *ids_of_segment(row.prompt_ids, stop, num_vision)): stop - start for start, stop in cuts
    }


def test_every_case_is_run_or_listed(goldens):
    run = [name for checkpoint in CHECKPOINTS for name in goldens(checkpoint)]
    assert len(set(run)) == 19  # and `truncated`, which only the raw door takes: see test_bad_input.py


def test_one_at_a_time_and_in_one_batch(v1, cases):
    alone = []
    for case in cases:
        case.start(v1)
        alone += ask(v1, [case])
    assert wrong(cases, alone) == []
    cases[0].start(v1)
    assert wrong(cases[::-1], ask(v1, cases[::-1])) == []


def test_prefix_caching_with_repeats(v1, cases):
    cases[0].start(v1)
    assert wrong(cases, ask(v1, cases)) == []
    mixed = cases + cases[::-1]
    again = ask(v1, mixed)
    assert wrong(mixed, again) == []
    for case, answer in zip(mixed, again):
        # every full block, up to the last row: something must be run to sample from
        assert answer.cached == (len(case.row.fused) - 1) // BLOCK * BLOCK, case.name


def test_chunked_prefill(v1, cases):
    cases = cases * -(-65 // sum(len(case.row.fused) for case in cases))  # more than one step in any case
    cases[0].start(v1, **SMALL_STEPS)
    assert wrong(cases, ask(v1, cases)) == []


def test_preemption(v1, cases):
    """Text requests that came first grow while two cases run that had filled the cache to its last block."""
    first, *cases = sorted(cases, key=lambda case: -len(case.row.fused))
    # the two that get in each other's way show different media, and so share no item
    cases = [first, *sorted(cases, key=lambda case: case.row.media_name == first.row.media_name)]
    items = {item: rows for case in cases for item, rows in segments(case).items()}
    cases *= -(-3 // len(cases))
    blocks = [-(-len(case.row.fused) // BLOCK) for case in cases]
    # one block each, and one more after 4, 6, ... 26 tokens: enough to send both cases away
    growing = [prompt(range(100, 100 + length)) for length in range(29, 5, -2)]
    context = (max(blocks) + 1) * BLOCK  # the encoder cache holds so many rows, less than two long cases
    cases[0].start(
        v1,
        max_model_len=context,
        **SMALL_STEPS,
        num_gpu_blocks_override=1 + len(growing) + blocks[0] + blocks[1],
    )
    before = v1.call("metric", "vllm:num_preemptions")
    prompts = growing + [case.prompt for case in cases]
    answers = v1.generate(prompts, [30] * len(growing) + lengths(cases), ignore_eos=True)
    assert wrong(cases, answers[len(growing) :]) == []
    assert v1.call("metric", "vllm:num_preemptions") > before
    embedded = sum(v1.call("counted")["embed"])
    if sum(items.values()) > 2 * context:
        assert embedded > len(items)  # some had left the encoder cache and were computed again
