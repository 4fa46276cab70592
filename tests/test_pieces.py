"""Streamed text: at once, without spaces, across characters of several tokens, and complete."""

import pytest
import torch

from llava_mini_fast.pieces import Pieces


@pytest.mark.parametrize(
    "text", ["What is this?", "nospacesinthisone", "naïve 猫 🙂 end", " leading", "<|eot_id|>after"]
)
def test_the_pieces_are_the_text(model, text):
    tokenizer = model("llama31").tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Pieces(tokenizer)
    pieces.put(torch.empty(1, 0, dtype=torch.long))
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    found = list(pieces)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(found) > 1 or len(ids) < 3


def test_half_a_character_at_the_end(model):
    tokenizer = model("llama31").tokenizer
    ids = tokenizer.encode("a猫", add_special_tokens=False)[:-1]
    pieces = Pieces(tokenizer)
    pieces.put(torch.tensor(ids))
    pieces.end()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
