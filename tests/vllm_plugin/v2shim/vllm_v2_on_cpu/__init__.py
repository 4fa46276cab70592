"""See the README beside this package."""

import os


def register() -> None:
    """vLLM calls this in each of its processes."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import vllm.v1.sample.ops.topk_topp_sampler as sampler

    # its kernel converts with `.to` what in the interpreter is a plain int; vLLM has a PyTorch path too
    sampler.HAS_TRITON = False
    _store_under_any_mask()


def _store_under_any_mask() -> None:
    """Compiled kernels take integers as masks (vLLM's grammar bitmask does so); let the interpreter take them too."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    store = InterpreterBuilder.create_masked_store

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        if mask.data.dtype != np.bool_:
            mask = TensorHandle(mask.data != 0, tl.int1)
        return store(self, pointers, value, mask, *rest, **options)

    InterpreterBuilder.create_masked_store = create_masked_store
