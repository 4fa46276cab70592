"""A Triton backend in name: the interpreter asks it for nothing."""

from triton.backends.compiler import BaseBackend


class CPUBackend(BaseBackend):
    @staticmethod
    def supports_target(target) -> bool:
        return target.backend == "cpu"


# what is abstract is about compiling
CPUBackend.__abstractmethods__ = frozenset()
