"""The registry: which ops are measured at which shapes, what each must move and compute, and its inputs from a seed.

Bytes are the least that any implementation moves: every input read once, every output written once. Operations are those
of the op's own maths: for attentions the two products over visible keys, for the others what each element takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llava_mini_fast.config import COMPRESSOR_HEADS, COMPRESSOR_LN_EPS, GRID
from llava_mini_fast.model.compressor import Compressor
from llava_mini_fast.ops.segments import Segments

Inputs = dict[str, Any]
CLIP_WIDTH, HIDDEN, HEAD_DIM = 1024, 4096, 128
IMAGE, HD = (GRID**2, 1), (5 * GRID**2, 64)
"""(patch rows, compressed rows) of a frame: 576 + 1 at 336 pixels, 2880 + 64 in high resolution."""


@dataclass(frozen=True)
class Model:
    """Widths of a published checkpoint's language model; both have hidden size 4096 and head dim 128."""

    name: str
    inner: int
    heads: int
    kv_heads: int


MODELS = (Model("vicuna", 11008, 32, 32), Model("llama", 14336, 32, 8))


@dataclass(frozen=True)
class Shape:
    """One op at one shape. `make(dtype, device="cpu")` gives the op's keyword arguments, the same at every call and device."""

    op: str
    name: str
    make: Callable[..., Inputs]
    wide: int
    """Bytes to move that are the same at every dtype (float32 constants, positions, tables)."""
    elements: int
    """Elements to move at the dtype that is measured."""
    flops: int

    def bytes(self, dtype: torch.dtype) -> int:
        return self.wide + self.elements * dtype.itemsize


BLOCK = 1_000_003
"""Numbers drawn at most; longer tensors repeat them, as drawing hundreds of millions takes longer than measuring."""


class Draw:
    """Normal numbers from one seed, in the order in which they are asked for: drawn on the CPU, repeated on `device`."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
        self.dtype, self.device, self.generator = dtype, device, torch.Generator().manual_seed(seed)

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        count = math.prod(size)
        block = torch.randn(min(count, BLOCK), generator=self.generator).to(self.device, dtype or self.dtype)
        if count > BLOCK:
            block = block.repeat(-(-count // BLOCK))[:count]
        return block.view(size)


def compressor_attention(name: str, frames: int, rows: int, queries: int, width: int = CLIP_WIDTH) -> Shape:
    """Q = `queries` learned queries over `rows` features of each frame. `module` is for the baselines: its parameters."""
    folded = COMPRESSOR_HEADS * queries

    def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        draw = Draw(dtype, device)
        with torch.device("cpu"):
            module = Compressor(round(queries**0.5), width).requires_grad_(False)
        module.to(device)
        for parameter_name, parameter in module.named_parameters():
            # matrices scaled so that scores have a spread of about one, as a trained softmax has; norms near the identity
            if parameter.dim() == 2:
                parameter.copy_(draw(*parameter.shape) * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_((draw(*parameter.shape) / 8 + parameter_name.endswith("weight")).to(dtype))
        weight, bias = (constant.clone() for constant in module.folded(rows))
        module.refold()
        return {
            "features": draw(frames, rows, width), "weight": weight, "bias": bias, "eps": COMPRESSOR_LN_EPS,
            "module": module.to(dtype),
        }  # fmt: skip

    wide = 4 * (folded * width + folded * rows + frames * folded * width)
    return Shape("compressor_attention", name, make, wide, frames * rows * width, 4 * frames * folded * rows * width)


def causal_attention(name: str, model: Model, frames: int, rows: int, last: int, head_dim: int = HEAD_DIM) -> Shape:
    """The last `last` of `rows` rows of each frame ask."""
    heads, kv_heads = model.heads, model.kv_heads

    def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        draw = Draw(dtype, device)
        sizes = {"q": (last, heads), "k": (rows, kv_heads), "v": (rows, kv_heads)}
        return {key: draw(frames, *size, head_dim) for key, size in sizes.items()}

    visible = _visible(last, rows - last)
    elements = frames * head_dim * 2 * (last * heads + rows * kv_heads)
    return Shape("causal_attention", name, make, 0, elements, 4 * frames * visible * heads * head_dim)


def prefix_attention(
    name: str, model: Model, prefix: int, lengths: Sequence[int], frames: Sequence[int], head_dim: int = HEAD_DIM
) -> Shape:
    """Segments of `lengths` text rows, each over the image state of its frame."""
    heads, kv_heads, rows = model.heads, model.kv_heads, sum(lengths)

    def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        draw = Draw(dtype, device)
        q, k, v = (draw(rows, count, head_dim) for count in (heads, kv_heads, kv_heads))
        # both halves of one image state, as pre-fusion keeps it: K and V are strided views
        state = draw(max(frames) + 1, 2, prefix, kv_heads, head_dim)
        segments = Segments.of(lengths, frames, device)
        return {"q": q, "k": k, "v": v, "prefix_k": state[:, 0], "prefix_v": state[:, 1], "segments": segments}

    elements = head_dim * 2 * (rows * heads + rows * kv_heads + len(set(frames)) * prefix * kv_heads)
    visible = sum(_visible(length, prefix) for length in lengths)
    return Shape("prefix_attention", name, make, 8 * len(lengths) + 4, elements, 4 * visible * heads * head_dim)


def rms_norm(name: str, rows: int, hidden: int = HIDDEN) -> Shape:
    """With the residual add, as in the middle of a layer."""

    def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        draw = Draw(dtype, device)
        return {"x": draw(rows, hidden), "weight": draw(hidden), "eps": 1e-5, "residual": draw(rows, hidden)}

    # an element is added, squared, summed, scaled and weighted
    return Shape("rms_norm", name, make, 0, (4 * rows + 1) * hidden, 5 * rows * hidden)


def rope(name: str, model: Model, rows: int, head_dim: int = HEAD_DIM) -> Shape:
    """Packed q, k and v of `rows` rows at positions 0, 1, ..."""
    heads, kv_heads = model.heads, model.kv_heads

    def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(rows)[:, None] * frequencies
        return {
            "packed": Draw(dtype, device)(rows, (heads + 2 * kv_heads) * head_dim),
            "positions": torch.arange(rows, device=device),
            "table": torch.cat([angles.cos(), angles.sin()], dim=-1).to(device), "heads": heads, "kv_heads": kv_heads,
        }  # fmt: skip

    elements = 2 * rows * (heads + 2 * kv_heads) * head_dim
    # a rotated element is two products and a sum
    return Shape("rope", name, make, rows * (8 + 4 * head_dim), elements, 3 * rows * (heads + kv_heads) * head_dim)


def swiglu(name: str, inner: int, rows: int) -> Shape:
    # an element is negated, raised, increased, divided and multiplied
    return Shape(
        "swiglu", name, lambda dtype, device="cpu": {"gate_up": Draw(dtype, device)(rows, 2 * inner)},
        0, 3 * rows * inner, 5 * rows * inner,
    )  # fmt: skip


def add_frames(name: str, frames: int, length: int, hidden: int = HIDDEN) -> Shape:
    """One prompt's `length` rows of each frame into their running sum."""

    def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        draw = Draw(dtype, device)
        return {
            "total": draw(length, hidden, dtype=torch.float32), "rows": draw(frames * length, hidden),
            "target": torch.arange(length, device=device).flip(0), "times": torch.ones(frames, device=device),
        }  # fmt: skip

    wide = 2 * 4 * length * hidden + 8 * length + 4 * frames
    return Shape("add_frames", name, make, wide, frames * length * hidden, 2 * frames * length * hidden)


