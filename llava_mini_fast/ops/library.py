"""Kernels as torch library ops, so that torch.compile and CUDA graphs pass through them."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARIES: dict[str, torch.library.Library] = {}
"""Kept for ever: an op goes away with the library that defined it."""


def define(namespace: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Define `namespace::op` and return it as a function.

    Args:
        schema: "op(Tensor x, float eps) -> Tensor".
        run: what it does, on any device.
        fake: the same signature on tensors without data: allocates outputs of the right shape, dtype and device.
    """
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library, name = _LIBRARIES[namespace], schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, namespace), name).default
