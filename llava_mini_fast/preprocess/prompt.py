"""Prompts: the two published templates, the placeholder, and ids (published: `conversation.py`, `tokenizer_image_token`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from llava_mini_fast.config import IMAGE_TOKEN_ID

PLACEHOLDER = "<image>"
"""What stands in text where the media goes."""
Style = Literal["chat", "published"]
Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def is_llama_3(tokenizer: Any) -> bool:
    """Whether the checkpoint speaks Llama-3.1's chat format (`llava_llama_3_1`); otherwise it is Vicuna's (`llava_v1`)."""
    return tokenizer.convert_tokens_to_ids("<|start_header_id|>") not in (None, tokenizer.unk_token_id)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Text to ids with -200 where the placeholder stands; pieces are tokenized on their own and nothing is added.

    This is what the published code does after dropping each piece's own BOS, so `bos + encode(...)` are its ids.
    """
    ids: list[int] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            ids.append(IMAGE_TOKEN_ID)
        if piece:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids without losing or adding anything, special tokens included; the inverse of `encode` piece by piece."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def conversation(question: str, history: Sequence[tuple[str, str]] = (), media: bool = True) -> list[Message]:
    """Messages of a conversation about one medium: its placeholder stands before the first question.

    Args:
        question: the new question.
        history: earlier (question, answer) pairs, oldest first.
        media: whether there is a medium to talk about.

    Raises:
        ValueError: a text holds the placeholder itself, which would stand for a second medium.
    """
    texts = [text for pair in history for text in pair] + [question]
    if any(PLACEHOLDER in text for text in texts):
        raise ValueError(
            f"a question or answer contains {PLACEHOLDER}; leave it out, the media's place is added for you."
        )
    messages = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]
    if media:
        messages[0]["content"] = f"{PLACEHOLDER}\n{messages[0]['content']}"
    return messages


def render(tokenizer: Any, messages: Sequence[Message], style: Style = "chat") -> str:
    """The prompt's text, without the BOS that `prompt_ids` adds.

    "chat": what training saw and chat servers do (the answer's header belongs to the prompt). "published": what the published
    inference scripts send (Llama-3.1: no header, so the model writes it itself). Vicuna's two styles are the same.

    Raises:
        ValueError: an unknown style, or no message.
    """
    if style not in ("chat", "published"):
        raise ValueError(f"style must be 'chat' or 'published', not {style!r}.")
    if not messages:
        raise ValueError("a prompt needs at least one message.")
    messages = list(messages)
    llama = is_llama_3(tokenizer)
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": LLAMA_SYSTEM if llama else VICUNA_SYSTEM})
    if llama:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=style == "chat")
    return _vicuna(messages)


def _vicuna(messages: Sequence[Message]) -> str:
    text = messages[0]["content"]
    for message in messages[1:]:
        if message["role"] == "user":
            text += f" USER: {message['content']}"
        else:
            text += f" ASSISTANT: {message['content']}</s>"
    if messages[-1]["role"] == "user":
        text += " ASSISTANT:"
    return text.replace("</s> USER", "</s>USER")


def prompt_ids(tokenizer: Any, messages: Sequence[Message], style: Style = "chat") -> list[int]:
    """Ids (with -200) of a conversation.

    Llama-3.1's template writes a BOS into the text: "chat" leaves it at that one (training removed the second),
    "published" adds the second BOS that the published scripts send. Vicuna gets its one BOS in both.
    """
    ids = encode(tokenizer, render(tokenizer, messages, style))
    bos = tokenizer.bos_token_id
    if bos is not None and (style == "published" or ids[:1] != [bos]):
        ids = [bos, *ids]
    return ids
