"""From a prompt and a medium to vLLM's multimodal items: split, preprocess, hash. Nothing of the model runs here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_mini_fast import checkpoint, media
from llava_mini_fast.config import IMAGE_SIZE, IMAGE_TOKEN_ID, LlavaMiniConfig
from llava_mini_fast.model.splice import check_vocabulary, placeholder_index
from llava_mini_fast.preprocess.prompt import PLACEHOLDER, decode, encode
from llava_mini_fast.preprocess.views import views
from llava_mini_fast.vllm_plugin.compat import processing
from llava_mini_fast.vllm_plugin.segments import (
    PromptMedia,
    check_placeholder,
    expand,
    ids_of_segment,
    segment_hash,
    spans,
)

SEVERAL = "the prompt has several media; LLaVA-Mini takes one image or one video a conversation."
DUMMY_FRAMES = 8
"""Frames of the profiling dummy: one full chunk of the front end, which is what bounds its memory."""


def read_config(model_config: Any) -> LlavaMiniConfig:
    """The checkpoint's config, with `tokenizer_model_max_length` as vLLM's `hf_overrides` left it."""
    config = checkpoint.read_config(checkpoint.resolve(model_config.model))
    return dataclasses.replace(
        config, max_rows=getattr(model_config.hf_config, "tokenizer_model_max_length", config.max_rows)
    )


class MediaItems(processing.ProcessorBatchItems):
    """Media of one modality, each a `Media` or a `PromptMedia`."""


class DataParser(processing.MultiModalDataParser):
    """Accepts everything that vLLM does, our media objects, and already preprocessed floats."""

    def _parse_image_data(self, data: Any) -> MediaItems | None:
        return self._parsed("image", data, super()._parse_image_data)

    def _parse_video_data(self, data: Any) -> MediaItems | None:
        return self._parsed("video", data, super()._parse_video_data)

    @staticmethod
    def _parsed(kind: str, data: Any, vllms: Callable[[Any], Any]) -> MediaItems | None:
        given = _ours(kind, data)
        if given is None:
            items = vllms(data)
            if items is None:
                return None
            given = [_as_media(kind, item) for item in items.get_all()]
        if len(given) > 1:
            raise ValueError(SEVERAL)
        return MediaItems(given, kind)


def _ours(kind: str, data: Any) -> list[Any] | None:
    """The media in `data` if it is ours to take, None if vLLM's parser should read it."""
    if isinstance(data, list | tuple) and data:
        if all(isinstance(item, media.Media | PromptMedia) for item in data):
            return list(data)
        if kind == "video":
            frames = data[0] if len(data) == 1 and isinstance(data[0], list | tuple) else data
            # vLLM makes one array of them, for which all would have to be of one size and mode
            if all(isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in frames):
                return [media.video(frames)]
    if isinstance(data, media.Media | PromptMedia):
        return [data]
    # vLLM would read an array with one more dimension than pixels have as several media
    floats = isinstance(data, torch.Tensor | np.ndarray) and "float" in str(data.dtype)
    if floats and data.ndim == (4 if kind == "image" else 5):
        return [_as_media(kind, data)]
    return None


def _as_media(kind: str, item: Any) -> media.Media | None:
    if item is None:  # a uuid without data: apply() refuses it, since pixels decide what is cached
        return None
    if kind == "image":
        return media.image(item)
    return media.video(item[0] if isinstance(item, tuple) else item)  # (frames, metadata)


class Info(processing.BaseProcessingInfo):
    """What vLLM may ask about the model's inputs."""

    @cached_property
    def config(self) -> LlavaMiniConfig:
        return read_config(self.ctx.model_config)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1, "video": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        rows = self.most_rows(seq_len)  # an item is a piece of the prompt, text included
        return {"image": rows, "video": rows}

    def most_rows(self, seq_len: int) -> int:
        """Rows of the longest prompt with media: longer ones than `tokenizer_model_max_length` are refused."""
        return min(seq_len, self.config.max_rows or seq_len)

    def get_data_parser(self) -> DataParser:
        return DataParser()

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}


