"""The standalone engine: the fusion front end plus transformers' Llama, one process, no vLLM."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from tqdm import tqdm

from llava_mini_fast import checkpoint
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.device import choose_device
from llava_mini_fast.fusion import FusionFrontEnd
from llava_mini_fast.media import Media
from llava_mini_fast.ops.backend import resolve
from llava_mini_fast.pieces import Pieces
from llava_mini_fast.precision import choose_dtype, quantize
from llava_mini_fast.preprocess import prompt as prompts
from llava_mini_fast.protocol import AskOptions


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    backend: str = "auto",
    *,
    quantization: str | None = None,
) -> LlavaMini:
    """Load a published LLaVA-Mini checkpoint.

    Args:
        path: a checkpoint directory or a hub name.
        device: "cpu", "cuda", "cuda:1" (a torch.device is taken too), or "auto" for CUDA where there is one.
        dtype: "float32", "float16", "bfloat16" (a torch.dtype is taken too), or "auto" for what the device does fast.
        backend: which kernels run the front end's ops: "auto", "torch", "triton" or "cuda" (ops/backend.py).
        quantization: "int8" for int8 weights in every linear layer but the last (torchao), or None.

    Raises:
        FileNotFoundError: no such checkpoint, or no weights in it.
        ValueError: another model's config; missing, misshapen or truncated weights; a device that is not here; an unknown
            dtype, backend or quantization.
    """
    torch_device = choose_device(device)
    chosen, _ = choose_dtype(dtype, torch_device)
    resolve(backend, torch_device)  # before minutes of loading
    directory = checkpoint.resolve(path)
    model = LlavaMini(directory, checkpoint.read_config(directory), torch_device, chosen, backend)
    if quantization is not None:
        front = model.front
        quantize([front.vision_tower, front.mm_projector, front.prefusion_layers, model.llm.model.layers], quantization)
    else:
        model.front.pack()
    return model


class LlavaMini:
    """A loaded model. `front` is the fusion front end, `llm` transformers' `LlamaForCausalLM`."""

    def __init__(
        self, directory: Path, config: LlavaMiniConfig, device: torch.device, dtype: torch.dtype, backend: str = "auto"
    ):
        from transformers import LlamaForCausalLM

        self.directory, self.config = directory, config
        self.llm = LlamaForCausalLM.from_pretrained(
            None, config=config.llama_config(), state_dict=self._language_model(directory, config, dtype), dtype=dtype
        ).to(device)  # fmt: skip
        self.llm.requires_grad_(False).eval()
        self.llm.generation_config.eos_token_id = list(config.eos_token_ids) or None
        self.llm.generation_config.pad_token_id = (config.eos_token_ids or (0,))[0]
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.front = FusionFrontEnd(config, self.llm.get_input_embeddings(), backend)
                self.front.requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(before)
        self.front.load_weights(checkpoint.front_end_weights(directory, config))

    @staticmethod
    def _language_model(directory: Path, config: LlavaMiniConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        from transformers import LlamaForCausalLM

        weights = checkpoint.language_model_weights(directory)
        with torch.device("meta"):
            expected = LlamaForCausalLM(config.llama_config()).state_dict()
        for name, parameter in expected.items():
            if name == "lm_head.weight" and config.raw.get("tie_word_embeddings"):
                continue
            if name not in weights:
                raise ValueError(f"the checkpoint lacks tensor {name}, which the language model needs.")
            if weights[name].shape != parameter.shape:
                raise ValueError(
                    f"tensor {name} has shape {tuple(weights[name].shape)}; this config needs {tuple(parameter.shape)}."
                )
        return {name: tensor.to(dtype) for name, tensor in weights.items() if name in expected}

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer (transformers); ValueError with a sentence when it has none."""
        from transformers import AutoTokenizer

        from llava_mini_fast.hf_config import register_config

        register_config()
        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.directory} has no usable tokenizer, which questions in words need: {error}"
            ) from None

    def embed(self, prompt_ids: Sequence[int], media: Media | None = None, *, progress: bool = False) -> Tensor:
        """Fused rows after the splice, as published: (rows, H), cut (with a warning) at `tokenizer_model_max_length`.

        Args:
            prompt_ids: ids with -200 where the media goes; taken as they are.
            media: `image(...)`, `video(...)` or None. Media without placeholder gives the fused text alone.
            progress: show a bar of the frames done on stderr.

        Raises:
            ValueError: two placeholders, a placeholder without media, ids outside the vocabulary, unusable media.
        """
        rows = self._fuse(prompt_ids, media, progress)
        limit = self.config.max_rows
        if media is not None and limit is not None and rows.shape[0] > limit:
            warnings.warn(
                f"the prompt's {rows.shape[0]} rows are cut at tokenizer_model_max_length = {limit}, as published.",
                stacklevel=2,
            )
            rows = rows[:limit]
        return rows

    def generate_ids(
        self, prompt_ids: Sequence[int], media: Media | None = None, max_new_tokens: int = 16
    ) -> list[int]:
        """Greedy continuation: the new tokens only, ending with the first stop id if one comes. Errors as in `embed`."""
        return self._generate(self.embed(prompt_ids, media), max_new_tokens)

    def prompt_ids(self, messages: Sequence[prompts.Message], style: prompts.Style = "chat") -> list[int]:
        """Ids (with -200) of a conversation whose first user message holds "<image>" if there is media."""
        return prompts.prompt_ids(self.tokenizer, messages, style)

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
        """Ask in words; template, tokenizer and stop ids included.

        Args:
            media: `image(...)`, `video(...)`, or None for text alone.
            question: the new question, without a placeholder.
            max_new_tokens: at least 1.
            stream: return an iterator of pieces of the answer instead of the whole.
            history: earlier (question, answer) pairs about the same media, oldest first.
            temperature: 0 is greedy; above 0 samples, from the smallest set of tokens whose probability reaches `top_p`.
            style: "chat" (one BOS, with the answer's header) or "published" (what the published scripts send).
            progress: show a bar of the frames done on stderr.

        Raises:
            ValueError: unusable media, a placeholder in the text, a bad parameter, or more rows than the context holds.
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                "max_new_tokens must be at least 1, temperature at least 0, and top_p above 0 and at most 1."
            )
        ids = self.prompt_ids(prompts.conversation(question, history, media is not None), style)
        rows = self._fuse(ids, media, progress)
        self._check_rows(rows)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        if stream:
            return self._stream(rows, max_new_tokens, sampling)
        return self.tokenizer.decode(self._generate(rows, max_new_tokens, **sampling), skip_special_tokens=True)

    def ask_batch(self, questions: Sequence[tuple[Media | None, str]], max_new_tokens: int = 512) -> list[str]:
        """The greedy answers to (media, question) pairs: fused together, generated one after another. Errors as in `ask`."""
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1.")
        requests = [
            (self.prompt_ids(prompts.conversation(question, (), media is not None)), media)
            for media, question in questions
        ]
        fused = self.front.fuse(requests)
        for rows in fused:
            self._check_rows(rows)
        return [self.tokenizer.decode(self._generate(rows, max_new_tokens), skip_special_tokens=True) for rows in fused]

    def _check_rows(self, rows: Tensor) -> None:
        limit = min(self.config.max_rows or self.config.max_position_embeddings, self.config.max_position_embeddings)
        if rows.shape[0] > limit:
            raise ValueError(
                f"the prompt needs {rows.shape[0]} rows and the context holds {limit}; shorten the text or take fewer frames."
            )

    def _fuse(self, prompt_ids: Sequence[int], media: Media | None, progress: bool) -> Tensor:
        with tqdm(desc="frames", unit="", leave=False, disable=not progress or media is None) as bar:
            (rows,) = self.front.fuse([(prompt_ids, media)], progress=bar.update)
        return rows

    @torch.inference_mode()
    def _generate(self, rows: Tensor, max_new_tokens: int, **options: Any) -> list[int]:
        options = {"do_sample": False, "temperature": None, "top_p": None} | options
        mask = torch.ones(1, rows.shape[0], dtype=torch.long, device=rows.device)
        out = self.llm.generate(inputs_embeds=rows[None], attention_mask=mask, max_new_tokens=max_new_tokens, **options)
        return out[0].tolist()

    def _stream(self, rows: Tensor, max_new_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        streamer = Pieces(self.tokenizer)
        failure: list[BaseException] = []
        left = threading.Event()

        def reader_left(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full((ids.shape[0],), left.is_set(), device=ids.device)

        def work() -> None:
            try:
                self._generate(rows, max_new_tokens, streamer=streamer, stopping_criteria=[reader_left], **sampling)
            except BaseException as error:  # handed to the reader below: a thread's exception is otherwise lost
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # the thread ends with its reader: one that is inside torch when Python exits aborts the process
            left.set()
            thread.join()
        if failure:
            raise failure[0]
