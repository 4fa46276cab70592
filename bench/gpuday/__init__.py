"""A day on a GPU in nine minutes: `python -m llava_mini_fast.bench.gpuday --help`."""
