"""Reading a directory of goldens: which prompts and media it holds, and for every row what an engine must answer.

Two formats. The compact one (tests/goldens) names a recipe and real media files, one prompt a case. The wide one
stores checkpoints and preprocessed pixels and has batches, where not every published number means something:

- the published `generate()` starts every row at the batch's last column, which is padding for a row that is padded on
  the right: its fused rows are good, its tokens are not;
- with media and padding on the left, the published splice takes text rows from the wrong places;
- without an attention mask padding is text like any other, and then the numbers are good for the padded prompt.

Masks decide, never names. Where a number means nothing, the truth is the row alone: a case of one prompt with the same
ids and media where the directory has one, else the reference.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llava_mini_fast import media as lmf_media
from llava_mini_fast.config import IMAGE_SIZE, IMAGE_TOKEN_ID
from llava_mini_fast.media import Media
from llava_mini_fast.testing import checkpoints
from llava_mini_fast.testing.links import mirror

PUBLISHED = "published"
"""Must equal the published numbers."""
ALONE = "row alone"
"""The published numbers of this row mix in other rows or padding; must equal those of the row alone."""
FAILS = "published fails"
"""Two placeholders: the published code breaks off somewhere inside; must be refused with a ValueError."""
DTYPE = "dtype"
"""bfloat16 or float16: must keep to the numerics law."""
UNREADABLE = "unreadable"
"""The file describes the row in words that no program can act on. Listed, judged neither way."""

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, eq=False)
class LowPrecision:
    """What the published code did in bfloat16 or float16, beside the float32 numbers in the row itself."""

    fused: Tensor
    tokens: list[int]
    logits_error: float
    """Largest difference of the last prompt row's logits from float32."""


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt and what it must give."""

    index: int
    """Row of the published batch."""
    kind: str
    reason: str
    """Why this kind, for the table; empty where there is nothing to say."""
    prompt_ids: list[int]
    """Without the padding that doesn't count."""
    media: Media | None = None
    media_name: str = ""
    """Tells media of one directory apart."""
    fused: Tensor | None = field(default=None, repr=False)
    """(rows, H) float32; None: the reference decides."""
    tokens: list[int] | None = None
    """Greedy; None: the reference decides."""
    margins: list[float] | None = field(default=None, repr=False)
    """Gap between the best and the second logit, a step of `tokens`."""
    low: LowPrecision | None = field(default=None, repr=False)
    raw_only: str = ""
    """Why every door but `embed` and `generate_ids` refuses this prompt, or empty."""


@dataclass(frozen=True, eq=False)
class Case:
    """One golden file: a checkpoint and the rows that were run on it together."""

    name: str
    directory: Path
    checkpoint: str
    rows: list[Row] = field(default_factory=list, repr=False)
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json to change."""
    dtype: str = "float32"
    stored: bool = False
    """The checkpoint lies in `directory` (wide format) instead of being generated from a recipe."""
    problem: str = ""
    """Why the files of this case can't be read; the case then has no rows, and counts as failed."""

    def checkpoint_directory(self) -> Path:
        """The checkpoint, ready to load: generated or, of a stored one, links laid out anew; kept between processes."""
        if not self.stored:
            return checkpoints.cached(self.checkpoint, self.directory, self.overrides)
        plain = mirror(self.directory / self.checkpoint)
        return checkpoints.with_overrides(plain, self.overrides) if self.overrides else plain


