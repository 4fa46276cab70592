"""FusionFrontEnd: prompts and media in, fused rows out; batches, chunks of frames and the image cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.image_cache import CacheSizes, ImageCache
from llava_mini_fast.media import Media
from llava_mini_fast.model.front_end import FrontEnd
from llava_mini_fast.model.splice import check_vocabulary, placeholder_index, splice
from llava_mini_fast.ops.frame_mean import add_frames
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.preprocess.prefetch import prefetch
from llava_mini_fast.preprocess.views import Views, normalize, stream

Request = tuple[Sequence[int], Media | Views | None]
"""(prompt ids with -200 where the media goes, media)."""

CHUNK_BYTES = 1 << 30
"""Memory that the activations of one chunk of frames may take, roughly; decides how many frames run together."""
MAX_CHUNK_VIEWS = 64
PREFETCH_FRAMES = 8
"""Frames decoded ahead of the one at work."""


class FusionFrontEnd(FrontEnd):
    """The front end, run over batches of requests, with its image cache. Arguments and errors as of `FrontEnd`."""

    def __init__(self, config: LlavaMiniConfig, embed_text: Callable[[Tensor], Tensor], backend: str = "auto"):
        super().__init__(config, embed_text, backend)
        self.configure()

    def finish_loading(self) -> None:
        """As of `FrontEnd`; what the old weights left in the image cache is forgotten."""
        super().finish_loading()
        self.cache.clear()

    def configure(self, sizes: CacheSizes | None = None, frames_per_chunk: int | None = None) -> None:
        """Size the image cache and the chunks, dropping what is cached. Results never depend on either.

        Args:
            sizes: bytes of the image cache's tiers; default `CacheSizes.from_env()` (1 GiB on the device, 4 in host memory).
            frames_per_chunk: frames that run together; default as many as `CHUNK_BYTES` of activations allow.
        """
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk must be at least 1; got {frames_per_chunk}.")
        self.cache = ImageCache(
            slot=self.prefusion_layers.slot_shape(),
            vision=(self.config.num_compressed, self.config.hidden_size),
            dtype=self.dtype,
            device=self.device,
            sizes=CacheSizes.from_env() if sizes is None else sizes,
            chunk=frames_per_chunk or frames_that_fit(self.config, self.dtype.itemsize),
        )

    @torch.no_grad()  # not inference_mode: torchao's int8 weights can't be sliced in it
    def fuse(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Tensor]:
        """Fused rows of every request: what the language model receives in place of token embeddings.

        A request without media gives plain embeddings (no pre-fusion, as published). Media without placeholder gives the
        fused text alone. Clips are decoded while earlier frames are at work, and run in chunks of bounded memory; frames
        whose image part is cached, or that come twice in a chunk, are not computed again.

        Args:
            requests: (prompt_ids, media) pairs; media is a Media, prepared Views, or None.
            progress: called with the number of frames done since the last call.

        Returns: per request (rows, H) in the model's dtype; rows = len(prompt_ids) - 1 + frames * Q with a placeholder.

        Raises:
            ValueError: two placeholders, a placeholder without media, or an id outside the vocabulary.
            MediaError (a ValueError): the media can't be used.
        """
        jobs = [self._job(ids, media) for ids, media in requests]
        self.cache.begin()
        for chunk in self._chunks(jobs):
            self._fuse_chunk(chunk)
            if progress is not None:
                progress(sum(len(frame.uses) for frame in chunk.values()))
        return [job.rows() for job in jobs]

    def _job(self, prompt_ids: Sequence[int], media: Media | Views | None) -> _Job:
        ids = list(prompt_ids)
        index = placeholder_index(ids)
        if media is None and index is not None:
            raise ValueError("the prompt has a media placeholder and no image or video was given for it.")
        check_vocabulary(ids, self.config.vocab_size)
        embedded = torch.tensor([max(0, i) for i in ids], dtype=torch.long).to(self.device)
        # ids <= 0 are masked out of pre-fusion as published: the placeholder, padding and an ordinary token of id 0
        kept = torch.tensor([row for row, i in enumerate(ids) if i > 0], dtype=torch.long).to(self.device)
        return _Job(self.embed_text(embedded).to(self.dtype), kept, index, media)

    def _chunks(self, jobs: Sequence[_Job]) -> Iterator[dict[bytes, _Frame]]:
        """Frames of all jobs, in order, in groups of at most `cache.chunk` different ones."""
        chunk: dict[bytes, _Frame] = {}
        for job in jobs:
            if job.media is None:
                continue
            frames = stream(job.media, self.config)
            if isinstance(job.media, Media) and job.media.kind == "video":
                frames = prefetch(frames, PREFETCH_FRAMES)
            for pixels, digest in frames:
                if digest not in chunk and len(chunk) == self.cache.chunk:
                    yield chunk
                    chunk = {}
                chunk.setdefault(digest, _Frame(pixels)).uses.append((job, job.num_frames))
                job.num_frames += 1
        if chunk:
            yield chunk

    def _fuse_chunk(self, chunk: dict[bytes, _Frame]) -> None:
        slots, filled = self.cache.place(list(chunk))
        missing = [(slot, frame) for slot, ready, frame in zip(slots, filled, chunk.values()) if not ready]
        if missing:
            pixels = torch.stack([normalize(frame.pixels.to(self.device), self.dtype) for _, frame in missing])
            patches, compressed = self.encode(pixels)
            new = [slot for slot, _ in missing]
            self.cache.vision[new] = self.prefusion_layers.image_part(patches, compressed, self.cache.state, new)
        segments: dict[tuple[int, int], _Segment] = {}
        for slot, vision, frame in zip(slots, self.cache.vision[slots], chunk.values()):
            for job, index in frame.uses:
                job.vision[index] = vision
                segments.setdefault((slot, id(job)), _Segment(job, slot)).times += 1
        self._text_part(list(segments.values()))
        self.cache.settle(list(chunk), slots)

    def _text_part(self, segments: list[_Segment]) -> None:
        by_job: dict[_Job, list[_Segment]] = {}
        for segment in segments:
            by_job.setdefault(segment.job, []).append(segment)
        segments = [segment for group in by_job.values() for segment in group]
        texts = [segment.job.text[segment.job.kept] for segment in segments]
        packed = Segments.of([len(text) for text in texts], [segment.slot for segment in segments], self.device)
        if not packed.num_rows:
            return
        fused = self.prefusion_layers.text_part(torch.cat(texts), packed, self.cache.state)
        sizes = [len(job.kept) * len(group) for job, group in by_job.items()]
        for (job, group), rows in zip(by_job.items(), fused.split(sizes)):
            times = torch.tensor([segment.times for segment in group], dtype=torch.float32).to(self.device)
            add_frames(job.total, rows, job.kept, times, backend=self.backend)


def frames_that_fit(config: LlavaMiniConfig, itemsize: int) -> int:
    """Frames whose activations fit `CHUNK_BYTES`, by the widest moments of a frame's rows: in a pre-fusion layer (residual,
    normed, q, k, v; gate, up and their product) and in a layer of the vision tower. At least 1, and at most
    `MAX_CHUNK_VIEWS` views."""
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    width = 3 * config.hidden_size + heads + 3 * config.intermediate_size
    prefusion = (config.num_patch_rows + config.num_compressed) * width
    tower = config.num_patch_rows * (5 * config.mm_hidden_size + 2 * config.vision["intermediate_size"])
    frames = CHUNK_BYTES // (max(prefusion, tower) * itemsize)
    return max(1, min(frames, MAX_CHUNK_VIEWS // config.views_per_frame))


@dataclass(eq=False)
class _Job:
    """One request on its way: its text, and what frames have added to it so far."""

    text: Tensor  # (L, H) plain embeddings
    kept: Tensor  # rows of the text that are fused
    placeholder: int | None
    media: Media | Views | None
    num_frames: int = 0  # seen so far
    vision: dict[int, Tensor] = field(default_factory=dict)  # frame -> (Q, H)

    def __post_init__(self):
        self.total = None
        if self.media is not None:
            self.total = torch.zeros(self.text.shape, dtype=torch.float32, device=self.text.device)

    def rows(self) -> Tensor:
        if self.media is None:
            return self.text
        fused = self.text.clone()
        fused[self.kept] = (self.total[self.kept] / self.num_frames).to(fused.dtype)
        vision = torch.cat([self.vision[index] for index in range(self.num_frames)])
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
