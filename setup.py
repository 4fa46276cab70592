"""Build logic only; the metadata is in pyproject.toml.

The folders of the top level become parts of one package: nothing is importable under the bare names `triton_kernels` and
`bench` (vLLM looks for OpenAI's package of the first name).
"""

from setuptools import find_packages, setup

rooms = {"llava_mini_fast.triton_kernels": "triton_kernels", "llava_mini_fast.bench": "bench"}

setup(
    packages=find_packages(include=["llava_mini_fast", "llava_mini_fast.*"]) + list(rooms),
    package_dir={"llava_mini_fast": "llava_mini_fast", **rooms},
)
