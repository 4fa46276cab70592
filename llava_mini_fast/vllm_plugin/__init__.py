"""The vLLM plugin: `register()` is its entry point, `prompt()` what `LLM.generate` takes for ids and a medium.

vLLM is imported inside `register()` and in the modules that vLLM itself loads, never here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mini_fast.config import ARCHITECTURE, IMAGE_TOKEN_ID
from llava_mini_fast.media import Media
from llava_mini_fast.model.splice import placeholder_index
from llava_mini_fast.vllm_plugin.compat import versions
from llava_mini_fast.vllm_plugin.segments import PromptMedia, check_placeholder

if TYPE_CHECKING:
    from torch import Tensor

_STAND_IN = 0  # any id of the vocabulary: the processor takes the real ids from the medium


def prompt(prompt_ids: Sequence[int], media: Media | None = None) -> dict[str, Any]:
    """A prompt for vLLM's `LLM.generate` from ids, which are taken as they are and never tokenized again.

    Args:
        prompt_ids: ids with -200 where the media goes.
        media: `image(...)`, `video(...)`, or None for text alone.

    Raises:
        ValueError: media without placeholder, a placeholder without media, or two placeholders.
    """
    ids = [int(i) for i in prompt_ids]
    check_placeholder(placeholder_index(ids), media is not None)
    if media is None:
        return {"prompt_token_ids": ids}
    return {
        "prompt_token_ids": [_STAND_IN if i == IMAGE_TOKEN_ID else i for i in ids],
        "multi_modal_data": {media.kind: PromptMedia(media, tuple(ids))},
    }


def embeds_prompt(rows: Tensor) -> dict[str, Any]:
    """A prompt for vLLM's `LLM.generate` from rows fused elsewhere: for clips longer than the server's limits allow.

    The engine must be started with `enable_prompt_embeds=True`; it runs no front end for such a prompt.

    Args:
        rows: (rows, H), from `model.embed` or `model.front.fuse` of the same checkpoint.
    """
    if rows.dim() != 2:
        raise ValueError(f"rows must be (rows, H); got {tuple(rows.shape)}.")
    return {"prompt_embeds": rows.detach().cpu()}


def register() -> None:
    """Tell vLLM about LLaVA-Mini; vLLM calls this in every process through the entry point `vllm.general_plugins`.

    Never raises, since that would end vLLM for every other model too. With a vLLM that this package doesn't know it warns, once a
    process, and what it registers refuses with the same sentence when LLaVA-Mini is asked for.
    """
    reason = try_to_register()
    if reason:
        _refuse(reason)


def try_to_register() -> str | None:
    """Register, or say in a sentence why this package can't work with the installed vLLM."""
    import vllm

    reason = versions.refusal(vllm.__version__)
    try:
        if reason is None:
            _register()
        return reason
    except Exception as error:  # a name that this vLLM lacks, whatever its version says
        return (
            f"llava-mini-fast can't work with this vLLM {vllm.__version__}: {type(error).__name__}: {error}; "
            f"it knows vLLM {' and '.join(versions.VERSIONS)}."
        )


def _register() -> None:
    from vllm import ModelRegistry

    from llava_mini_fast.hf_config import register_config
    from llava_mini_fast.vllm_plugin.compat.logging import logger
    from llava_mini_fast.vllm_plugin.compat.media import register_video_loader

    warning = shadowed_triton_kernels()
    if warning:
        logger.warning(warning)
    register_config()
    register_video_loader("llava_mini", "llava_mini_fast.vllm_plugin.video")
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(
            ARCHITECTURE, "llava_mini_fast.vllm_plugin.model:LlavaMiniForConditionalGeneration"
        )


@cache
def _refuse(reason: str) -> None:
    """Warn, and register an architecture that says why it can't be had. Nothing here may fail."""
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    try:
        from vllm import ModelRegistry

        from llava_mini_fast.hf_config import register_config
        from llava_mini_fast.vllm_plugin.refusing import refusing

        register_config()
        ModelRegistry.register_model(ARCHITECTURE, refusing(reason))
    except Exception as error:
        warnings.warn(f"{reason} (Nor can that be said later: {error}.)", RuntimeWarning, stacklevel=2)


def shadowed_triton_kernels() -> str | None:
    """A sentence if `import triton_kernels` would find this project's folder instead of OpenAI's package, else None."""
    for entry in sys.path:
        folder = Path(entry or ".") / "triton_kernels"
        if not (folder / "__init__.py").is_file():
            continue
        if not (folder.parent / "llava_mini_fast").is_dir():
            return None
        return (
            f"{folder.parent.resolve()} is on sys.path, so vLLM would import this project's triton_kernels as OpenAI's; "
            "run from another directory or set PYTHONSAFEPATH=1."
        )
    return None
