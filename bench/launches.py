"""What the front end asks of a CUDA device, counted on tensors without data: `python -m llava_mini_fast.bench.launches`.

No device is needed: kernels are counted, not run. A cold image and a question are bound by launches long before they are bound
by arithmetic, so these counts are what a change must not raise. An op is one launch, whatever a library makes of it; a copy is
one from host to device; a sync makes the host wait for the device.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_mini_fast.bench.frontend import MODELS, TEXT_ROWS, front_config
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.fusion import FusionFrontEnd
from llava_mini_fast.preprocess.views import Views

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
SYNCS = ("nonzero", "_local_scalar_dense", "masked_select", "unique")
OUR_OPS = "llava_mini"
"""How the namespaces of this project's ops begin."""


@dataclass
class Counts:
    """What one call asked of the device; `ops` says which ops were launched how often."""

    launches: int = 0
    copies: int = 0
    syncs: int = 0
    ops: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, int]:
        return {"launches": self.launches, "copies": self.copies, "syncs": self.syncs}


class _Counting(TorchDispatchMode):
    """Sees every op under the modules, after composite ones have been taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in given}
        if func.namespace.startswith(OUR_OPS) and len(devices) > 1:
            raise ValueError(f"{func} got tensors on {' and '.join(sorted(devices))}.")
        shared = {x.untyped_storage()._cdata for x in given}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = func._schema.name.partition("::")[2]
        if "cuda" in devices | {x.device.type for x in made}:
            fresh = any(x.untyped_storage()._cdata not in shared for x in made)
            self._count(name, func._schema.is_mutable, fresh, given, made)
        return result

    def _count(self, name: str, mutable: bool, fresh: bool, given: list[Tensor], made: list[Tensor]) -> None:
        source, target = (x[0].device.type if x else "" for x in (given[1:] if name == "copy_" else given, made))
        if name in ("_to_copy", "copy_") and source != target:
            if target == "cuda":
                self.counts.copies += 1
            else:
                self.counts.syncs += 1
        elif name in SYNCS:
            self.counts.syncs += 1
        elif (mutable or fresh) and name not in ALLOCATIONS:
            self.counts.launches += 1
            self.counts.ops[name] += 1


_counting: list[_Counting] = []
"""The mode in charge, for what is counted above the dispatcher."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """scaled_dot_product_attention as one launch: without a device torch would take it apart."""
    devices = {x.device for x in (query, key, value)}
    if len(devices) > 1:
        raise ValueError(f"scaled_dot_product_attention got tensors on {' and '.join(map(str, devices))}.")
    if _counting and query.device.type == "cuda":
        _counting[-1].counts.launches += 1
        _counting[-1].counts.ops["scaled_dot_product_attention"] += 1
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _viewed(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """x with a key's integers and slices applied, and the index tensors that are left, None where there is none."""
    dim, indices = 0, []
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
            indices.append(None)
        elif part is None:
            x = x.unsqueeze(dim)
            indices.append(None)
        elif isinstance(part, list):
            indices.append(torch.tensor(part).to(x.device))  # as torch does: made on the CPU, then copied
        else:
            indices.append(part)
        dim += 1
    return x, indices if any(index is not None for index in indices) else []


def _getitem(x: Tensor, key: Any) -> Tensor:
    x, indices = _viewed(x, key)
    return torch.ops.aten.index.Tensor(x, indices) if indices else x


def _setitem(x: Tensor, key: Any, value: Any) -> None:
    x, indices = _viewed(x, key)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    if indices:
        torch.ops.aten.index_put_(x, indices, value)
    else:
        _copy_(x, value)


def _copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.ops.aten.copy_(x, source, non_blocking)


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made within have no data, and may be "on CUDA" whatever torch was built for.

    Four of Tensor's methods and SDPA are replaced meanwhile: torch's own look for the device before they dispatch.
    """

    def ours(function: Callable, own: Callable) -> Callable:
        return lambda x, *args, **kwargs: (function if x.device.type == "cuda" else own)(x, *args, **kwargs)

    changed = {"__getitem__": _getitem, "__setitem__": _setitem, "copy_": _copy_, "contiguous": _contiguous}
    own = {name: getattr(torch._C.TensorBase, name) for name in changed}
    new = {name: ours(function, own[name]) for name, function in changed.items()}
    with (
        mock.patch.multiple(torch.Tensor, **new),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
        FakeTensorMode(),
    ):
        yield


def count(run: Callable[[], Any]) -> Counts:
    """What `run` asks of the device, within `fake_cuda`.

    Raises:
        ValueError, RuntimeError: an op got tensors on two devices.
    """
    with _Counting() as mode:
        _counting.append(mode)
        try:
            run()
        finally:
            _counting.pop()
    return mode.counts


def front_end(config: LlavaMiniConfig, dtype: torch.dtype = torch.bfloat16) -> FusionFrontEnd:
    """A front end on the fake device, within `fake_cuda`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            table = torch.empty(config.vocab_size, config.hidden_size)
            front = FusionFrontEnd(config, lambda ids: torch.nn.functional.embedding(ids, table))
    finally:
        torch.set_default_dtype(before)
    return front.requires_grad_(False).eval()


def situations(name: str = "llama", small: bool = False) -> dict[str, Counts]:
    """Counts of the front end at a published model's widths, in bfloat16 and with the backend that "auto" takes on CUDA.

    `small`: with tiny widths and few layers.
    """
    config, found, number = front_config(name, small=small), {}, 0

    def frames(count: int, views: int = 1) -> Views:
        nonlocal number
        number += count
        digests = tuple(f"{number} {n}".encode() for n in range(count))
        return Views("video", torch.empty(count, views, 3, 336, 336, dtype=torch.uint8), digests)

    with fake_cuda():
        front = front_end(config)
        ids = [1, -200, *range(2, TEXT_ROWS + 1)]
        front.fuse([(ids, frames(1))])  # the folded constants and the rotary table are made once
        image = frames(1)
        found["cold image"] = count(lambda: front.fuse([(ids, image)]))
        found["second question"] = count(lambda: front.fuse([(ids[:-1], image)]))
        found["32 second questions"] = count(lambda: front.fuse([(ids[:-1], image)] * 32))
        for number_of_frames in (15, 32):
            clip = frames(number_of_frames)
            found[f"{number_of_frames} frames"] = count(lambda clip=clip: front.fuse([(ids, clip)]))
    return found


def render(found: dict[str, Counts], ops: int) -> str:
    """The counts as text, with the most frequent ops of each."""
    lines = [f"{'':22s}{'launches':>10s}{'copies':>8s}{'syncs':>7s}"]
    for name, c in found.items():
        lines.append(f"{name:22s}{c.launches:10d}{c.copies:8d}{c.syncs:7d}")
        lines += [f"  {op:36s}{times:6d}" for op, times in c.ops.most_common(ops)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini_fast.bench.launches",
        description="Count launches, host-to-device copies and syncs of the front end on a CUDA device that need not be here.",
        epilog="example: python -m llava_mini_fast.bench.launches --model vicuna --ops 10",
    )
    parser.add_argument("--model", choices=MODELS, default="llama", help="whose widths (default: %(default)s)")
    parser.add_argument("--ops", type=int, default=0, help="show this many ops of each situation")
    parser.add_argument("--small", action="store_true", help="tiny widths and few layers, to try the command")
    args = parser.parse_args(argv)
    print(render(situations(args.model, args.small), args.ops))


if __name__ == "__main__":
    main()
