"""Pre-fusion in two parts: Llama layers over [patch, compressed, text] rows (published: `prefusion_layers`; paper 4.2).

Rows are causal in this order, so patch and compressed rows never see the text: the *image part* runs once a frame and
leaves K and V (the image state) behind; the *text part* runs once a (frame, prompt) pair over that state.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.ops.prefix_attention import causal_attention, prefix_attention
from llava_mini_fast.ops.rms_norm import rms_norm
from llava_mini_fast.ops.rope import rope, rotary_table
from llava_mini_fast.ops.swiglu import swiglu


class PreFusionLayer(nn.Module):
    """One Llama decoder layer with q, k, v and gate, up packed; the attention between `qkv` and `finish` is the caller's."""

    def __init__(self, config: LlavaMiniConfig):
        super().__init__()
        h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.eps = (
            config.num_attention_heads, config.num_key_value_heads, d, config.rms_norm_eps,
        )  # fmt: skip
        self.input_layernorm = nn.Parameter(torch.empty(h))
        self.qkv_proj = nn.Parameter(torch.empty((self.heads + 2 * self.kv_heads) * d, h))
        self.o_proj = nn.Parameter(torch.empty(h, self.heads * d))
        self.post_attention_layernorm = nn.Parameter(torch.empty(h))
        self.gate_up_proj = nn.Parameter(torch.empty(2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(h, i))

    def published_slices(self) -> dict[str, Tensor]:
        """Published weight name -> the slice of a packed parameter that it fills."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        query, key, value = self.qkv_proj.data.split([q, kv, kv])
        gate, up = self.gate_up_proj.data.chunk(2)
        return {
            "input_layernorm.weight": self.input_layernorm.data,
            "self_attn.q_proj.weight": query,
            "self_attn.k_proj.weight": key,
            "self_attn.v_proj.weight": value,
            "self_attn.o_proj.weight": self.o_proj.data,
            "post_attention_layernorm.weight": self.post_attention_layernorm.data,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": self.down_proj.data,
        }

    def qkv(self, x: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (R, H) -> q (R, heads, d) and k (R, kv_heads, d) rotated, v (R, kv_heads, d)."""
        packed = rms_norm(x, self.input_layernorm, self.eps) @ self.qkv_proj.T
        return rope(packed, positions, table, self.heads, self.kv_heads)

    def key_value(self, x: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """K and V alone: what a row owes when nobody reads its output (patch rows in the last layer)."""
        weight = self.qkv_proj[self.heads * self.head_dim :]
        packed = rms_norm(x, self.input_layernorm, self.eps) @ weight.T
        _, k, v = rope(packed, positions, table, 0, self.kv_heads)
        return k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, output projection and MLP: x (R, H), attended (R, heads, d) -> (R, H)."""
        normed, x = rms_norm(attended.flatten(1) @ self.o_proj.T, self.post_attention_layernorm, self.eps, residual=x)
        return x + swiglu(normed @ self.gate_up_proj.T) @ self.down_proj.T


class PreFusion(nn.ModuleList):
    """The pre-fusion layers, with the image part and the text part as two calls."""

    def __init__(self, config: LlavaMiniConfig):
        super().__init__(PreFusionLayer(config) for _ in range(config.prefusion_layer_num))
        self.config = config
        self._table: Tensor | None = None

    def table(self, rows: int, device: torch.device) -> Tensor:
        """Rotary table (at least `rows`, d) float32, [cos | sin], grown when a longer sequence comes."""
        if self._table is None or self._table.shape[0] < rows or self._table.device != device:
            self._table = rotary_table(self.config.llama_config(), max(rows, 4096), device)
        return self._table

    def new_state(self, frames: int, rows: int, like: Tensor) -> Tensor:
        """Uninitialised image state (frames, layers, 2, rows, kv_heads, d): K and V of `frames` frames."""
        c = self.config
        return like.new_empty(frames, len(self), 2, rows, c.num_key_value_heads, c.head_dim)

    def image_part(self, patches: Tensor, compressed: Tensor, state: Tensor) -> Tensor:
        """Run patch rows (F, P, H) and compressed rows (F, Q, H); fill `state` (F, layers, 2, P + Q, kv_heads, d).

        Returns the compressed rows' outputs (F, Q, H). In the last layer patch rows make K and V only.
        """
        frames, num_patches, hidden = patches.shape
        num_compressed = compressed.shape[1]
        rows = num_patches + num_compressed
        table = self.table(rows, patches.device)
        positions = torch.arange(rows, device=patches.device)
        x = torch.cat([patches, compressed], dim=1).flatten(0, 1)
        everywhere = positions.repeat(frames)
        for index, layer in enumerate(self):
            last = index == len(self) - 1
            if last:
                k, v = layer.key_value(x, everywhere, table)
                x = x.view(frames, rows, hidden)[:, num_patches:].flatten(0, 1)
                q, _, _ = layer.qkv(x, positions[num_patches:].repeat(frames), table)
            else:
                q, k, v = layer.qkv(x, everywhere, table)
            state[:, index, 0] = k.unflatten(0, (frames, rows))
            state[:, index, 1] = v.unflatten(0, (frames, rows))
            attended = causal_attention(q.unflatten(0, (frames, -1)), state[:, index, 0], state[:, index, 1])
            x = layer.finish(x, attended.flatten(0, 1))
        return x.view(frames, num_compressed, hidden)

    def text_part(self, text: Tensor, lengths: list[int], frames: list[int], state: Tensor) -> Tensor:
        """Packed text rows of many segments, each over one frame's image state and causally over itself.

        Args:
            text: (R, H), the segments' rows one after another; masked rows (id <= 0) already left out.
            lengths: rows of each segment (they sum to R; 0 is allowed).
            frames: per segment, the index into `state`.
            state: (F, layers, 2, P, kv_heads, d) as filled by `image_part`.

        Returns: (R, H).
        """
        prefix = state.shape[3]
        table = self.table(prefix + max(lengths, default=0), text.device)
        positions = torch.cat([torch.arange(prefix, prefix + n, device=text.device) for n in lengths])
        x = text
        for index, layer in enumerate(self):
            q, k, v = layer.qkv(x, positions, table)
            attended = prefix_attention(q, k, v, state[:, index, 0], state[:, index, 1], lengths, frames)
            x = layer.finish(x, attended)
        return x
