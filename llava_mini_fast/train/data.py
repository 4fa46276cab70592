"""LLaVA-format JSON -> ids, labels and media: what one training example is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_mini_fast import media as lmf_media
from llava_mini_fast.media import Media
from llava_mini_fast.preprocess.prompt import PLACEHOLDER, Message, encode, render

IGNORED = -100
"""The label of rows that nothing is learned from, as transformers has it."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One conversation, tokenized as a prompt and its answers would be when asked."""

    ids: list[int]
    """With -200 where the media goes."""
    labels: list[int]
    """The ids of answers and of the tokens that end them; `IGNORED` elsewhere."""
    media: Media | None


def read_entries(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a LLaVA-format file: a list of objects with "conversations" and at most one of "image" and "video".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format; the message names the entry.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of conversations, and not an empty one.")
    for index, entry in enumerate(entries):
        problem = _problem(entry)
        if problem:
            raise ValueError(f"entry {index} of {path} {problem}.")
    return entries


def example(tokenizer: Any, entry: dict[str, Any], folder: str | Path) -> Example:
    """An entry of `read_entries` as ids and labels; its "image" or "video" is a path relative to `folder`."""
    messages = [{"role": ROLES[said["from"]], "content": said["value"]} for said in entry["conversations"]]
    ids, labels = tokenized(tokenizer, messages)
    media = None
    if "image" in entry:
        media = lmf_media.image(Path(folder) / entry["image"])
    elif "video" in entry:
        media = lmf_media.video(Path(folder) / entry["video"])
    return Example(ids, labels, media)


def tokenized(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation that ends with an answer.

    Prompts and answers are tokenized apart, as they are when a model answers: no token reaches from one into the other.

    Raises:
        ValueError: the tokenizer's template rewrites earlier turns, so that prompts are no prefixes of one another.
    """
    ids, labels, seen = [], [], ""
    for count, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[: count - 1], "chat")
        answered = render(tokenizer, messages[:count], "published")
        if not (asked.startswith(seen) and answered.startswith(asked)):
            raise ValueError(
                "the tokenizer's chat template changes earlier turns; such a template can't be trained on."
            )
        prompt, answer = encode(tokenizer, asked[len(seen) :]), encode(tokenizer, answered[len(asked) :])
        ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer
        seen = answered
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids, labels = [bos, *ids], [IGNORED, *labels]
    return ids, labels


def _problem(entry: Any) -> str:
    """What is wrong with an entry, to follow "entry 3 of file", or nothing."""
    said = entry.get("conversations") if isinstance(entry, dict) else None
    if not said or not all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in said):
        return 'has no "conversations" of {"from": ..., "value": ...}'
    roles = [turn["from"] for turn in said if turn["from"] != "system"]
    if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
        return 'must take turns, "human" then "gpt"'
    places = sum(turn["value"].count(PLACEHOLDER) for turn in said)
    if "image" in entry and "video" in entry:
        return "has an image and a video; a conversation is about one medium"
    wanted = int("image" in entry or "video" in entry)
    if places != wanted:
        return f"has {places} of {PLACEHOLDER} and {wanted} media"
    return ""
