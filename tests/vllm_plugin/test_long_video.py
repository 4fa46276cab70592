"""Rows fused outside vLLM, for clips that its limits don't admit."""

import pytest
import torch

from llava_mini_fast.vllm_plugin import embeds_prompt


def test_prompt_embeddings_give_the_published_tokens(v1, goldens, model):
    golden = goldens("llama31")["video"]
    rows = model("llama31").embed(golden.row.prompt_ids, golden.row.media)
    v1.start(golden.case.checkpoint_directory(), enable_prompt_embeds=True)
    (answer,) = v1.generate([embeds_prompt(rows)], len(golden.row.tokens))
    assert answer.tokens == golden.row.tokens
    assert v1.call("counted")["embed"] == []  # no front end ran in vLLM


def test_rows_must_be_rows():
    with pytest.raises(ValueError, match=r"rows must be \(rows, H\); got \(1, 3, 4\)"):
        embeds_prompt(torch.zeros(1, 3, 4))
