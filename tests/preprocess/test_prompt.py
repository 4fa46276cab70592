"""Templates, the placeholder, and ids: equal to the published ones."""

import json
import random
from pathlib import Path

import pytest

from llava_mini_fast.preprocess import prompt as prompts
from llava_mini_fast.testing.tokenizers import make_sentencepiece

CASES = Path(__file__).parents[1] / "goldens" / "cases"


@pytest.fixture(scope="module")
def llama(model):
    return model("llama31").tokenizer


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


def recorded(name):
    info = json.loads((CASES / f"{name}.json").read_text())
    return info["prompt"], info["prompt_ids"]


def test_published_style_gives_the_published_prompt(llama):
    text, ids = recorded("image")
    messages = prompts.conversation("What is in this picture?")
    assert prompts.render(llama, messages, "published") == text
    assert prompts.prompt_ids(llama, messages, "published") == ids
    assert ids[:2] == [llama.bos_token_id] * 2


def test_chat_style_has_one_bos_and_the_header(llama):
    ids = prompts.prompt_ids(llama, prompts.conversation("What is in this picture?"))
    published = recorded("image")[1]
    header = prompts.encode(llama, "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert ids == published[1:] + header


def test_several_turns(llama):
    text, ids = recorded("multi_turn")
    turns = text.split("<|start_header_id|>")[2:]
    contents = [turn.split("<|end_header_id|>\n\n")[1].removesuffix("<|eot_id|>") for turn in turns]
    contents[0] = contents[0].removeprefix("<image>\n")
    history = list(zip(contents[0:-1:2], contents[1::2]))
    assert prompts.prompt_ids(llama, prompts.conversation(contents[-1], history), "published") == ids


def test_vicuna_text(llama, vicuna):
    text, _ = recorded("vicuna")
    assert prompts.render(vicuna, prompts.conversation("What is in this picture?")) == text
    two = prompts.render(vicuna, prompts.conversation("And now?", [("First?", "Yes.")], media=False))
    assert two.endswith("USER: First? ASSISTANT: Yes.</s>USER: And now? ASSISTANT:")
    assert prompts.is_llama_3(llama) and not prompts.is_llama_3(vicuna)


def test_vicuna_ids_are_the_published_chunks(vicuna):
    ids = prompts.prompt_ids(vicuna, prompts.conversation("What is this?"), "published")
    before, after = prompts.render(vicuna, prompts.conversation("What is this?")).split("<image>")
    # the published tokenizer call per chunk adds a BOS, which is dropped; the first chunk's stays
    chunks = [[i for i in vicuna(part).input_ids if i != vicuna.bos_token_id] for part in (before, after)]
    assert ids == [vicuna.bos_token_id, *chunks[0], -200, *chunks[1]]
    assert ids.count(vicuna.bos_token_id) == 1


WORDS = [
    "What",
    " is",
    "<|eot_id|>",
    "\n",
    " blue",
    "é",
    "猫",
    "!",
    "  ",
    "A",
    "<",
    "image>",
    " 42",
    "\t",
    "—",
    "🙂",
    ". ",
]


@pytest.mark.parametrize("which", ["llama", "vicuna"])
def test_decode_split_encode_gives_the_ids_back(which, request):
    """What the vLLM door does: ids of a whole text in, ids of its pieces around the placeholder out."""
    tokenizer, rng = request.getfixturevalue(which), random.Random(5)
    for _ in range(200):
        before, after = ("".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2))
        text = f"{before}<image>{after}"
        if text.count("<image>") != 1:
            continue
        published = [*tokenizer.encode(before, add_special_tokens=False), -200]
        published += tokenizer.encode(after, add_special_tokens=False)
        as_vllm = tokenizer.encode(text)
        bos = [tokenizer.bos_token_id] if as_vllm[:1] == [tokenizer.bos_token_id] else []
        assert prompts.encode(tokenizer, prompts.decode(tokenizer, as_vllm)) == bos + published, text


def test_conversation_without_media_has_no_placeholder():
    assert prompts.conversation("Hi", media=False) == [{"role": "user", "content": "Hi"}]


def test_empty_prompts_are_refused(llama):
    with pytest.raises(ValueError, match="at least one message"):
        prompts.prompt_ids(llama, [])
