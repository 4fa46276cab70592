"""Tiny checkpoints in the published format whose every weight is drawn from a seed, so that none is ever stored.

A recipe (see `data/recipes.json`) says seed, sizes and config. Each tensor comes from a random stream of its own, a
function of the recipe's seed and the tensor's name alone, through numpy's RandomState, whose numbers are frozen:
the goldens were computed by the published code on exactly these bits. Scales are chosen so that activations stay of
order one and every part of the model moves the answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_mini_fast.config import GRID, PATCH_SIZE

DATA = Path(__file__).parent / "data"
"""Recipes and the tokenizer, installed with the package: a checkpoint can be made without the tests folder."""

COMPRESSOR_WIDTH = 1024
"""The published compressor's, and so the seeded towers': it doesn't follow the config."""

_PREFIX = "model.vision_tower.vision_tower."


def recipes(directory: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """Recipe by checkpoint name: of `directory`/recipes.json where there is one, else the package's own."""
    own = None if directory is None else Path(directory) / "recipes.json"
    path = own if own and own.is_file() else DATA / "recipes.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    return {name: file["shared"] | recipe for name, recipe in file["checkpoints"].items()}


def recipe_named(name: str, directory: str | Path | None = None) -> dict[str, Any]:
    """One recipe.

    Raises:
        ValueError: no recipe of that name.
    """
    known = recipes(directory)
    if name not in known:
        raise ValueError(f"there is no recipe for a checkpoint named {name!r}; known: {', '.join(sorted(known))}.")
    return known[name]


def make_checkpoint(recipe: Mapping[str, Any], out: str | Path, tokenizer_dir: str | Path | None = None) -> Path:
    """Write the recipe's checkpoint to `out`: config, generation config, weights, tokenizer, and the tower in `clip/`.

    Nothing happens where `out` holds a checkpoint already. Several processes may make the same one at once.

    Args:
        recipe: one value of `recipes()`.
        out: the directory to make.
        tokenizer_dir: whose files are copied in; the package's byte-level BPE when None.

    Returns:
        `out`.
    """
    out, tokenizer_dir = Path(out), Path(tokenizer_dir or DATA / "tokenizer")
    with _appearing(out) as folder:
        if folder is not None:
            _write(recipe, folder, tokenizer_dir)
    return out


def cached(name: str, goldens_dir: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Path:
    """The named checkpoint in this user's temporary directory, made on the first call of any process.

    Args:
        name: of the recipe.
        goldens_dir: whose recipes count, else the package's.
        overrides: config.json keys to change; the result then shares the other files with the plain checkpoint.
    """
    recipe, tokenizer = recipe_named(name, goldens_dir), _tokenizer(goldens_dir)
    # This file counts too: who changes the generator must not meet yesterday's checkpoints.
    files = [Path(__file__), *sorted(tokenizer.iterdir())]
    plain = cache_root() / f"{name}-{_digest(recipe, *(file.read_bytes() for file in files))}"
    make_checkpoint(recipe, plain, tokenizer)
    return with_overrides(plain, overrides) if overrides else plain


def with_overrides(source: Path, overrides: Mapping[str, Any]) -> Path:
    """A directory beside `source` of links to its files, but for a config.json with `overrides` applied."""
    out = source.with_name(f"{source.name}-{_digest(dict(overrides))}")
    with _appearing(out) as folder:
        if folder is not None:
            for entry in source.iterdir():
                if entry.name != "config.json":
                    (folder / entry.name).symlink_to(entry.resolve())
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            _write_json(folder / "config.json", config | dict(overrides))
    return out


def cache_root() -> Path:
    """Where this user's generated checkpoints lie, under the temporary directory; deleting it is always safe.

    Raises:
        PermissionError: the directory belongs to someone else, whose files are not to be trusted.
    """
    root = Path(tempfile.gettempdir()) / f"llava-mini-fast-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; remove it or set TMPDIR to a directory of your own.")
    return root


class _Draw(NamedTuple):
    """The normal distribution that a tensor is drawn from."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def _matrix(name: str, rows: int, columns: int, gain: float, bias: bool = False) -> dict[str, _Draw]:
    """A linear layer whose output has about `gain` times its input's scale."""
    drawn = {f"{name}.weight": _Draw((rows, columns), gain * columns**-0.5)}
    return drawn | ({f"{name}.bias": _Draw((rows,), 0.1)} if bias else {})


def _norm(name: str, width: int, bias: bool = False) -> dict[str, _Draw]:
    drawn = {f"{name}.weight": _Draw((width,), 0.1, 1.0)}
    return drawn | ({f"{name}.bias": _Draw((width,), 0.1)} if bias else {})


def _llama_layer(name: str, config: Mapping[str, Any]) -> dict[str, _Draw]:
    hidden, inner, gain = config["hidden_size"], config["intermediate_size"], config.get("gain", 1.0)
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    return (
        _matrix(f"{attention}.q_proj", hidden, hidden, gain * 2.0)
        | _matrix(f"{attention}.k_proj", narrow, hidden, gain * 2.0)
        | _matrix(f"{attention}.v_proj", narrow, hidden, gain * 1.5)
        | _matrix(f"{attention}.o_proj", hidden, hidden, gain * 1.5)
        | _matrix(f"{mlp}.gate_proj", inner, hidden, gain * 1.2)
        | _matrix(f"{mlp}.up_proj", inner, hidden, gain * 1.2)
        | _matrix(f"{mlp}.down_proj", hidden, inner, gain * 1.2)
        | _norm(f"{name}.input_layernorm", hidden)
        | _norm(f"{name}.post_attention_layernorm", hidden)
    )


def _model(config: Mapping[str, Any]) -> dict[str, _Draw]:
    """Everything of model.safetensors that is drawn: the LLM, pre-fusion, projector and compressor."""
    hidden, vocab, width = config["hidden_size"], config["vocab_size"], COMPRESSOR_WIDTH
    drawn = {
        "model.embed_tokens.weight": _Draw((vocab, hidden), 1.0),
        "model.compressor.query": _Draw((config["compressor_size"] ** 2, width), 1.0),
        "model.compressor.attn.in_proj_weight": _Draw((3 * width, width), 1.5 * width**-0.5),
        "model.compressor.attn.in_proj_bias": _Draw((3 * width,), 0.1),
    }
    drawn |= _matrix("model.compressor.attn.out_proj", width, width, 1.5, bias=True)
    drawn |= _norm("model.compressor.ln_q", width, bias=True) | _norm("model.compressor.ln_kv", width, bias=True)
    drawn |= _matrix("model.mm_projector.0", hidden, width, 1.5, bias=True)
    drawn |= _matrix("model.mm_projector.2", hidden, hidden, 2.0, bias=True)
    for stack, depth in (("layers", "num_hidden_layers"), ("prefusion_layers", "prefusion_layer_num")):
        for n in range(config[depth]):
            drawn |= _llama_layer(f"model.{stack}.{n}", config)
    return drawn | _norm("model.norm", hidden) | _matrix("lm_head", vocab, hidden, 3.0)


def _tower(sizes: Mapping[str, int]) -> dict[str, _Draw]:
    """A CLIP vision model, post-norm included although nothing ever runs it: published towers have one."""
    width, inner, pixels = COMPRESSOR_WIDTH, sizes["intermediate_size"], 3 * PATCH_SIZE**2
    drawn = {
        "vision_model.embeddings.class_embedding": _Draw((width,), 0.5),
        "vision_model.embeddings.patch_embedding.weight": _Draw((width, 3, PATCH_SIZE, PATCH_SIZE), pixels**-0.5),
        "vision_model.embeddings.position_embedding.weight": _Draw((GRID**2 + 1, width), 0.3),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        drawn |= _norm(f"vision_model.{name}", width, bias=True)
    for n in range(sizes["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            drawn |= _matrix(f"{layer}.self_attn.{name}", width, width, 1.5, bias=True)
        drawn |= _matrix(f"{layer}.mlp.fc1", inner, width, 1.0, bias=True)
        drawn |= _matrix(f"{layer}.mlp.fc2", width, inner, 1.0, bias=True)
        drawn |= _norm(f"{layer}.layer_norm1", width, bias=True) | _norm(f"{layer}.layer_norm2", width, bias=True)
    return drawn


def _drawn(seed: int, table: Mapping[str, _Draw]) -> dict[str, np.ndarray]:
    def tensor(name: str, draw: _Draw) -> np.ndarray:
        stream = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
        return (draw.mean + draw.std * stream.standard_normal(draw.shape)).astype(np.float32)

    return {name: tensor(name, draw) for name, draw in table.items()}


def position_table(size: int, width: int = COMPRESSOR_WIDTH) -> np.ndarray:
    """(size * size, width) float32: sines and cosines of the column, then of the row, of a cell of the square grid.

    All in float32 as published, so the last bit is that of numpy's sine on the CPU at hand.
    """
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    rows, columns = np.divmod(np.arange(size * size), size)
    blocks = []
    for axis in (columns, rows):
        angles = np.multiply.outer(axis.astype(np.float32), frequencies)
        blocks += [np.sin(angles), np.cos(angles)]
    return np.concatenate(blocks, axis=1)


def _write(recipe: Mapping[str, Any], folder: Path, tokenizer_dir: Path) -> None:
    from safetensors.numpy import save_file

    config, seed = recipe["config"], recipe["seed"]
    model, tower = _drawn(seed, _model(config)), _drawn(seed, _tower(recipe["vision"]))
    model["model.compressor.pos_embed"] = position_table(config["compressor_size"])
    if recipe.get("tower_inside"):
        # The checkpoint carries its trained tower; the one in clip/ is then another and must lose against it.
        model |= {_PREFIX + name: tensor for name, tensor in tower.items()}
        tower = _drawn(seed + 1, _tower(recipe["vision"]))
    clip = folder / "clip"
    clip.mkdir()
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(tower, clip / "model.safetensors", metadata={"format": "pt"})
    published = {key: value for key, value in config.items() if key != "gain"}
    _write_json(folder / "config.json", published | {"mm_vision_tower": "clip"})
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_json(clip / "config.json", recipe["vision_config"] | recipe["vision"])
    _write_json(clip / "preprocessor_config.json", recipe["preprocessor"])
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, folder / file.name)


@contextmanager
def _appearing(out: Path) -> Iterator[Path | None]:
    """A folder to fill that becomes `out` in one step when the block ends well; None where `out` is there already.

    Of several processes that fill the same directory the first to finish wins and the others throw theirs away.
    """
    if (out / "config.json").is_file():
        yield None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    folder.chmod(0o755)
    try:
        yield folder
        try:
            folder.rename(out)
        except OSError:
            if not (out / "config.json").is_file():
                raise FileExistsError(f"{out} is there but holds no checkpoint; choose another directory.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tokenizer(goldens_dir: str | Path | None) -> Path:
    own = None if goldens_dir is None else Path(goldens_dir) / "tokenizer"
    return own if own and own.is_dir() else DATA / "tokenizer"


def _digest(value: Any, *blobs: bytes) -> str:
    """A short name for a JSON value and some files' bytes."""
    hashed = hashlib.sha256(json.dumps(value).encode())
    for blob in blobs:
        hashed.update(blob)
    return hashed.hexdigest()[:12]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