class DummyInputs(processing.BaseDummyInputsBuilder[Info]):
    """The largest input, for profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACEHOLDER * min(1, sum(mm_counts.values()))

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        frames = max(1, min(DUMMY_FRAMES, self.info.most_rows(seq_len) // self.info.config.num_compressed))
        if mm_counts.get("video"):
            return {
                "video": self._get_dummy_videos(width=IMAGE_SIZE, height=IMAGE_SIZE, num_frames=frames, num_videos=1)
            }
        if mm_counts.get("image"):
            return {"image": self._get_dummy_images(width=IMAGE_SIZE, height=IMAGE_SIZE, num_images=1)}
        return {}


class Processor(processing.BaseMultiModalProcessor[Info]):
    """Builds the items itself: vLLM's own path assumes that an item is its media alone."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        raise NotImplementedError("apply() builds the fields")

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list[Any]:
        return []

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> processing.ProcessorInputs:
        """The dummy prompt, filled up with text to the longest allowed: text rows are the item's too."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        if mm_counts.get("video") or mm_counts.get("image"):
            (item,) = (items.get(0) for items in inputs.mm_data_items.values())
            frames = len(item.source) if item.kind == "video" else 1
            text = max(0, self.info.most_rows(seq_len) - frames * self.info.config.num_compressed)
            prompt = (IMAGE_TOKEN_ID, *[self._stand_in] * text)
            inputs.mm_data_items[item.kind].data[0] = PromptMedia(item, prompt)
        return inputs

    @property
    def _stand_in(self) -> int:
        # a BOS is never generated, so penalties over prompt ids can't touch an answer through it
        return self.info.config.bos_token_id or 0

    def apply(self, inputs: processing.ProcessorInputs, timing_ctx: Any) -> Any:
        """Process one prompt.

        Raises:
            ValueError: not exactly one medium with exactly one placeholder, unusable media, or too many rows.
        """
        counts = {modality: n for modality, n in inputs.mm_data_items.get_all_counts().items() if n}
        named = [*counts, *(inputs.mm_uuid_items or ())]
        if not named:
            return super().apply(inputs, timing_ctx)
        if sum(counts.values()) > 1:
            raise ValueError(SEVERAL)
        modality = named[0]
        item = inputs.mm_data_items[modality].get(0) if counts else None
        if item is None:
            raise ValueError(f"the {modality} was named by a uuid without its data; send the {modality} itself.")
        if isinstance(item, PromptMedia):
            ids, medium = list(item.prompt_ids), item.media
        else:
            ids, medium = self._ids_with_placeholder(inputs.prompt), item
        placeholder = placeholder_index(ids)
        check_placeholder(placeholder, has_media=True)
        check_vocabulary(ids, self.info.config.vocab_size)  # beyond this door nothing may fail: it would end the engine
        with timing_ctx.record("preprocess_media"):
            prepared = views(medium, self.info.config)
        return self._build(modality, ids, placeholder, prepared, inputs.cache)

    def _ids_with_placeholder(self, prompt: list[int] | str) -> list[int]:
        """Ids with -200 from what vLLM tokenized: "<image>" is ordinary text to the checkpoint's tokenizer."""
        tokenizer = self.info.get_tokenizer()
        return encode(tokenizer, prompt if isinstance(prompt, str) else decode(tokenizer, prompt))

    def _build(self, modality: str, ids: list[int], placeholder: int, prepared: Any, cache: Any) -> Any:
        config = self.info.config
        num_vision = prepared.num_frames * config.num_compressed
        rows = len(ids) - 1 + num_vision
        context = self.info.ctx.model_config.max_model_len
        if rows > context:
            raise ValueError(
                f"the prompt needs {rows} rows ({num_vision} of them vision) and the context (max_model_len) holds {context}; "
                "shorten the text or take fewer frames."
            )
        if config.max_rows is not None and rows > config.max_rows:
            raise ValueError(
                f"the prompt needs {rows} rows ({num_vision} of them vision) and tokenizer_model_max_length allows "
                f"{config.max_rows}; shorten the text, take fewer frames, or raise it through hf_overrides."
            )
        cuts = spans(ids, placeholder, num_vision, config.eos_token_ids)
        segment_ids = [ids_of_segment(ids, stop, num_vision) for _, stop in cuts]
        pixels = prepared.pixels
        hashes = [
            segment_hash(
                self.info.model_id, modality, f"{pixels.dtype} {tuple(pixels.shape)}", prepared.digests, start, own
            )
            for (start, _), own in zip(cuts, segment_ids)
        ]
        digests = torch.frombuffer(bytearray(b"".join(prepared.digests)), dtype=torch.uint8).view(
            prepared.num_frames, -1
        )
        items = processing.items(
            modality,
            {
                "pixels": [pixels] * len(cuts),
                "digests": [digests] * len(cuts),
                "prompt_ids": [torch.tensor(own) for own in segment_ids],
                "span": [torch.tensor(cut) for cut in cuts],
            },
        )
        expanded = expand(ids, placeholder, num_vision, self._stand_in)
        return processing.multimodal_input(modality, expanded, items, hashes, cuts, cache)
