"""What the processor takes from vLLM, and what it hands back: multimodal items and a processed prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.inputs import ProcessorInputs

__all__ = [
    "BaseDummyInputsBuilder",
    "BaseMultiModalProcessor",
    "BaseProcessingInfo",
    "MultiModalDataParser",
    "ProcessorBatchItems",
    "ProcessorInputs",
    "items",
    "multimodal_input",
]

MEMBERS = (
    "BaseDummyInputsBuilder._get_dummy_images",
    "BaseDummyInputsBuilder._get_dummy_videos",
    "BaseDummyInputsBuilder.get_dummy_mm_data",
    "BaseDummyInputsBuilder.get_dummy_text",
    "BaseMultiModalProcessor._get_mm_fields_config",
    "BaseMultiModalProcessor._get_prompt_updates",
    "BaseMultiModalProcessor.apply",
    "BaseMultiModalProcessor.get_dummy_inputs",
    "BaseProcessingInfo.get_data_parser",
    "BaseProcessingInfo.get_mm_max_tokens_per_item",
    "BaseProcessingInfo.get_supported_mm_limits",
    "BaseProcessingInfo.get_tokenizer",
    "MultiModalDataParser._parse_image_data",
    "MultiModalDataParser._parse_video_data",
    "MultiModalFieldConfig.batched",
    "MultiModalKwargsItems.from_hf_inputs",
    "ProcessorInputs.cache",
    "ProcessorInputs.mm_data_items",
    "ProcessorInputs.mm_uuid_items",
    "ProcessorInputs.prompt",
)
"""What is called or overridden of these; the table of names has it too."""


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
