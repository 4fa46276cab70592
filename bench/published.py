"""The published structure, as a baseline: transformers' eager modules, a loop over frames, every row through every layer.

It shares its weights with a `FusionFrontEnd` (views of the packed ones), so both compute the same numbers from the same
memory. Written from a description of the published code; nothing is skipped that the published code computes and nothing is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llava_mini_fast.config import COMPRESSOR_HEADS
from llava_mini_fast.fusion import FusionFrontEnd
from llava_mini_fast.model.compressor import resized_positions
from llava_mini_fast.model.splice import splice
from llava_mini_fast.model.vision_tower import grid_of_tiles


class PublishedFrontEnd:
    """One prompt at a time; `embed` is what the published `prepare_inputs_labels_for_multimodal` does."""

    def __init__(self, front: FusionFrontEnd):
        from transformers import CLIPVisionModel
        from transformers.initialization import no_init_weights
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.front, self.config, dtype = front, front.config, front.dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with no_init_weights(), front.device:
                clip = self.config.clip_config()
                clip._attn_implementation = "eager"
                self.tower = CLIPVisionModel(clip).eval()
                llama = self.config.llama_config(num_hidden_layers=self.config.prefusion_layer_num)
                llama._attn_implementation = "eager"
                self.layers = [LlamaDecoderLayer(llama, i).eval() for i in range(self.config.prefusion_layer_num)]
                width = self.config.mm_hidden_size
                self.attention = nn.MultiheadAttention(width, COMPRESSOR_HEADS)
        finally:
            torch.set_default_dtype(before)
        self.rotary = LlamaRotaryEmbedding(llama).to(front.device)
        self._share()

    def _share(self) -> None:
        ours = dict(self.front.vision_tower.clip.named_parameters())
        last = f"encoder.layers.{len(self.tower.encoder.layers) - 1}."
        for name, parameter in self.tower.named_parameters():
            # our tower has no last layer: a copy of the first one's weights costs the same to run
            source = ours.get(name.replace(last, "encoder.layers.0.") if name.startswith(last) else name)
            parameter.data = torch.ones_like(parameter) if source is None else source.data
        for theirs, layer in zip(self.layers, self.front.prefusion_layers):
            for name, piece in layer.published_slices().items():
                theirs.get_parameter(name).data = piece
        attn = self.front.compressor.attn
        self.attention.in_proj_weight.data = attn.in_proj_weight.data
        self.attention.in_proj_bias.data = attn.in_proj_bias.data
        self.attention.out_proj = attn.out_proj

    @torch.inference_mode()
    def embed(self, prompt_ids: list[int], pixels: Tensor) -> Tensor:
        """pixels (T, V, 3, 336, 336), normalised, on any device -> fused rows (len(prompt_ids) - 1 + T * Q, H)."""
        ids, pixels = (
            torch.tensor(prompt_ids, device=self.front.device),
            pixels.to(self.front.device, non_blocking=True),
        )
        text = self.front.embed_text(ids.clamp(min=0)).to(self.front.dtype)
        vision, fused = zip(*(self._frame(views, ids, text) for views in pixels))
        mean = torch.stack(fused).float().mean(0).to(text.dtype) if len(fused) > 1 else fused[0]
        return splice(mean, torch.cat(vision), prompt_ids.index(-200))

    def _frame(self, views: Tensor, ids: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        states = self.tower(views, output_hidden_states=True).hidden_states
        features = states[self.config.mm_vision_select_layer][:, 1:]
        if len(features) == 1:
            grid, whole = features[0], None
        else:
            grid, whole = grid_of_tiles(features[:-1]), features[-1]
        compressed = self.front.mm_projector(self._compress(grid))
        patches = self.front.mm_projector(grid)
        if whole is not None:
            patches = torch.cat([patches, self.front.mm_projector(whole)])
        return self._prefuse(patches, compressed, ids, text)

    def _compress(self, grid: Tensor) -> Tensor:
        c = self.front.compressor
        positions = resized_positions(c.pos_embed, math.isqrt(len(grid))).to(grid.dtype)
        queries, rows = c.ln_q(c.query) + c.pos_embed, c.ln_kv(grid)
        return self.attention(queries[:, None], (rows + positions)[:, None], rows[:, None])[0][:, 0]

    def _prefuse(self, patches: Tensor, compressed: Tensor, ids: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([patches, compressed, text])[None]
        vision = len(patches) + len(compressed)
        keep = torch.cat([torch.ones(vision, dtype=torch.bool, device=x.device), ids > 0])
        positions = (keep.long().cumsum(0) - 1).masked_fill(~keep, 1)[None]
        rows = x.shape[1]
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=x.device).triu(1) | ~keep
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)[None, None]
        embeddings = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=embeddings)
            x = x[0] if isinstance(x, tuple) else x
        fused = torch.where((ids > 0)[:, None], x[0, vision:], text)
        return x[0, len(patches) : vision], fused