def copied(inputs: Inputs, device: torch.device) -> Inputs:
    """The same arguments in memory of their own on `device`. `module`, which only baselines read, is moved and shared."""
    copy = {
        name: x.to(device, copy=True, memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
        if name not in ("prefix_k", "prefix_v")
    }
    if "prefix_k" in inputs:
        # K and V stay views of one image state, with its strides
        state = torch.stack([inputs["prefix_k"], inputs["prefix_v"]], dim=1).to(device)
        copy |= {"prefix_k": state[:, 0], "prefix_v": state[:, 1]}
        copy["segments"] = Segments.of(inputs["segments"].lengths, inputs["segments"].frames, device)
    if "module" in inputs:
        copy["module"] = inputs["module"].to(device)
    return copy


def kernel_shape(op: str, inputs: Inputs) -> dict[str, int]:
    """What the op tells `backend.pick` about its shape."""
    x = next(iter(inputs.values()))
    match op:
        case "compressor_attention":
            return {"queries": inputs["weight"].shape[0], "width": x.shape[2], "rows": x.shape[1]}
        case "causal_attention":
            keys, kv_heads = inputs["k"].shape[1:3]
            return {"queries": x.shape[1], "keys": keys, "head_dim": x.shape[3], "group": x.shape[2] // kv_heads}
        case "prefix_attention":
            return {"head_dim": x.shape[2], "group": x.shape[1] // inputs["k"].shape[1]}
        case "rope":
            return {"head_dim": inputs["table"].shape[1]}
        case "swiglu":
            return {"width": x.shape[1] // 2}
        case _:
            return {"width": x.shape[1]}


def _visible(queries: int, before: int) -> int:
    """(query, key) pairs of causal queries that see `before` more keys."""
    return queries * before + queries * (queries + 1) // 2


def _attentions(model: Model) -> list[Shape]:
    causal, prefix = partial(causal_attention, model=model), partial(prefix_attention, model=model)
    image, hd, tag = sum(IMAGE), sum(HD), model.name
    mixed = [60, 1, 500, 0, 20, 137, 60, 60]
    return [
        causal(f"image-{tag}", frames=1, rows=image, last=image),
        causal(f"image-last-layer-{tag}", frames=1, rows=image, last=IMAGE[1]),
        causal(f"video8-{tag}", frames=8, rows=image, last=image),
        causal(f"video32-{tag}", frames=32, rows=image, last=image),
        causal(f"video32-last-layer-{tag}", frames=32, rows=image, last=IMAGE[1]),
        causal(f"hd-{tag}", frames=1, rows=hd, last=hd),
        causal(f"hd-last-layer-{tag}", frames=1, rows=hd, last=HD[1]),
        *(prefix(f"text{n}-{tag}", prefix=image, lengths=[n], frames=[0]) for n in (20, 60, 500, 2000)),
        prefix(f"hd-text60-{tag}", prefix=hd, lengths=[60], frames=[0]),
        prefix(f"second-questions8-{tag}", prefix=image, lengths=[60] * 8, frames=[0] * 8),
        prefix(f"video8-text60-{tag}", prefix=image, lengths=[60] * 8, frames=range(8)),
        prefix(f"video32-text60-{tag}", prefix=image, lengths=[60] * 32, frames=range(32)),
        prefix(f"mixed-{tag}", prefix=image, lengths=mixed, frames=[0, 1, 2, 3, 3, 4, 5, 5]),
    ]


ROWS = {
    "text20": 20, "text60": 60, "text500": 500, "image": sum(IMAGE), "text2000": 2000, "hd": sum(HD),
    "video8": 8 * sum(IMAGE), "video32": 32 * sum(IMAGE),
}  # fmt: skip
"""Row counts of the ops that see rows alone."""

SHAPES: tuple[Shape, ...] = (
    compressor_attention("image-q1", 1, IMAGE[0], 1),
    compressor_attention("video8-q1", 8, IMAGE[0], 1),
    compressor_attention("video32-q1", 32, IMAGE[0], 1),
    compressor_attention("image-q64", 1, IMAGE[0], 64),
    compressor_attention("hd-q64", 1, 4 * GRID**2, 64),
    compressor_attention("hd-video8-q64", 8, 4 * GRID**2, 64),
    *sorted((shape for model in MODELS for shape in _attentions(model)), key=lambda shape: shape.op),
    *(rms_norm(name, rows) for name, rows in ROWS.items()),
    *(rope(f"{name}-{model.name}", model, rows) for model in MODELS for name, rows in ROWS.items()),
    *(swiglu(f"{name}-{model.name}", model.inner, rows) for model in MODELS for name, rows in ROWS.items()),
    add_frames("video8-text60", 8, 60),
    add_frames("video32-text60", 32, 60),
    add_frames("video32-text500", 32, 500),
)
OPS = tuple(dict.fromkeys(shape.op for shape in SHAPES))

_TINY = Model("tiny", 96, 4, 2)
SMALL: tuple[Shape, ...] = (
    compressor_attention("small", 2, 36, 4, width=64),
    causal_attention("small", _TINY, 3, 9, 9, head_dim=32),
    causal_attention("small-last", _TINY, 2, 9, 2, head_dim=32),
    prefix_attention("small", _TINY, 7, [3, 0, 1, 4], [1, 0, 0, 1], head_dim=32),
    rms_norm("small", 600, hidden=64),
    rope("small", _TINY, 5, head_dim=32),
    swiglu("small", 96, 5),
    add_frames("small", 3, 4, hidden=64),
)
"""Every op at a size that Triton's interpreter and compute-sanitizer bear."""


def matches(name: str, shape: Shape) -> bool:
    """Whether `name` is a shape's name or one or more of its parts: "text20" is in "text20-llama", not in "text2000-llama"."""
    return f"-{name}-" in f"-{shape.name}-"


def select(ops: Sequence[str] = (), names: Sequence[str] = ()) -> list[Shape]:
    """The shapes of some ops (all without any) that `matches` one of `names` (all without any).

    Raises:
        ValueError: an op that there is not, or a name that no shape of these ops has.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"--op must be one of {', '.join(OPS)}; got {op!r}.")
    chosen = [shape for shape in SHAPES if not ops or shape.op in ops]
    for name in names:
        if not any(matches(name, shape) for shape in chosen):
            raise ValueError(
                f"--shape {name!r} is no shape's name or a part of one; `llava-mini bench kernels --list` shows them."
            )
    return [shape for shape in chosen if not names or any(matches(name, shape) for name in names)]
