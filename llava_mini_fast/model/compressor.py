"""The compression module: Q constant queries pool a frame's CLIP features (published: `Resampler`; paper section 4.1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mini_fast.config import COMPRESSOR_HEADS, COMPRESSOR_LN_EPS
from llava_mini_fast.ops.compressor_attention import compressor_attention


class Compressor(nn.Module):
    """Cross-attention of learned queries over patch features, folded.

    The queries are constants, so W_q, W_k, their biases, LayerNorm's weights and the positions fold into one
    (8Q, D) matrix and a (8Q, N) bias; LayerNorm's weights, W_v and W_o act behind the softmax, which is exact up
    to rounding. Parameters have the published names and shapes; the folded constants are float32 and made on first use.
    """

    def __init__(self, size: int, width: int, backend: str = "torch"):
        super().__init__()
        self.size, self.width, self.backend = size, width, backend
        self.query = nn.Parameter(torch.empty(size * size, width))
        self.pos_embed = nn.Parameter(torch.empty(size * size, width))
        self.attn = _AttentionWeights(width)
        self.ln_q = nn.LayerNorm(width, eps=COMPRESSOR_LN_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=COMPRESSOR_LN_EPS)
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}

    def refold(self) -> None:
        """Forget the folded constants; call after the parameters change."""
        self._folded.clear()

    @torch.no_grad()
    def folded(self, num_patches: int) -> tuple[Tensor, Tensor]:
        """(weight (8Q, D), bias (8Q, N)), float32, for `compressor_attention` over N = num_patches rows."""
        if num_patches not in self._folded:
            d, h = self.width, COMPRESSOR_HEADS
            wq, wk, _ = self.attn.in_proj_weight.double().chunk(3)
            bq, _, _ = self.attn.in_proj_bias.double().chunk(3)  # the key bias shifts a whole softmax row: it cancels
            ln_q = F.layer_norm(
                self.query.double(), (d,), self.ln_q.weight.double(), self.ln_q.bias.double(), COMPRESSOR_LN_EPS
            )
            q = F.linear(ln_q + self.pos_embed.double(), wq, bq).view(-1, h, d // h) / math.sqrt(d // h)
            keys = torch.einsum("qhe,hed->qhd", q, wk.view(h, d // h, d)).reshape(-1, d)
            positions = resized_positions(self.pos_embed, math.isqrt(num_patches)).double()
            bias = keys @ (positions + self.ln_kv.bias.double()).T
            self._folded[num_patches] = (keys * self.ln_kv.weight.double()).float(), bias.float()
        return self._folded[num_patches]

    def forward(self, features: Tensor) -> Tensor:
        """features (F, N, D), N = 576 or 2304 in spatial order -> (F, Q, D) in the features' dtype."""
        d, h = self.width, COMPRESSOR_HEADS
        constants = self.folded(features.shape[1])
        pooled = compressor_attention(features, *constants, eps=COMPRESSOR_LN_EPS, backend=self.backend)
        pooled = pooled * self.ln_kv.weight.float() + self.ln_kv.bias.float()
        pooled = pooled.to(features.dtype).unflatten(1, (-1, h))  # (F, Q, h, D)
        wv, bv = self.attn.in_proj_weight[2 * d :], self.attn.in_proj_bias[2 * d :]
        values = torch.einsum("fqhd,hed->fqhe", pooled, wv.view(h, d // h, d)).flatten(2) + bv
        return self.attn.out_proj(values)

    def attention_map(self, features: Tensor) -> Tensor:
        """Head-averaged weights (F, Q, N) that sum to 1 over N: what each compressed row looked at (paper's heat maps)."""
        constants = self.folded(features.shape[1])
        _, weights = compressor_attention(
            features, *constants, eps=COMPRESSOR_LN_EPS, return_weights=True, backend=self.backend
        )
        return weights.unflatten(1, (-1, COMPRESSOR_HEADS)).mean(2)


class _AttentionWeights(nn.Module):
    """The parameters of `nn.MultiheadAttention`, under its names."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)


def resized_positions(table: Tensor, grid: int) -> Tensor:
    """Position table (C*C, D) -> (grid*grid, D) float32: bicubic, align_corners False, as published."""
    size = math.isqrt(table.shape[0])
    image = table.float().view(1, size, size, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2)
