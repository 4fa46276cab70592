"""What every engine of this package can do, for those who write against either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, Unpack, overload

if TYPE_CHECKING:
    from llava_mini_fast.config import LlavaMiniConfig
    from llava_mini_fast.media import Media
    from llava_mini_fast.preprocess.prompt import Style


class AskOptions(TypedDict, total=False):
    """Keywords of `ask`, as `LlavaMini.ask` explains them."""

    history: Sequence[tuple[str, str]]
    temperature: float
    top_p: float
    style: Style
    progress: bool


class Engine(Protocol):
    """A loaded model that answers: `LlavaMini` (torch, one process) or `OfflineEngine` (vLLM in this process)."""

    config: LlavaMiniConfig

    def generate_ids(
        self, prompt_ids: Sequence[int], media: Media | None = None, max_new_tokens: int = 16
    ) -> list[int]:
        """Greedy new tokens after ids with -200 where the media goes; ends with the first stop id if one comes."""
        ...

    @overload
    def ask(
        self,
        media: Media | None,
        question: str,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        **options: Unpack[AskOptions],
    ) -> str: ...
    @overload
    def ask(
        self,
        media: Media | None,
        question: str,
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        **options: Unpack[AskOptions],
    ) -> Iterator[str]: ...
    @overload
    def ask(
        self,
        media: Media | None,
        question: str,
        max_new_tokens: int = ...,
        stream: bool = ...,
        **options: Unpack[AskOptions],
    ) -> str | Iterator[str]:
        """The answer, or with `stream` an iterator of its pieces."""

    def ask_batch(self, questions: Sequence[tuple[Media | None, str]], max_new_tokens: int = 512) -> list[str]:
        """The greedy answers to (media, question) pairs, in their order."""
        ...
