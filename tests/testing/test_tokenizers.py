import pytest

from llava_mini_fast.testing.tokenizers import make_sentencepiece

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


def test_special_ids_are_vicunas(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0x0A>"]) == [0, 1, 2, 3, 13]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_space_is_marked_at_the_start_and_a_newline_is_a_byte(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("What is").input_ids) == ["<s>", "▁What", "▁is"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("\nA").input_ids)[:3] == ["<s>", "▁", "<0x0A>"]


@pytest.mark.parametrize("text", ["What is in this picture?", "naïve ☃ 42", "two  spaces\n"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_same_every_time(tmp_path):
    first, second = (make_sentencepiece(tmp_path / name) / "tokenizer.model" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
