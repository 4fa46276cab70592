"""The model as it is trained: the published computation with gradients, in batches (published: `llava_arch`, `train.py`).

The engine's own modules are trained in place, so what is learned is what is served. Three things differ from inference: the
compressor is not folded, answers are masked out of pre-fusion, and in stage 1 the language model sees every patch row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_mini_fast.config import COMPRESSOR_HEADS, GRID, IMAGE_TOKEN_ID
from llava_mini_fast.engine import LlavaMini
from llava_mini_fast.model.compressor import Compressor, resized_positions
from llava_mini_fast.model.splice import splice
from llava_mini_fast.model.vision_tower import grid_of_tiles
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.train.data import IGNORED

_HEAD, _EMBEDDINGS = "llm.lm_head.weight", "llm.model.embed_tokens.weight"


class TrainableModel(nn.Module):
    """A loaded engine with a loss. `stage` 1 learns the projector; 2 compressor, pre-fusion, projector and language model.

    Args:
        engine: made by `LlavaMini(...)`, whose weights are not packed for oneDNN as those of `load` are.

    Raises:
        ValueError: another stage than 1 or 2, or packed weights.
    """

    _keys_to_ignore_on_save = None
    """transformers' Trainer asks every model for it when a checkpoint lacks a weight."""

    def __init__(self, engine: LlavaMini, stage: int):
        super().__init__()
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2; got {stage!r}.")
        if engine.front.packed:
            raise ValueError("the engine's weights are packed for inference and can't be trained; build it unpacked.")
        self.front, self.llm, self.stage, self.checkpointing = engine.front, engine.llm, stage, False
        learned = [self.front.mm_projector]
        if stage == 2:
            learned += [self.front.compressor, self.front.prefusion_layers, self.llm]
        for module in learned:
            module.requires_grad_(True)
        self.front.compressor.pos_embed.requires_grad_(False)  # stored, never learned

    def forward(
        self,
        input_ids: Sequence[Tensor],
        labels: Sequence[Tensor],
        frames: Sequence[Sequence[int]],
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            input_ids: per example (L,) int64 with -200 where the media goes.
            labels: per example (L,), `IGNORED` where nothing is learned. Rows beyond `tokenizer_model_max_length` are cut.
            frames: per example, which of the F frames it shows, in order; none is text alone. Examples may share frames, whose
                image part is then computed once.
            pixels: (F, V, 3, 336, 336), normalised.
            features: (F, V, 576, D) instead: what the frozen tower gave for them. Or, of standard resolution, (F, 1, K, D) with
            `kept` (F, K) int64: some patches of each frame, which makes steps cheaper where most of a picture says nothing.

        Returns: {"loss": scalar, "logits": (B, rows, vocab), "targets": (B, rows)}; the loss is the mean over all labels of
            the batch, and targets are the labels row by row: logits at a row speak of the next row's.
        """
        rows = self.fused_rows(input_ids, labels, frames, pixels, features, kept)
        spliced = [
            _spliced_labels(ids, told, len(fused)) for ids, told, fused in zip(input_ids, labels, rows, strict=True)
        ]
        limit = self.front.config.max_rows
        rows, spliced = [fused[:limit] for fused in rows], [told[:limit] for told in spliced]
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = nn.utils.rnn.pad_sequence(spliced, batch_first=True, padding_value=IGNORED)
        lengths = torch.tensor([len(fused) for fused in rows], device=embeds.device)
        mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
        logits = self.llm(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)
        return {"loss": loss, "logits": logits, "targets": targets}

    def fused_rows(
        self,
        input_ids: Sequence[Tensor],
        labels: Sequence[Tensor],
        frames: Sequence[Sequence[int]],
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> list[Tensor]:
        """What the language model receives, per example (rows, H). Arguments as in `forward`."""
        embed = self.llm.get_input_embeddings()
        texts = [embed(ids.clamp(min=0)) for ids in input_ids]
        if not any(frames):
            return texts
        grid, patches = self._frames(pixels, features)
        projected = self.front.mm_projector(patches)
        if self.stage == 1:
            return [
                self._spliced(ids, text, _picked(projected, shown).flatten(0, 1)) if shown else text
                for ids, text, shown in zip(input_ids, texts, frames)
            ]
        compressed = self.front.mm_projector(unfolded_compressor(self.front.compressor, grid, kept))
        vision, states = self._image_part(projected, compressed)
        # an answer is not there yet when its question is asked, so no row may see it: as if its ids were 0
        kept = [((ids > 0) & (told == IGNORED)).nonzero().flatten() for ids, told in zip(input_ids, labels)]
        owners = [example for example, shown in enumerate(frames) for _ in shown]
        slots = [frame for shown in frames for frame in shown]
        # one length for all: rows behind a prompt's end are seen by none of its own, and attention takes one batch
        length = max(map(len, kept))
        segments = Segments.of([length] * len(slots), slots, vision.device)
        padded = nn.utils.rnn.pad_sequence([text[places] for text, places in zip(texts, kept)], batch_first=True)
        fused = self._text_part(_picked(padded, owners).flatten(0, 1), segments, states).unflatten(0, (-1, length))
        sums, rows = iter(fused.split([len(shown) for shown in frames])), []
        for ids, text, places, shown in zip(input_ids, texts, kept, frames):
            own = next(sums)[:, : len(places)]
            if shown:
                mean = own.float().mean(0).to(text.dtype)
                text = self._spliced(ids, text.index_copy(0, places, mean), _picked(vision, shown).flatten(0, 1))
            rows.append(text)
        return rows

    def _frames(self, pixels: Tensor | None, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """The grid that the compressor pools, (F, N, D), and all patch features, (F, P, D)."""
        if features is None:
            with torch.no_grad():
                features = self.front.vision_tower(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        if features.shape[1] == 1:
            return features[:, 0], features[:, 0]
        grid = grid_of_tiles(features[:, :-1])
        return grid, torch.cat([grid, features[:, -1]], dim=1)

    def _image_part(self, patches: Tensor, compressed: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Fused vision rows (F, Q, H), and K and V of every layer; with gradient checkpointing nothing else is kept."""

        def run(patches: Tensor, compressed: Tensor) -> tuple[Tensor, ...]:
            kept: list[Tensor] = []
            vision = self.front.prefusion_layers.image_rows(patches, compressed, lambda _, k, v: kept.extend((k, v)))
            return vision, *kept

        if self.checkpointing:
            vision, *kept = checkpoint(run, patches, compressed, use_reentrant=False)
        else:
            vision, *kept = run(patches, compressed)
        return vision, list(zip(kept[::2], kept[1::2]))

    def _text_part(self, text: Tensor, segments: Segments, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        return self.front.prefusion_layers.text_rows(text, segments, states)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As of any module, but with a weight that two names share under one of them: safetensors takes no other."""
        state = super().state_dict(*arguments, **options)
        if self.llm.config.tie_word_embeddings:
            state.pop(_HEAD, None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Takes what `state_dict` gives."""
        if self.llm.config.tie_word_embeddings:
            state_dict = dict(state_dict) | {_HEAD: state_dict[_EMBEDDINGS]}
        return super().load_state_dict(state_dict, *arguments, **options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Trade time for memory: the image part and the language model's layers are computed again on the way back.

        options: of transformers' method of this name, for the language model.
        """
        self.checkpointing = True
        self.llm.gradient_checkpointing_enable(**options)

    @staticmethod
    def _spliced(ids: Tensor, text: Tensor, vision: Tensor) -> Tensor:
        places = (ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
        return splice(text, vision, places[0] if places else None)


def unfolded_compressor(compressor: Compressor, features: Tensor, kept: Tensor | None = None) -> Tensor:
    """`Compressor.forward` as published, with gradients: features (F, N, D) -> (F, Q, D).

    kept: (F, K), which of 576 patches the features (F, K, D) are of; all of a square grid when None.
    """
    side = GRID if kept is not None else math.isqrt(features.shape[1])
    attn, positions = compressor.attn, resized_positions(compressor.pos_embed, side)
    if kept is not None:
        positions = positions[kept]
    values = compressor.ln_kv(features)
    keys = values + positions.to(values.dtype)
    queries = compressor.ln_q(compressor.query) + compressor.pos_embed
    weights = zip((queries, keys, values), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))
    q, k, v = (F.linear(x, w, b).unflatten(-1, (COMPRESSOR_HEADS, -1)).transpose(-3, -2) for x, w, b in weights)
    pooled = F.scaled_dot_product_attention(q.expand(len(features), -1, -1, -1), k, v)
    return attn.out_proj(pooled.transpose(1, 2).flatten(2))


def _picked(x: Tensor, numbers: Iterable[int]) -> Tensor:
    """`x[numbers]`; its gradient on a CPU has the same bits every time, where that of indexing adds up in any order."""
    return x.index_select(0, torch.tensor(list(numbers), device=x.device))


def _spliced_labels(ids: Tensor, labels: Tensor, rows: int) -> Tensor:
    """Labels (L,) with as many ignored rows in the placeholder's place as the splice has put there -> (rows,)."""
    places = (ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
    if not places:
        return labels
    vision = labels.new_full((rows - len(labels) + 1,), IGNORED)
    return torch.cat([labels[: places[0]], vision, labels[places[0] + 1 :]])
