"""The shapes at which every kernel is held to the law: one list, for Triton's interpreter and for devices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Keyword arguments of an op's check; `slow` ones take the interpreter seconds and a device nothing."""

    op: str
    shape: dict
    slow: bool = False

    @property
    def id(self):
        return f"{self.op}-{' '.join(f'{name}={value}' for name, value in self.shape.items()) or 'usual'}"


def of(op, *shapes, slow=()):
    return [*(Case(op, shape) for shape in shapes), *(Case(op, shape, slow=True) for shape in slow)]


CASES = [
    *of("rms_norm", {}, dict(rows=0), dict(rows=1, width=4096, add=False), dict(rows=2, width=1),
        slow=[dict(rows=7, width=5120), dict(rows=2, width=16384)]),
    *of("swiglu", {}, dict(rows=0), dict(rows=1, width=2049), dict(rows=2, width=1),
        slow=[dict(rows=2, width=14336)]),
    *of("rope", {}, dict(rows=0), dict(heads=0), dict(heads=3, kv_heads=3, d=64), dict(heads=17, kv_heads=1, d=128, rows=1),
        slow=[dict(heads=32, kv_heads=8, d=128, rows=7)]),
    *of("add_frames", {}, dict(frames=1, length=1, width=1), dict(frames=5, length=5, width=513), dict(frames=0),
        slow=[dict(frames=5, length=5, width=4096)]),
    *of("prefix_attention", {}, dict(prefix=0), dict(lengths=(1,), used=(2,), prefix=1), dict(lengths=(0, 0), used=(0, 1)),
        dict(heads=3, kv_heads=3, d=64, prefix=64, lengths=(65,), used=(0,)),
        dict(heads=4, kv_heads=1, d=128, prefix=129, lengths=(33, 2), used=(2, 1)),
        slow=[dict(heads=6, kv_heads=2, d=128, prefix=577, lengths=(60, 7, 60), used=(0, 2, 1)),
              dict(heads=2, kv_heads=2, d=128, prefix=65, lengths=(200,), used=(1,)),
              dict(heads=8, kv_heads=1, d=64, prefix=3, lengths=(17, 40), used=(0, 0))]),
    *of("causal_attention", {}, dict(last=1), dict(last=11), dict(heads=3, kv_heads=1, d=64, last=33, rows=70),
        slow=[dict(heads=4, kv_heads=4, d=128, last=130, rows=130), dict(d=128, last=4, rows=577)]),
    *of("compressor_attention", {}, dict(rows=1, queries=3), dict(frames=0), dict(rows=37, width=192, weights=True),
        dict(queries=72, rows=36, width=128, frames=1), dict(rows=576, width=256, frames=1),
        slow=[dict(rows=576, width=1024), dict(queries=512, rows=144, width=256), dict(queries=32, rows=65, width=576, weights=True),
              dict(queries=40, rows=2304, width=64, frames=1)]),
]  # fmt: skip
