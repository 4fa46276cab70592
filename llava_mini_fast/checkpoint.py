"""Where a checkpoint's files are, and its tensors by their published names. Nothing here runs code from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava_mini_fast.config import CLIP_L_336, LlavaMiniConfig

TOWER_PREFIX = "model.vision_tower.vision_tower."
"""Published prefix of a vision tower that travels inside the checkpoint."""
FRONT_PREFIXES = (TOWER_PREFIX, "model.mm_projector.", "model.compressor.", "model.prefusion_layers.")
"""Published names that start with one of these belong to the fusion front end; all others to the language model."""
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.bin"]


def resolve(path: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint given as a directory or as a hub name (fetched with huggingface_hub).

    Raises:
        FileNotFoundError: neither a directory nor a name that the hub (or its local cache) knows.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    found = _from_hub(str(path))
    if found is None:
        raise FileNotFoundError(
            f"{str(path)!r} is neither a directory nor a model that the hub or its local cache could give; "
            "give a checkpoint directory or a hub name such as owner/name."
        )
    return found


def _from_hub(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError):  # offline, unknown, refused: every hub error derives from one of these
        return None


class Tensors:
    """The tensors of one directory, by name: safetensors shards, or `.bin` files read with `weights_only`.

    Opening reads the headers only. Raises ValueError, naming a tensor, when a file is cut short or a shard is missing.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Path] = {}
        self._bins: dict[Path, dict[str, torch.Tensor]] = {}
        shards = sorted(directory.glob("*.safetensors"))
        for shard in shards:
            for name in _safetensors_header(shard):
                self._files[name] = shard
        if not shards:
            for file in sorted(directory.glob("*.bin")):
                self._bins[file] = _load_bin(file)
                self._files.update(dict.fromkeys(self._bins[file], file))
        self._check_index()
        if not self._files:
            raise FileNotFoundError(f"{directory} holds no weights; expected *.safetensors (or *.bin) files.")

    def _check_index(self) -> None:
        for index in self.directory.glob("*.index.json"):
            weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
            for name, file in weight_map.items():
                if name not in self._files:
                    raise ValueError(
                        f"{index.name} places tensor {name} in {file}, and {self.directory} does not have it there."
                    )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._files if name.startswith(prefix)]

    def get(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped where the format allows. KeyError, naming it, when absent."""
        file = self._files.get(name)
        if file is None:
            raise KeyError(f"tensor {name} is missing from {self.directory}")
        if file in self._bins:
            return self._bins[file][name]
        from safetensors import safe_open

        with safe_open(file, framework="pt") as f:
            return f.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.get(name).shape)

    def items(self, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every name that starts with `prefix`, file by file."""
        from safetensors import safe_open

        for file in dict.fromkeys(self._files.values()):
            wanted = [n for n, f in self._files.items() if f == file and n.startswith(prefix)]
            if file in self._bins:
                yield from ((n, self._bins[file][n]) for n in wanted)
                continue
            with safe_open(file, framework="pt") as f:
                for name in wanted:
                    yield name, f.get_tensor(name)


def _safetensors_header(file: Path) -> list[str]:
    """Tensor names of a safetensors file after checking that every tensor's bytes are there."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is cut short: its header needs {length + 8} bytes and the file has {size}.")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
        except ValueError:
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON.") from None
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if 8 + length + entry["data_offsets"][1] > size:
            raise ValueError(f"{file} is cut short: tensor {name} ends beyond the file's {size} bytes.")
    return list(header)


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{file} can't be read as plain weights (torch.load with weights_only=True): {error}"
        ) from None


class VisionTowerSource:
    """The vision tower that wins by the published rule, and its CLIP config.

    The checkpoint's own tower (`model.vision_tower.vision_tower.*`) is used when `unfreeze_mm_vision_tower` is set or when
    `mm_vision_tower` can't be had; a relative `mm_vision_tower` is looked up inside the checkpoint first, then as a
    directory, then on the hub.
    """

    def __init__(self, directory: Path, config: LlavaMiniConfig):
        self.directory = directory
        self.tower_directory = self._find(directory, config.mm_vision_tower)
        self.inside = config.unfreeze_mm_vision_tower or self.tower_directory is None

    @staticmethod
    def _find(directory: Path, name: str) -> Path | None:
        for candidate in (directory / name, Path(name).expanduser()):
            if candidate.is_dir():
                return candidate
        return _from_hub(name)

    def clip_config(self) -> dict[str, Any]:
        """The tower's CLIP config; read off the tensors' shapes where no config file can be had."""
        if self.tower_directory is not None:
            parsed = json.loads((self.tower_directory / "config.json").read_text(encoding="utf-8"))
            return parsed.get("vision_config", parsed)  # a whole CLIP model nests it
        tensors = Tensors(self.directory)
        shapes = {
            name.removeprefix(TOWER_PREFIX).removeprefix("vision_model."): tensors.shape(name)
            for name in tensors.names(TOWER_PREFIX)
        }
        if "embeddings.class_embedding" not in shapes:
            raise FileNotFoundError(
                "the vision tower can't be had: mm_vision_tower is no directory here and no model that the hub or its local "
                f"cache could give, and the checkpoint holds no {TOWER_PREFIX}* tensors."
            )
        width = shapes["embeddings.class_embedding"][0]
        return CLIP_L_336 | {
            "hidden_size": width,
            "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("encoder.layers.")),
            "num_attention_heads": width // 64,  # every published CLIP tower has heads of 64
        }

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(published name, tensor) of the winning tower, named as if it were inside the checkpoint."""
        if self.inside:
            yield from Tensors(self.directory).items(TOWER_PREFIX)
        else:
            for name, tensor in Tensors(self.tower_directory).items():
                # a full CLIP checkpoint holds the text model and the projections too
                if name.startswith(("text_", "text_model.", "visual_projection", "logit_scale")):
                    continue
                yield TOWER_PREFIX + name, tensor


def read_config(directory: Path) -> LlavaMiniConfig:
    """A checkpoint directory's configuration, the winning vision tower's included."""
    config = LlavaMiniConfig.from_pretrained(directory)
    return dataclasses.replace(config, vision=VisionTowerSource(directory, config).clip_config())


def front_end_weights(directory: Path, config: LlavaMiniConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, tensor) of everything that `FusionFrontEnd.load_weights` takes, the winning vision tower included."""
    tensors = Tensors(directory)
    for prefix in FRONT_PREFIXES[1:]:
        yield from tensors.items(prefix)
    yield from VisionTowerSource(directory, config).items()


def language_model_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of the language model: all that are not the front end's."""
    return {name: tensor for name, tensor in Tensors(directory).items() if not name.startswith(FRONT_PREFIXES)}
