"""FusionFrontEnd: prompts and media in, fused rows out; everything before the language model, as one object."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llava_mini_fast.checkpoint import FRONT_PREFIXES, TOWER_PREFIX
from llava_mini_fast.config import IMAGE_TOKEN_ID, LlavaMiniConfig
from llava_mini_fast.media import Media
from llava_mini_fast.model.compressor import Compressor
from llava_mini_fast.model.prefusion import PreFusion
from llava_mini_fast.model.projector import projector
from llava_mini_fast.model.splice import placeholder_index, splice
from llava_mini_fast.model.vision_tower import VisionTower, grid_of_tiles
from llava_mini_fast.ops.frame_mean import add_frames
from llava_mini_fast.preprocess.views import Views, normalize, views

logger = logging.getLogger(__name__)

Request = tuple[Sequence[int], Media | Views | None]
"""(prompt ids with -200 where the media goes, media)."""


class FusionFrontEnd(nn.Module):
    """Vision tower, compressor, projector and pre-fusion, run over batches of requests.

    Args:
        config: the checkpoint's configuration.
        embed_text: ids (L,) int64, all >= 0 -> embeddings (L, H); the language model's own table (sharded in vLLM).
    """

    def __init__(self, config: LlavaMiniConfig, embed_text: Callable[[Tensor], Tensor]):
        super().__init__()
        self.config = config
        # a module would become part of this one, and its weights are the language model's
        self.embed_text = embed_text.forward if isinstance(embed_text, nn.Module) else embed_text
        self._loaded: set[str] = set()
        self.views_per_chunk = 8
        self.vision_tower = VisionTower(config.clip_config(), config.mm_vision_select_layer)
        if self.vision_tower.width != config.mm_hidden_size:
            raise ValueError(
                f"the vision tower is {self.vision_tower.width} wide and the config's mm_hidden_size is {config.mm_hidden_size}."
            )
        self.compressor = Compressor(config.compressor_size, config.mm_hidden_size)
        self.mm_projector = projector(config.mm_hidden_size, config.hidden_size)
        self.prefusion_layers = PreFusion(config)

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
        name = canonical_name(name)
        target = self._published_targets().get(name)
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
        missing = sorted(self._published_targets().keys() - self._loaded)
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"the checkpoint lacks tensor {missing[0]}{more}, which the model needs.")
        self.compressor.refold()

    def _published_targets(self) -> dict[str, Tensor]:
        targets = {TOWER_PREFIX + n.removeprefix("clip."): p.data for n, p in self.vision_tower.named_parameters()}
        targets |= {f"model.mm_projector.{n}": p.data for n, p in self.mm_projector.named_parameters()}
        targets |= {f"model.compressor.{n}": p.data for n, p in self.compressor.named_parameters()}
        for index, layer in enumerate(self.prefusion_layers):
            for name, piece in layer.published_slices().items():
                targets[f"model.prefusion_layers.{index}.{name}"] = piece
        return targets

    @property
    def dtype(self) -> torch.dtype:
        return self.compressor.query.dtype

    @property
    def device(self) -> torch.device:
        return self.compressor.query.device

    @torch.inference_mode()
    def fuse(self, requests: Sequence[Request]) -> list[Tensor]:
        """Fused rows of every request: what the language model receives in place of token embeddings.

        A request without media gives plain embeddings (no pre-fusion, as published). Media without placeholder gives the
        fused text alone. Equal frames of one call, by content, are computed once; frames run in chunks of bounded memory.

        Args:
            requests: (prompt_ids, media) pairs; media is a Media, prepared Views, or None.

        Returns: per request (rows, H) in the model's dtype; rows = len(prompt_ids) - 1 + frames * Q with a placeholder.

        Raises:
            ValueError: two placeholders, a placeholder without media, or an id outside the vocabulary.
            MediaError (a ValueError): the media can't be used.
        """
        jobs = [self._job(ids, media) for ids, media in requests]
        frames: dict[bytes, _Frame] = {}
        for job in jobs:
            for index, digest in enumerate(job.views.digests if job.views else ()):
                frame = frames.setdefault(digest, _Frame(job.views.pixels[index]))
                frame.uses.append((job, index))
        queue, size = list(frames.values()), max(1, self.views_per_chunk // self.config.views_per_frame)
        for start in range(0, len(queue), size):
            self._fuse_chunk(queue[start : start + size])
        return [job.rows() for job in jobs]

    def _job(self, prompt_ids: Sequence[int], media: Media | Views | None) -> _Job:
        ids = list(prompt_ids)
        index = placeholder_index(ids)
        if media is None and index is not None:
            raise ValueError("the prompt has a media placeholder and no image or video was given for it.")
        allowed = self.config.vocab_size
        if any(not 0 <= i < allowed for i in ids if i != IMAGE_TOKEN_ID):
            raise ValueError(f"a prompt id is outside the vocabulary: allowed are 0..{allowed - 1}, and {IMAGE_TOKEN_ID} once for the media.")
        if isinstance(media, Media):
            media = views(media, self.config)
        tensor = torch.tensor(ids, dtype=torch.long, device=self.device)
        text = self.embed_text(tensor.clamp(min=0)).to(self.dtype)
        return _Job(text, tensor, index, media, self.config.num_compressed)

    def _fuse_chunk(self, chunk: Sequence[_Frame]) -> None:
        pixels = torch.stack([normalize(frame.pixels.to(self.device), self.dtype) for frame in chunk])
        patches, compressed = self.encode(pixels)
        rows = patches.shape[1] + compressed.shape[1]
        state = self.prefusion_layers.new_state(len(chunk), rows, like=patches)
        vision = self.prefusion_layers.image_part(patches, compressed, state)
        segments: dict[tuple[int, int], _Segment] = {}
        for slot, frame in enumerate(chunk):
            for job, index in frame.uses:
                job.vision[index] = vision[slot]
                segments.setdefault((slot, id(job)), _Segment(job, slot)).times += 1
        self._text_part(list(segments.values()), state)

    def _text_part(self, segments: list[_Segment], state: Tensor) -> None:
        texts = [segment.job.text[segment.job.kept] for segment in segments]
        packed = torch.cat(texts)
        if not packed.shape[0]:
            return
        fused = self.prefusion_layers.text_part(packed, [len(t) for t in texts], [s.slot for s in segments], state)
        for segment, rows in zip(segments, fused.split([len(t) for t in texts])):
            add_frames(segment.job.total, rows.float() * segment.times, segment.job.kept)

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


@dataclass(eq=False)
class _Job:
    """One request on its way: its text, and what frames have added to it so far."""

    text: Tensor  # (L, H) plain embeddings
    ids: Tensor  # (L,)
    placeholder: int | None
    views: Views | None
    num_compressed: int
    vision: dict[int, Tensor] = field(default_factory=dict)  # frame -> (Q, H)

    def __post_init__(self):
        # ids <= 0 are masked out of pre-fusion as published: the placeholder, padding and an ordinary token of id 0
        self.kept = (self.ids > 0).nonzero().flatten()
        self.total = torch.zeros(self.text.shape, dtype=torch.float32, device=self.text.device) if self.views else None

    def rows(self) -> Tensor:
        if self.views is None:
            return self.text
        fused = self.text.clone()
        fused[self.kept] = (self.total[self.kept] / self.views.num_frames).to(fused.dtype)
        vision = torch.cat([self.vision[index] for index in range(self.views.num_frames)])
        return splice(fused, vision, self.placeholder)


@dataclass(eq=False)
class _Frame:
    """One frame's pixels and everybody who needs it."""

    pixels: Tensor  # (V, 3, 336, 336)
    uses: list[tuple[_Job, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Segment:
    """The text rows of one job over one frame of the chunk; `times` counts equal frames of the job."""

    job: _Job
    slot: int
    times: int = 0
