"""All kernels under ThreadSanitizer, and under AddressSanitizer and UndefinedBehaviorSanitizer, by csrc/testing/driver.cpp."""

import os
import subprocess

import pytest


@pytest.mark.parametrize("flavour", ["tsan", "asan"])
def test_clean(build, flavour):
    driver = build.link(flavour, "driver")
    for seed in (1, 2):
        done = subprocess.run(
            [driver], env=os.environ | {"LMF_SEED": str(seed)}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-6000:]
        assert done.stdout.split() == ["rms_norm", "rope", "swiglu", "add_frames", "attention", "compressor_attention"]
