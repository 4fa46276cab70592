"""Pre-fusion in two parts: Llama layers over [patch, compressed, text] rows (published: `prefusion_layers`; paper 4.2).

Rows are causal in this order, so patch and compressed rows never see the text: the *image part* runs once a frame and
leaves K and V (the image state) behind; the *text part* runs once a (frame, prompt) pair over that state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.model.packed import PackedLinear, pack_linears
from llava_mini_fast.ops.prefix_attention import causal_attention, prefix_attention
from llava_mini_fast.ops.rms_norm import rms_norm
from llava_mini_fast.ops.rope import rope, rotary_table
from llava_mini_fast.ops.segments import Segments
from llava_mini_fast.ops.swiglu import swiglu


class PreFusionLayer(nn.Module):
    """One Llama decoder layer with q, k, v and gate, up packed; the attention between `qkv` and `finish` is the caller's."""

    def __init__(self, config: LlavaMiniConfig, backend: str = "torch"):
        super().__init__()
        self.backend = backend
        h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.eps = (
            config.num_attention_heads, config.num_key_value_heads, d, config.rms_norm_eps,
        )  # fmt: skip
        self.input_layernorm = nn.Parameter(torch.empty(h))
        self.qkv_proj = nn.Linear(h, (self.heads + 2 * self.kv_heads) * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, h, bias=False)
        self.post_attention_layernorm = nn.Parameter(torch.empty(h))
        self.gate_up_proj = nn.Linear(h, 2 * i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)
        self.kv_proj: PackedLinear | None = None

    def published_slices(self) -> dict[str, Tensor]:
        """Published weight name -> the slice of a packed parameter that it fills."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        query, key, value = self.qkv_proj.weight.data.split([q, kv, kv])
        gate, up = self.gate_up_proj.weight.data.chunk(2)
        return {
            "input_layernorm.weight": self.input_layernorm.data,
            "self_attn.q_proj.weight": query,
            "self_attn.k_proj.weight": key,
            "self_attn.v_proj.weight": value,
            "self_attn.o_proj.weight": self.o_proj.weight.data,
            "post_attention_layernorm.weight": self.post_attention_layernorm.data,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": self.down_proj.weight.data,
        }

    def qkv(self, x: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (R, H) -> q (R, heads, d) and k (R, kv_heads, d) rotated, v (R, kv_heads, d)."""
        packed = self.qkv_proj(rms_norm(x, self.input_layernorm, self.eps, backend=self.backend))
        return rope(packed, positions, table, self.heads, self.kv_heads, backend=self.backend)

    def key_value(self, x: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """K and V alone: what a row owes when nobody reads its output (patch rows in the last layer)."""
        normed = rms_norm(x, self.input_layernorm, self.eps, backend=self.backend)
        packed = F.linear(normed, self._key_value_weight()) if self.kv_proj is None else self.kv_proj(normed)
        _, k, v = rope(packed, positions, table, 0, self.kv_heads, backend=self.backend)
        return k, v

    def _key_value_weight(self) -> Tensor:
        return self.qkv_proj.weight[self.heads * self.head_dim :]

    def pack(self, last: bool) -> None:
        """Pack the weights for oneDNN (model/packed.py); the last layer's K and V once more, for `key_value`."""
        if last:
            self.kv_proj = PackedLinear(self._key_value_weight())
        pack_linears(self)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, output projection and MLP: x (R, H), attended (R, heads, d) -> (R, H)."""
        projected = self.o_proj(attended.flatten(1))
        normed, x = rms_norm(projected, self.post_attention_layernorm, self.eps, x, backend=self.backend)
        return x + self.down_proj(swiglu(self.gate_up_proj(normed), backend=self.backend))


class PreFusion(nn.ModuleList):
    """The pre-fusion layers, with the image part and the text part as two calls."""

    def __init__(self, config: LlavaMiniConfig, backend: str = "torch"):
        super().__init__(PreFusionLayer(config, backend) for _ in range(config.prefusion_layer_num))
        self.config, self.backend = config, backend
        self._table: Tensor | None = None

    def table(self, rows: int, device: torch.device) -> Tensor:
        """Rotary table (at least `rows`, d) float32, [cos | sin], grown when a longer sequence comes."""
        if self._table is None or self._table.shape[0] < rows or self._table.device != device:
            self._table = rotary_table(self.config.llama_config(), max(rows, 4096), device)
        return self._table

    def slot_shape(self) -> tuple[int, ...]:
        """K and V of one frame in the image state: (layers, 2, patch rows + Q, kv_heads, d)."""
        c = self.config
        return len(self), 2, c.num_patch_rows + c.num_compressed, c.num_key_value_heads, c.head_dim

    def image_part(self, patches: Tensor, compressed: Tensor, state: Tensor, slots: Sequence[int]) -> Tensor:
        """Run patch rows (F, P, H) and compressed rows (F, Q, H) of F frames.

        K and V go to `state` (S, layers, 2, P + Q, kv_heads, d), frame f's to slot `slots[f]`. Returns the compressed
        rows' outputs (F, Q, H).
        """
        places = torch.tensor(slots, device=state.device)

        def keep(index: int, k: Tensor, v: Tensor) -> None:
            state[places, index, 0], state[places, index, 1] = k, v

        return self.image_rows(patches, compressed, keep)

    def image_rows(self, patches: Tensor, compressed: Tensor, keep: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """As `image_part`, with K and V (F, P + Q, kv_heads, d) of each layer handed to `keep(layer, K, V)`.

        In the last layer patch rows make K and V only.
        """
        frames, num_patches, hidden = patches.shape
        num_compressed = compressed.shape[1]
        rows = num_patches + num_compressed
        table = self.table(rows, patches.device)
        positions = torch.arange(rows, device=patches.device)
        x = torch.cat([patches, compressed], dim=1).flatten(0, 1)
        for index, layer in enumerate(self):
            if index < len(self) - 1:
                q, k, v = layer.qkv(x, positions.repeat(frames), table)
            else:
                k, v = layer.key_value(x, positions.repeat(frames), table)
                x = x.view(frames, rows, hidden)[:, num_patches:].flatten(0, 1)
                q, _, _ = layer.qkv(x, positions[num_patches:].repeat(frames), table)
            k, v = k.unflatten(0, (frames, rows)), v.unflatten(0, (frames, rows))
            keep(index, k, v)
            attended = causal_attention(q.unflatten(0, (frames, -1)), k, v, backend=self.backend)
            x = layer.finish(x, attended.flatten(0, 1))
        return x.view(frames, num_compressed, hidden)

    def text_part(self, text: Tensor, segments: Segments, state: Tensor) -> Tensor:
        """Packed text rows of many segments, each over one frame's image state and causally over itself.

        Args:
            text: (R, H), the segments' rows one after another; masked rows (id <= 0) already left out.
            segments: their lengths sum to R; a segment's frame is its slot in `state`.
            state: (S, layers, 2, P + Q, kv_heads, d) as filled by `image_part`.

        Returns: (R, H).
        """
        return self.text_rows(text, segments, [(state[:, i, 0], state[:, i, 1]) for i in range(len(self))])

    def text_rows(self, text: Tensor, segments: Segments, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """As `text_part`, with each layer's K and V (frames, P + Q, kv_heads, d) of the image part given one by one."""
        prefix = states[0][0].shape[1]
        table = self.table(prefix + segments.max_length, text.device)
        positions = torch.cat([torch.arange(prefix, prefix + n) for n in segments.lengths]).to(text.device)
        x = text
        for layer, (keys, values) in zip(self, states):
            q, k, v = layer.qkv(x, positions, table)
            attended = prefix_attention(q, k, v, keys, values, segments, backend=self.backend)
            x = layer.finish(x, attended)
        return x
