"""Triton kernels, one file an op; installed as `llava_mini_fast.triton_kernels`. Nothing else in the package imports triton."""
