"""The one file that touches vLLM's private names. What each stands for is said here; DESIGN names this room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor
from vllm.inputs import mm_input
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import ProcessorBatchItems
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

__all__ = [
    "ProcessorBatchItems",
    "ProcessorInputs",
    "VideoLoader",
    "items",
    "logger",
    "multimodal_input",
    "register_video_loader",
]

# outside vLLM's own namespace, vLLM configures no log handler
logger = init_logger("vllm.llava_mini_fast")


def register_video_loader(name: str, module: str) -> None:
    """Make `module`'s `Loader` the video loader of our model type, in every process and without a flag."""
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    from llava_mini_fast.config import MODEL_TYPE

    processor = (
        "LlavaMiniVideoProcessor"  # a name only: vLLM picks loaders by the name of a transformers video processor
    )
    VIDEO_PROCESSOR_MAPPING_NAMES[MODEL_TYPE] = processor
    VIDEO_LOADER_REGISTRY.register(name, video_processor=processor)(import_module(module).Loader)


def items(modality: str, fields: Mapping[str, Sequence[Tensor]]) -> list[MultiModalKwargsItem]:
    """One multimodal item per index of the fields' lists; only "pixels" travel to the device."""
    from transformers import BatchFeature

    config = {name: MultiModalFieldConfig.batched(modality, keep_on_cpu=name != "pixels") for name in fields}
    return list(MultiModalKwargsItems.from_hf_inputs(BatchFeature(dict(fields)), config)[modality])


def multimodal_input(
    modality: str,
    prompt_token_ids: list[int],
    segment_items: Sequence[MultiModalKwargsItem],
    hashes: list[str],
    spans: Sequence[tuple[int, int]],
    cache: Any | None,
) -> Any:
    """vLLM's processed prompt; items that its sender cache says the engine already holds are not sent again."""
    sent: list[MultiModalKwargsItem | None] = list(segment_items)
    if cache is not None:
        for item_hash in hashes:  # so that storing one of them can't evict another
            cache.touch_sender_cache_item(item_hash)
        try:
            known = cache.is_cached(hashes)
            sent = [
                cache.get_and_update_item(None if is_known else (item, []), item_hash)[0]
                for is_known, item, item_hash in zip(known, segment_items, hashes)
            ]
        finally:
            cache.release_sender_touches()
    return mm_input(
        prompt_token_ids=prompt_token_ids,
        mm_kwargs=MultiModalKwargsItems({modality: sent}),
        mm_hashes={modality: hashes},
        mm_placeholders={modality: [PlaceholderRange(offset=a, length=b - a) for a, b in spans]},
    )
