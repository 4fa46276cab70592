"""Triton's interpreter, repaired for tests, and a checker that watches every load, store and atomic of a launch.

Import it with TRITON_INTERPRET=1, before any kernel is decorated. Triton 3.6 to 3.9 keep bfloat16 as 16-bit integers
and calculate with those, silently: `repair` makes arithmetic, products, comparisons and casts of bfloat16 right.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("llava_mini_fast.triton_kernels.interpreted needs TRITON_INTERPRET=1.")

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to the nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: Handle) -> Handle:
    return Handle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def repair() -> None:
    """Make the interpreter calculate bfloat16 rightly, sum 16-bit products in float32, and run autotuned kernels."""
    binary, unary, cast, to_float = Builder.binary_op, Builder.unary_op, Builder.cast_impl, Builder.create_fp_to_fp

    def dot(self, a, b, acc, precision, imprecise):
        left, right = (_as_float32(x).data.astype(np.float32) for x in (a, b))
        return Handle((np.matmul(left, right) + acc.data).astype(acc.data.dtype), acc.dtype.scalar)

    def binary_op(self, left, right, op):
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return binary(self, left, right, op)
        result = op(_as_float32(left).data, _as_float32(right).data)
        return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(narrow(result), tl.bfloat16)

    def unary_op(self, x, op):
        if not _is_bfloat16(x):
            return unary(self, x, op)
        return Handle(narrow(op(widen(x.data))), tl.bfloat16)

    def cast_impl(self, x, target):
        if not (_is_bfloat16(x) or target.scalar == tl.bfloat16):
            return cast(self, x, target)
        x = _as_float32(x)
        if target.scalar == tl.bfloat16:
            return Handle(narrow(x.data.astype(np.float32)), tl.bfloat16)
        return x if target.scalar == tl.float32 else cast(self, x, target)

    def fp_to_fp(self, x, target, rounding):
        if rounding is None and tl.bfloat16 in (x.dtype.scalar, target.scalar):
            return cast_impl(self, x, target)
        return to_float(self, x, target, rounding)

    Builder.create_dot, Builder.binary_op, Builder.unary_op = dot, binary_op, unary_op
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, fp_to_fp
    # the tuner looks for a GPU to time on; here every configuration runs, and the first wins
    Autotuner.do_bench = property(lambda self: lambda call, quantiles=None: (call(), (0.0, 0.0, 0.0))[1])


repair()


class Watch:
    """What the launches within `watch` did to the tensors that they may touch.

    loads, stores: name -> int64 (elements,), how often each element was read or written. errors: sentences.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._spans = []
        self.loads, self.stores, self.errors = {}, {}, []
        for name, tensor in tensors.items():
            storage, size = tensor.untyped_storage(), tensor.element_size()
            self._spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), size, name))
            for counts in (self.loads, self.stores):
                counts[name] = np.zeros(storage.nbytes() // size, np.int64)
        self.launch()

    def launch(self) -> None:
        """Forget who touched what: launches follow one another, programs of one don't."""
        self._readers, self._writers, self._adders = ({name: {} for *_, name in self._spans} for _ in range(3))

    def touch(self, kind: str, pointers: Handle, mask: np.ndarray) -> None:
        """Count one load, store or atomic, and note every wrong in it. IndexError on the first lane out of bounds."""
        program = tuple(interpreter.interpreter_builder.grid_idx)
        addresses, mask = np.broadcast_arrays(np.asarray(pointers.data, np.uint64), np.asarray(mask, bool))
        addresses = addresses[mask].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        known = np.zeros(addresses.shape, bool)
        for low, high, element, name in self._spans:
            here = (addresses >= low) & (addresses + size <= high)
            if here.any():
                known |= here
                self._count(kind, name, (addresses[here] - low) // element, program)
        if not known.all():
            raise IndexError(f"{kind}: {int((~known).sum())} lanes of program {program} are out of bounds")

    def _count(self, kind: str, name: str, elements: np.ndarray, program: tuple) -> None:
        unique, times = np.unique(elements, return_counts=True)
        if kind == "store" and (times > 1).any():
            self.errors.append(f"{name}: two lanes of program {program} store to one element")
        if kind in ("load", "atomic"):
            self.loads[name][unique] += times
        if kind in ("store", "atomic"):
            self.stores[name][unique] += times
        seen = {"load": self._readers, "store": self._writers, "atomic": self._adders}[kind][name]
        seen.setdefault(program, []).append(unique)

    def settle(self) -> None:
        """Compare what the programs of the last launch did with one another."""
        for *_, name in self._spans:
            writers, readers, adders = (
                {program: np.unique(np.concatenate(parts)) for program, parts in seen[name].items()}
                for seen in (self._writers, self._readers, self._adders)
            )
            size = len(self.loads[name])
            written, added = _by_how_many(writers, size), _by_how_many(adders, size)
            if (written > 1).any():
                self.errors.append(f"{name}: {(written > 1).sum()} elements are stored by several programs")
            if ((written > 0) & (added > 0)).any():
                self.errors.append(f"{name}: elements are stored and added to atomically")
            for program, elements in readers.items():
                others = written[elements] + added[elements]
                for mine in (writers.get(program), adders.get(program)):
                    if mine is not None:
                        others = others - np.isin(elements, mine)
                if (others > 0).any():
                    self.errors.append(f"{name}: program {program} reads what another program writes")
        self.launch()


def _by_how_many(programs: dict[tuple, np.ndarray], size: int) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for elements in programs.values():
        counts[elements] += 1
    return counts


@contextmanager
def watch(seed: int = 0, **tensors: torch.Tensor) -> Iterator[Watch]:
    """Launches within run under a `Watch` of `tensors`, by name, their programs in a shuffled order.

    Every tensor that a kernel may touch must be named; what the wrappers allocate with torch.empty meanwhile is added
    as "scratch 0", "scratch 1", ... and filled with NaN. AssertionError at the end when anything was wrong.
    """
    w, kept = Watch(tensors), []
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas", "set_grid_dim",
             "set_grid_idx")  # fmt: skip
    old = {name: getattr(Builder, name) for name in names}
    call, new_empty = interpreter.GridExecutor.__call__, torch.Tensor.new_empty
    order: list[int] = []

    def load(self, pointers, mask, *rest):
        w.touch("load", pointers, mask.data)
        return old["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        w.touch("store", pointers, mask.data)
        return old["create_masked_store"](self, pointers, value, mask, *rest)

    def rmw(self, op, pointers, value, mask, *rest):
        w.touch("atomic", pointers, mask.data)
        return old["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def cas(self, pointers, *rest):
        w.touch("atomic", pointers, np.ones(pointers.data.shape, bool))
        return old["create_atomic_cas"](self, pointers, *rest)

    def grid_dim(self, x, y, z):
        old["set_grid_dim"](self, x, y, z)
        order[:] = range(x * y * z)
        random.Random(seed).shuffle(order)

    def grid_idx(self, x, y, z):
        _, ny, nz = self.grid_dim
        place = order[(x * ny + y) * nz + z]
        old["set_grid_idx"](self, place // (ny * nz), place // nz % ny, place % nz)

    def launch(self, *args, **kwargs):
        call(self, *args, **kwargs)
        w.settle()

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.numel():
            tensor.fill_(float("nan"))
            kept.append(tensor)  # so that no later tensor takes its place in memory
            storage = tensor.untyped_storage()
            name = f"scratch {len(kept) - 1}"
            w._spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), tensor.element_size(), name))
            w.loads[name], w.stores[name] = (np.zeros(tensor.numel(), np.int64) for _ in range(2))
            w.launch()
        return tensor

    new = dict(zip(names, (load, store, rmw, cas, grid_dim, grid_idx)))
    try:
        for name, function in new.items():
            setattr(Builder, name, function)
        interpreter.GridExecutor.__call__ = launch
        torch.Tensor.new_empty = poisoned
        yield w
    finally:
        for name, function in old.items():
            setattr(Builder, name, function)
        interpreter.GridExecutor.__call__, torch.Tensor.new_empty = call, new_empty
    assert not w.errors, "; ".join(dict.fromkeys(w.errors))
