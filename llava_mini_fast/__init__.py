"""LLaVA-Mini Fast: one vision token an image, a frame a token of video; a fast, faithful engine for vLLM and torch.

    import llava_mini_fast as lmf

    model = lmf.load("path/or/hub-name")
    print(model.ask(lmf.image("picture.png"), "What is this?"))

Importing the package loads no vllm, no triton and no CUDA context.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from llava_mini_fast.media import Media, image, video
from llava_mini_fast.preprocess.limits import Limits, MediaError
from llava_mini_fast.protocol import Engine

if TYPE_CHECKING:
    from llava_mini_fast.engine import LlavaMini, load
    from llava_mini_fast.image_cache import CacheSizes

__all__ = ["CacheSizes", "Engine", "Limits", "LlavaMini", "Media", "MediaError", "image", "load", "video"]

try:
    __version__ = version("llava-mini-fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"


def __getattr__(name: str):
    # the engine imports torch and, when it loads a model, transformers (which imports triton): only on demand
    if name in ("LlavaMini", "load"):
        from llava_mini_fast import engine

        return getattr(engine, name)
    if name == "CacheSizes":
        from llava_mini_fast.image_cache import CacheSizes

        return CacheSizes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
