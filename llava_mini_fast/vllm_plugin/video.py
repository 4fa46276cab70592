"""vLLM's video loader for this model: the published frame rule, on PyAV, whatever the container."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_mini_fast.preprocess.limits import Limits
from llava_mini_fast.preprocess.video import frames
from llava_mini_fast.vllm_plugin.compat.media import VideoLoader


class Loader(VideoLoader):
    """Decodes a clip to the frames that the model sees: one a second, 336 x 336."""

    @classmethod
    def load_bytes(cls, data: bytes, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Clip bytes -> frames (T, 336, 336, 3) uint8 and vLLM's metadata. vLLM's own sampling options are not used.

        Raises:
            MediaError (a ValueError): the bytes are no clip, or one beyond the limits.
        """
        chosen = np.stack(list(frames(data, Limits.from_env())))
        metadata = {
            "total_num_frames": len(chosen),
            "fps": 1.0,
            "duration": float(len(chosen)),
            "video_backend": "llava_mini",
            "frames_indices": list(range(len(chosen))),
            "do_sample_frames": False,
        }
        return chosen, metadata
