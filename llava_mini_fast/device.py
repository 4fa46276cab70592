"""Which device to run on."""

from __future__ import annotations

import torch


def choose_device(name: str | torch.device) -> torch.device:
    """The torch device for "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: another name, or a CUDA device that is not here; the message says why.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda with a number, as cuda:1; got {str(name)!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            reason = "no GPU or no driver" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
            raise ValueError(
                f"device is {str(name)!r}, and torch finds no CUDA device here: {reason}. cpu works everywhere."
            )
        if (device.index or 0) >= count:
            raise ValueError(f"device is {str(name)!r}, and there are {count} CUDA devices here, from cuda:0 on.")
    return device
