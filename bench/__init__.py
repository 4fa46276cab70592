"""Benchmarks; installed as `llava_mini_fast.bench`."""
