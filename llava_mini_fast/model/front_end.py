"""FrontEnd: everything before the language model as modules and weights; `fusion.py` runs it over batches of requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from llava_mini_fast.checkpoint import FRONT_PREFIXES, TOWER_PREFIX
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.model.compressor import Compressor
from llava_mini_fast.model.packed import can_pack, pack_linears
from llava_mini_fast.model.prefusion import PreFusion
from llava_mini_fast.model.projector import projector
from llava_mini_fast.model.vision_tower import VisionTower, grid_of_tiles
from llava_mini_fast.ops.backend import resolve

logger = logging.getLogger(__name__)


class FrontEnd(nn.Module):
    """Vision tower, compressor, projector and pre-fusion, with their weights by published names.

    Args:
        config: the checkpoint's configuration.
        embed_text: ids (L,) int64, all >= 0 -> embeddings (L, H); the language model's own table (sharded in vLLM).
        backend: which kernels run the ops, by `ops.backend.resolve`; LLAVA_MINI_BACKEND overrules it.

    Raises:
        ValueError: a vision tower of another width than the config's, or a backend that can't run here.
    """

    def __init__(self, config: LlavaMiniConfig, embed_text: Callable[[Tensor], Tensor], backend: str = "auto"):
        from transformers.initialization import no_init_weights

        super().__init__()
        self.config, self.backend = config, resolve(backend, torch.get_default_device())
        # a module would become part of this one, and its weights are the language model's
        self.embed_text = embed_text.forward if isinstance(embed_text, nn.Module) else embed_text
        self._loaded: set[str] = set()
        self.packed = False
        with no_init_weights():  # every parameter is loaded, or filled by vLLM's dummy loader
            self.vision_tower = VisionTower(config.clip_config(), config.mm_vision_select_layer)
            self.compressor = Compressor(config.compressor_size, config.mm_hidden_size, self.backend)
            self.mm_projector = projector(config.mm_hidden_size, config.hidden_size)
            self.prefusion_layers = PreFusion(config, self.backend)
        if self.vision_tower.width != config.mm_hidden_size:
            raise ValueError(
                f"the vision tower is {self.vision_tower.width} wide and the config's mm_hidden_size is {config.mm_hidden_size}."
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill every parameter from (published name, tensor) pairs; the language model's names are passed over.

        Raises:
            ValueError: a tensor is missing or has another shape; the message names it.
        """
        for name, tensor in weights:
            self.load_tensor(name, tensor)
        self.finish_loading()

    def load_tensor(self, name: str, tensor: Tensor) -> bool:
        """Load one tensor by its published name; False if it is the language model's. ValueError on a wrong shape."""
        if not name.startswith(FRONT_PREFIXES):
            return False
        if self.packed:
            raise RuntimeError(
                "the front end's weights are packed for this CPU and can't be loaded again; load the model anew."
            )
        name = canonical_name(name)
        target = self._targets.get(name)
        if target is None:
            # a tower brings layers that are never run; anything else is worth a word
            if not name.startswith(TOWER_PREFIX):
                logger.warning("ignoring tensor %s: no part of the model uses it", name)
            return True
        if target.shape != tensor.shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}; this config needs {tuple(target.shape)}.")
        target.copy_(tensor)
        self._loaded.add(name)
        return True

    def finish_loading(self) -> None:
        """Check that every tensor has come, and prepare what is derived from them. ValueError names a missing one."""
        missing = sorted(self._targets.keys() - self._loaded)
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"the checkpoint lacks tensor {missing[0]}{more}, which the model needs.")
        self.__dict__.pop("_targets", None)  # the next load, if any, looks again
        self.compressor.refold()

    def pack(self) -> bool:
        """On a CPU, lay the linear layers' weights out for oneDNN; False where that can't be done. Last step of loading:
        packed weights can't be loaded again."""
        if not can_pack(self.device, self.dtype) or self.packed:
            return self.packed
        pack_linears(self.vision_tower)
        pack_linears(self.mm_projector)
        for index, layer in enumerate(self.prefusion_layers):
            layer.pack(last=index == len(self.prefusion_layers) - 1)
        self.packed = True
        return True

    @cached_property
    def _targets(self) -> dict[str, Tensor]:
        """Published name -> the tensor, or the slice of a packed one, that it fills."""
        targets = {TOWER_PREFIX + n.removeprefix("clip."): p.data for n, p in self.vision_tower.named_parameters()}
        targets |= {f"model.mm_projector.{n}": p.data for n, p in self.mm_projector.named_parameters()}
        targets |= {f"model.compressor.{n}": p.data for n, p in self.compressor.named_parameters()}
        for index, layer in enumerate(self.prefusion_layers):
            for name, piece in layer.published_slices().items():
                targets[f"model.prefusion_layers.{index}.{name}"] = piece
        return targets

    def published_tensors(self) -> dict[str, Tensor]:
        """Every parameter by its published name, sharing memory; RuntimeError once they are packed."""
        if self.packed:
            raise RuntimeError("the front end's weights are packed for this CPU; load the model anew to read them.")
        targets = dict(self._targets)
        self.__dict__.pop("_targets")
        return targets

    @property
    def dtype(self) -> torch.dtype:
        return self.compressor.query.dtype

    @property
    def device(self) -> torch.device:
        return self.compressor.query.device

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Everything before pre-fusion.

        pixels (F, V, 3, 336, 336), normalised -> patch rows (F, V * 576, H) and compressed rows (F, Q, H). In HD the
        compressor sees the tiles' 48 x 48 grid; the global view gives patch rows only (published: `encode_images_mini`).
        """
        frames, num_views = pixels.shape[:2]
        features = self.vision_tower(pixels.flatten(0, 1)).unflatten(0, (frames, num_views))
        if num_views == 1:
            grid = features[:, 0]
            rows = grid
        else:
            grid = grid_of_tiles(features[:, :-1])
            rows = torch.cat([grid, features[:, -1]], dim=1)
        return self.mm_projector(rows), self.mm_projector(self.compressor(grid))


def canonical_name(name: str) -> str:
    """A published tensor name without the `vision_model.` that older CLIP files carry inside the tower's names."""
    if name.startswith(TOWER_PREFIX):
        return TOWER_PREFIX + name.removeprefix(TOWER_PREFIX).removeprefix("vision_model.")
    return name