def load_cases(directory: str | Path) -> list[Case]:
    """Every case under `directory`/cases, by name, in either format.

    Raises:
        FileNotFoundError: the directory has no cases.
    """
    directory = Path(directory)
    files = sorted((directory / "cases").glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{directory} has no cases/*.json; give a directory of goldens.")
    cases = [_load(directory, file) for file in files]
    return [replace(case, rows=[_alone(row, case, cases) for row in case.rows]) for case in cases]


def _load(directory: Path, file: Path) -> Case:
    name, checkpoint = file.stem, ""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        checkpoint = info.get("ckpt") or info["checkpoint"]
        tensors = load_file(file.with_suffix(".safetensors"))
        return (_wide if "ckpt" in info else _compact)(directory, name, info, tensors)
    except KeyError as error:
        problem = f"lacks {error}"
    except (OSError, ValueError, IndexError, TypeError, AttributeError, SafetensorError) as error:
        problem = str(error)
    return Case(name, directory, checkpoint, problem=f"can't be read: {problem}")


def _compact(directory: Path, name: str, info: dict[str, Any], tensors: dict[str, Tensor]) -> Case:
    media, media_name = None, ""
    if isinstance(info["media"], str):
        media_name = info["media"]
        media = lmf_media.image(_existing(directory / "media" / media_name), as_published=True)
    elif info["media"]:
        names = info["media"]["frames"]
        media_name = " ".join(names)
        media = lmf_media.video(_frames([_existing(directory / "media" / frame) for frame in names]))
    overrides, ids = info["config_overrides"], info["prompt_ids"]
    fused = tensors["inputs_embeds"][0]
    row = Row(
        0,
        PUBLISHED,
        "",
        ids,
        media,
        media_name,
        fused,
        info["generated_ids"],
        tensors["generated_margin"].flatten().tolist(),
        raw_only=_raw_only(ids, media, fused, overrides),
    )
    return Case(name, directory, info["checkpoint"], [row], overrides)


def _wide(directory: Path, name: str, info: dict[str, Any], tensors: dict[str, Tensor]) -> Case:
    if not (directory / info["ckpt"] / "config.json").is_file():
        raise FileNotFoundError(f"the checkpoint {info['ckpt']} has no config.json")
    overrides = info.get("config_overrides", {})
    case = Case(name, directory, info["ckpt"], [], overrides, _DTYPES[info.get("dtype", "fp32")], stored=True)
    prompts = tensors["input_ids"]
    sources = _sources(directory, info["pixels"], len(prompts))
    rows = [_wide_row(n, tensors, sources[n], info, overrides) for n in range(len(prompts))]
    if case.dtype != "float32":
        base = load_file(directory / "cases" / f"{info['base_case']}.safetensors")
        rows = [_low(row, base, tensors) for row in rows]
    return replace(case, rows=rows)


def _wide_row(n: int, tensors: dict[str, Tensor], source: _Source, info: dict[str, Any], overrides: dict) -> Row:
    padded = tensors["input_ids"][n]
    batch = len(tensors["input_ids"])
    mask = tensors.get("input_attention_mask")
    if mask is not None:
        counted = mask[n].bool()
    elif "error" in info and batch > 1:  # such cases record no mask; their padding repeats one id at the end
        counted = _before_repeated_end(padded)
    else:
        counted = torch.ones_like(padded, dtype=torch.bool)
    ids = padded[counted].tolist()
    row = Row(n, PUBLISHED, "", ids, source.media, source.name)

    if "error" in info:
        failure = info["error"]["type"]
        if ids.count(IMAGE_TOKEN_ID) > 1:
            media = source.media or _blank(source.words)
            return replace(row, kind=FAILS, reason=f"{failure} in the published code", media=media)
        if source.media is None:
            return replace(row, kind=UNREADABLE, reason=f"pixels: {source.words!r}")
        return replace(row, kind=ALONE, reason=f"the published code fails on the batch ({failure})")
    if source.media is None and source.words:
        return replace(row, kind=UNREADABLE, reason=f"pixels: {source.words!r}")
    if source.media is not None and not counted[0]:
        return replace(row, kind=ALONE, reason="left padding: the published splice takes rows of the padding")

    out = tensors.get("out_attention_mask")
    kept = out[n].bool() if out is not None else torch.ones(tensors["inputs_embeds"].shape[1], dtype=torch.bool)
    fused = tensors["inputs_embeds"][n][kept]
    row = replace(row, fused=fused, raw_only=_raw_only(ids, source.media, fused, overrides))
    if not kept[-1]:
        return replace(row, kind=ALONE, reason="fused rows as published; its generate() starts this row at padding")
    if batch > 1 and mask is None and not _before_repeated_end(padded).all():
        row = replace(row, reason="no attention mask: padding is part of the prompt")
    return replace(row, tokens=tensors["generated_ids"][n].tolist(), margins=tensors["generated_margin"][n].tolist())


def _low(row: Row, base: dict[str, Tensor], low: dict[str, Tensor]) -> Row:
    """The row of a bfloat16 or float16 run, with the float32 run's numbers as the truth."""
    n = row.index
    error = (low["logits_last"][n] - base["logits_last"][n]).abs().max().item()
    return replace(
        row,
        kind=DTYPE,
        fused=base["inputs_embeds"][n],
        tokens=base["generated_ids"][n].tolist(),
        margins=base["generated_margin"][n].tolist(),
        low=LowPrecision(row.fused, row.tokens, error),
    )


def _alone(row: Row, case: Case, cases: list[Case]) -> Row:
    """An ALONE row with what it lacks taken from the published case that is this row and nothing else."""
    if row.kind != ALONE:
        return row
    same = (case.checkpoint, _model_overrides(case), "float32")
    for other in cases:
        if len(other.rows) != 1 or (other.checkpoint, _model_overrides(other), other.dtype) != same:
            continue
        (single,) = other.rows
        equal = single.prompt_ids == row.prompt_ids and single.media_name == row.media_name
        if equal and single.kind == PUBLISHED:
            fused = single.fused if row.fused is None else row.fused
            reason = f"{row.reason}; truth: {other.name}"
            return replace(row, fused=fused, tokens=single.tokens, margins=single.margins, reason=reason)
    return replace(row, reason=f"{row.reason}; truth: the reference")


def _model_overrides(case: Case) -> dict[str, Any]:
    """The overrides that one row alone can feel: the padding side is none."""
    return {key: value for key, value in case.overrides.items() if key != "tokenizer_padding_side"}


def _raw_only(ids: list[int], media: Media | None, fused: Tensor, overrides: dict[str, Any]) -> str:
    if media is not None and IMAGE_TOKEN_ID not in ids:
        return "media without placeholder"
    limit = overrides.get("tokenizer_model_max_length")
    return f"cut at {limit} rows" if limit is not None and len(fused) == limit else ""


@dataclass(frozen=True, eq=False)
class _Source:
    """Media of one row: None with empty `words` is text only, None with words couldn't be read from them."""

    media: Media | None = None
    name: str = ""
    words: str = ""


def _sources(directory: Path, pixels: dict[str, Any] | None, count: int) -> list[_Source]:
    """The media of a wide case's rows. `pixels` says it partly in words; these forms are understood:

    - `file` (one) and `key`: one row, an image of shape (V, ...) or a video of shape (T, V, ...);
    - `file` "a + b" and `images` "stack ...": one image a row;
    - `images` "list [a[:n] (...), b (...)]": one file of pixels/ a row, cut to its first n frames where it says so.

    Anything else is left to the reader, in `words`.
    """
    if pixels is None:
        return [_Source()] * count
    words, key = pixels.get("images", ""), pixels.get("key", "pixel_values")
    files = pixels["file"].split(" + ") if "file" in pixels else []
    if files and len(files) == count and (count == 1 or words.startswith("stack")):
        return [_stored(directory / file, key, file) for file in files]
    items = re.findall(r"(\w+)(?:\[:(\d+)\])? \(\d-dim\)", words)
    if words.startswith("list [") and len(items) == count:
        named = [(f"pixels/{name}.safetensors", int(frames) if frames else None) for name, frames in items]
        return [_stored(directory / file, key, file, frames) for file, frames in named]
    return [_Source(words=words or "nothing said")] * count


def _stored(path: Path, key: str, name: str, frames: int | None = None) -> _Source:
    pixels = load_file(_existing(path))[key].float()
    if frames is not None:
        pixels, name = pixels[:frames], f"{name}[:{frames}]"
    return _Source(lmf_media.image(pixels) if pixels.ndim == 4 else lmf_media.video(pixels), name)


def _blank(words: str) -> Media:
    """Grey media for a prompt that must be refused whatever it shows: of the shape "(rows, V, 3, 336, 336)" or
    "(rows, T=n, V, 3, 336, 336)" that stands in the words, else an image."""
    found = re.search(r"\(\d+,(?:T=(\d+),)?(\d+),3,336,336\)", words)
    frames, views = found.groups() if found else (None, "1")
    view = torch.zeros(int(views), 3, IMAGE_SIZE, IMAGE_SIZE)
    return lmf_media.image(view) if frames is None else lmf_media.video(view.repeat(int(frames), 1, 1, 1, 1))


def _before_repeated_end(ids: Tensor) -> Tensor:
    """Bool mask that leaves out a tail of two or more equal ids: right padding."""
    tail = int((ids.flip(0) == ids[-1]).int().cumprod(0).sum())
    return torch.arange(len(ids)) < len(ids) - (tail if tail > 1 else 0)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent.name}/{path.name} is missing")
    return path


def _frames(paths: list[Path]):
    """Picture files of one size -> uint8 (T, h, w, 3), as if decoded from a clip."""
    import numpy as np
    from PIL import Image

    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
