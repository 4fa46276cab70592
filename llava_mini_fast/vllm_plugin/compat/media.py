"""How vLLM gets media: its connector, its readers, and the loaders of clips."""

from __future__ import annotations

from importlib import import_module

from vllm import envs
from vllm.connections import HTTPConnection
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

__all__ = [
    "MEDIA_CONNECTOR_REGISTRY",
    "HTTPConnection",
    "ImageMediaIO",
    "MediaConnector",
    "MediaWithBytes",
    "VideoLoader",
    "VideoMediaIO",
    "image_timeout",
    "register_video_loader",
    "video_timeout",
]

MEMBERS = (
    "HTTPConnection.get_async_client",
    "ImageMediaIO.load_bytes",
    "MediaConnector.fetch_image",
    "MediaConnector.fetch_image_async",
    "MediaConnector.fetch_video",
    "MediaConnector.fetch_video_async",
    "MediaConnector.load_from_url",
    "MediaConnector.load_from_url_async",
    "VideoLoader.load_bytes",
    "VideoMediaIO.load_base64",
)
"""What is called or overridden of these; the table of names has it too."""


def image_timeout() -> float:
    """Seconds that fetching a picture may take."""
    return envs.VLLM_IMAGE_FETCH_TIMEOUT


def video_timeout() -> float:
    """Seconds that fetching a clip may take."""
    return envs.VLLM_VIDEO_FETCH_TIMEOUT


def register_video_loader(name: str, module: str) -> None:
    """Make `module`'s `Loader` the video loader of our model type, in every process and without a flag."""
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    from llava_mini_fast.config import MODEL_TYPE

    processor = (
        "LlavaMiniVideoProcessor"  # a name only: vLLM picks loaders by the name of a transformers video processor
    )
    VIDEO_PROCESSOR_MAPPING_NAMES[MODEL_TYPE] = processor
    VIDEO_LOADER_REGISTRY.register(name, video_processor=processor)(import_module(module).Loader)
