"""The specification's maths, plain and slow: the oracle that every fast path is compared with.

One frame and one prompt at a time, the whole sequence through every layer under an explicit mask, no kernel, no cache,
no folding, no `transformers` model. The functions work in whatever floating dtype their inputs have and are usable
alone; `Reference` reads a checkpoint and strings them together. float32 shows the published numbers, float64 the
numbers that rounding moves both of them away from.

Shapes: V views a frame, N patch rows (576 a view), D vision width, H LLM width, Q compressed rows, L prompt ids, T frames.
Weights are mappings from the published parameter names, without the module's prefix, to tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mini_fast.config import (
    COMPRESSOR_HEADS,
    COMPRESSOR_LN_EPS,
    GRID,
    IMAGE_TOKEN_ID,
    PATCH_SIZE,
    LlavaMiniConfig,
)

Weights = Mapping[str, Tensor]

CLIP_DEFAULTS = {"num_attention_heads": 16, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
"""CLIP-L/336, the tower of every published checkpoint: used where a tower inside a checkpoint comes without a config."""


def part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights under `prefix`, with the prefix taken off their names."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: where the published code leaves low precision, as norms, softmax and angles do."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """(..., in) -> (..., out); the bias is added where the checkpoint has one."""
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(..., D) -> (..., D), with the biased variance."""
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    return (centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., H) -> (..., H), in Llama's order of casts: wide inside, back to x's dtype, then the weight."""
    return (wide(x) / torch.sqrt(wide(x).square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, by the error function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(..., I), (..., I) -> (..., I): SiLU of the gate times the other half."""
    return gate * torch.sigmoid(gate) * up


def heads(x: Tensor, count: int) -> Tensor:
    """(rows, count * d) -> (count, rows, d)."""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Scaled dot product attention, written out.

    Args:
        q: (query heads, M, d).
        k, v: (key heads, N, d); each key head serves query heads / key heads consecutive query heads.
        visible: bool (M, N), true where a query may look; None for everywhere.

    Returns:
        (M, query heads * d).
    """
    group = q.shape[0] // k.shape[0]
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return (wide(scores).softmax(-1).to(v.dtype) @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)


def clip_features(view: Tensor, weights: Weights, config: Mapping[str, Any], select_layer: int = -2) -> Tensor:
    """The vision tower: one normalised view (3, 336, 336) -> patch features (576, D), class token dropped.

    `select_layer` counts hidden states, the embeddings being number 0; layers behind it never run.
    """
    count = len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")})
    width, eps = weights["embeddings.class_embedding"].shape[0], config["layer_norm_eps"]
    activation = {"quick_gelu": quick_gelu, "gelu": gelu}[config["hidden_act"]]
    # A convolution whose stride is its kernel is one product a patch.
    patches = view.unfold(1, PATCH_SIZE, PATCH_SIZE).unfold(2, PATCH_SIZE, PATCH_SIZE)  # (3, 24, 24, 14, 14)
    patches = patches.permute(1, 2, 0, 3, 4).reshape(GRID * GRID, -1)
    x = patches @ weights["embeddings.patch_embedding.weight"].reshape(width, -1).T
    x = torch.cat([weights["embeddings.class_embedding"][None], x]) + weights["embeddings.position_embedding.weight"]
    x = layer_norm(x, weights["pre_layrnorm.weight"], weights["pre_layrnorm.bias"], eps)
    for n in range(select_layer if select_layer >= 0 else count + 1 + select_layer):
        w = part(weights, f"encoder.layers.{n}.")
        y = layer_norm(x, w["layer_norm1.weight"], w["layer_norm1.bias"], eps)
        q, k, v = (heads(linear(y, w, f"self_attn.{p}_proj"), config["num_attention_heads"]) for p in "qkv")
        x = x + linear(attention(q, k, v), w, "self_attn.out_proj")
        y = layer_norm(x, w["layer_norm2.weight"], w["layer_norm2.bias"], eps)
        x = x + linear(activation(linear(y, w, "mlp.fc1")), w, "mlp.fc2")
    return x[1:]


def tiles_to_grid(tiles: Tensor) -> Tensor:
    """Tile features (R * R, 576, D), row-major, -> the picture's one (24R x 24R) grid in spatial order, (R * R * 576, D)."""
    ratio = math.isqrt(tiles.shape[0])
    grid = tiles.reshape(ratio, ratio, GRID, GRID, -1)  # tile row, tile column, patch row, patch column
    return grid.permute(0, 2, 1, 3, 4).reshape(ratio * ratio * GRID * GRID, -1)


def bicubic_matrix(size_in: int, size_out: int, dtype: torch.dtype) -> Tensor:
    """(size_out, size_in): bicubic resizing along one axis (a = -0.75, corners not aligned, edges repeated)."""
    a, matrix = -0.75, torch.zeros(size_out, size_in, dtype=dtype)
    for i in range(size_out):
        place = (i + 0.5) * size_in / size_out - 0.5
        left = math.floor(place)
        for tap in range(left - 1, left + 3):
            x = abs(place - tap)
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            matrix[i, min(max(tap, 0), size_in - 1)] += near if x <= 1 else far
    return matrix


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """The compressor's position table (C * C, D) -> (grid * grid, D), bicubically."""
    size = math.isqrt(table.shape[0])
    m = bicubic_matrix(size, grid, table.dtype)
    return torch.einsum("ri,cj,ijd->rcd", m, m, table.reshape(size, size, -1)).flatten(0, 1)


def compressor(features: Tensor, weights: Weights) -> Tensor:
    """Patch features of a square grid in spatial order (N, D) -> compressed features (Q, D).

    Multi-head attention of the learned queries over the LayerNormed features; positions are added to queries and keys,
    not to values. Weights: query, pos_embed, ln_q.*, ln_kv.*, attn.in_proj_*, attn.out_proj.*.
    """
    table = weights["pos_embed"]
    query = layer_norm(weights["query"], weights["ln_q.weight"], weights["ln_q.bias"], COMPRESSOR_LN_EPS) + table
    value = layer_norm(features, weights["ln_kv.weight"], weights["ln_kv.bias"], COMPRESSOR_LN_EPS)
    key = value + resize_positions(table, math.isqrt(features.shape[0]))
    wq, wk, wv = weights["attn.in_proj_weight"].chunk(3)
    bq, bk, bv = weights["attn.in_proj_bias"].chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    return linear(attention(*(heads(x, COMPRESSOR_HEADS) for x in (q, k, v))), weights, "attn.out_proj")


def projector(x: Tensor, weights: Weights) -> Tensor:
    """(rows, D) -> (rows, H), the same weights for patch and compressed features. Weights: 0.*, 2.*."""
    return linear(gelu(linear(x, weights, "0")), weights, "2")


def rope_frequencies(config: LlavaMiniConfig) -> Tensor:
    """(head_dim / 2,) float32: radians a position, by the config's `rope_theta` and `rope_scaling`.

    Frequencies and angles are float32 whatever the model's dtype, in the published order of operations: thousands of
    positions multiply their rounding to a part of the result that every implementation has to share.

    Raises:
        ValueError: another kind of scaling than `default` and `llama3`.
    """
    rope = config.raw.get("rope_parameters") or config.raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.raw.get("rope_theta") or 10000.0
    frequencies = 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return frequencies
    if kind != "llama3":
        raise ValueError(f"rope_scaling has rope_type {kind!r}; supported: 'default', 'llama3'.")
    # Turns within the context that the base model was trained on decide: few turns are slowed down by `factor`,
    # many are kept, and between the two limits the one passes smoothly into the other.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope["factor"]


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions: x (heads, rows, d), positions int (rows,), frequencies float32 (d / 2,).

    Pairs are an element of the first half and its partner in the second, as in Llama.
    """
    angles = (positions.float()[:, None] * frequencies).to(wide(x).dtype)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def llama_layer(rows: Tensor, positions: Tensor, visible: Tensor, weights: Weights, config: LlavaMiniConfig) -> Tensor:
    """One Llama decoder layer: rows (R, H), positions int (R,), visible bool (R, R) -> (R, H).

    Weights: input_layernorm.weight, self_attn.{q,k,v,o}_proj.weight, post_attention_layernorm.weight,
    mlp.{gate,up,down}_proj.weight.
    """
    frequencies = rope_frequencies(config)
    x = rms_norm(rows, weights["input_layernorm.weight"], config.rms_norm_eps)
    q = heads(linear(x, weights, "self_attn.q_proj"), config.num_attention_heads)
    k = heads(linear(x, weights, "self_attn.k_proj"), config.num_key_value_heads)
    v = heads(linear(x, weights, "self_attn.v_proj"), config.num_key_value_heads)
    mixed = attention(rotate(q, positions, frequencies), rotate(k, positions, frequencies), v, visible)
    rows = rows + linear(mixed, weights, "self_attn.o_proj")
    x = rms_norm(rows, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    x = swiglu(linear(x, weights, "mlp.gate_proj"), linear(x, weights, "mlp.up_proj"))
    return rows + linear(x, weights, "mlp.down_proj")


def prefusion(
    patches: Tensor, compressed: Tensor, text: Tensor, ids: Tensor, layers: list[Weights], config: LlavaMiniConfig
) -> tuple[Tensor, Tensor]:
    """Fuse one frame with one prompt.

    Args:
        patches: (N, H) projected patch rows; in HD the tiles' rows in spatial order, then the whole picture's.
        compressed: (Q, H) projected compressed rows.
        text: (L, H) plain embeddings of the prompt.
        ids: int (L,). Rows with id <= 0 (placeholder, padding, and the ordinary token 0) are seen by nobody, take no
            position and come out as they went in.
        layers: the pre-fusion layers' weights; there is no norm behind them.

    Returns:
        The fused compressed rows (Q, H) and the fused text rows (L, H).
    """
    rows = torch.cat([patches, compressed, text])
    vision = len(patches) + len(compressed)
    keep = torch.cat([torch.ones(vision, dtype=torch.bool), ids > 0])
    positions = (keep.cumsum(0) - 1).masked_fill(~keep, 1)
    visible = torch.ones(len(rows), len(rows), dtype=torch.bool).tril() & keep
    for weights in layers:
        rows = llama_layer(rows, positions, visible, weights, config)
    fused = torch.where(keep[vision:, None], rows[vision:], text)
    return rows[len(patches) : vision], fused


def frame_mean(frames: list[Tensor]) -> Tensor:
    """The fused text rows of every frame, (L, H) each, -> their mean (L, H), summed frame by frame in float32 or wider."""
    total = torch.zeros_like(frames[0], dtype=torch.promote_types(frames[0].dtype, torch.float32))
    for frame in frames:
        total += frame
    return (total / len(frames)).to(frames[0].dtype)


def splice(ids: Tensor, text: Tensor, vision: Tensor, max_rows: int | None = None) -> Tensor:
    """Text rows (L, H) with the placeholder's row replaced by the vision rows (T * Q, H), cut at `max_rows`.

    Without a placeholder in `ids` no vision row goes in.
    """
    at = (ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
    rows = torch.cat([text[: at[0]], vision, text[at[0] + 1 :]]) if at else text
    return rows[:max_rows]


class Reference:
    """The published model on the CPU, one frame and one prompt at a time.

    Args:
        directory: a checkpoint directory with `*.safetensors`; `mm_vision_tower` must be a directory too (or the
            checkpoint must carry the tower).
        dtype: torch.float32 or torch.float64; weights are cast on reading.

    Raises:
        ValueError: a part of the model is missing, or the config is of another model.
    """

    def __init__(self, directory: str | Path, dtype: torch.dtype = torch.float32):
        directory = Path(directory)
        self.config, self.dtype = LlavaMiniConfig.from_pretrained(directory), dtype
        weights = read_weights(directory, dtype)
        self.tower, self.tower_config = find_tower(directory, self.config, weights, dtype)
        self.compressor = part(weights, "model.compressor.")
        self.projector = part(weights, "model.mm_projector.")
        self.prefusion = [part(weights, f"model.prefusion_layers.{n}.") for n in range(self.config.prefusion_layer_num)]
        self.layers = [part(weights, f"model.layers.{n}.") for n in range(self.config.num_hidden_layers)]
        self.embed_tokens, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self.lm_head = weights.get("lm_head.weight", self.embed_tokens)

    def frame(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """One frame's views (V, 3, 336, 336) -> projected patch rows (V * 576, H) and compressed rows (Q, H)."""
        select = self.config.mm_vision_select_layer
        features = [clip_features(view, self.tower, self.tower_config, select) for view in views]
        if len(features) == 1:
            grid = patches = features[0]
        else:  # the tiles make one grid; the whole picture, last, is shown to pre-fusion and never compressed
            grid = tiles_to_grid(torch.stack(features[:-1]))
            patches = torch.cat([grid, features[-1]])
        return projector(patches, self.projector), projector(compressor(grid, self.compressor), self.projector)

    @torch.no_grad()
    def embed(self, prompt_ids: list[int], pixels: Tensor | None = None) -> Tensor:
        """Fused rows (R, H), as the LLM receives them.

        Args:
            prompt_ids: with -200 where the media goes. Media without a placeholder fuses the text and adds no row.
            pixels: normalised, (V, 3, 336, 336) for an image, (T, V, 3, 336, 336) for a video, or None: plain embeddings.

        Raises:
            ValueError: two placeholders, or a placeholder without pixels, or pixels of another shape.
        """
        ids = torch.tensor(prompt_ids, dtype=torch.int64)
        placeholders = int((ids == IMAGE_TOKEN_ID).sum())
        if placeholders > 1:
            raise ValueError(
                f"prompt_ids holds {placeholders} placeholders ({IMAGE_TOKEN_ID}); a prompt takes one medium."
            )
        if pixels is None:
            if placeholders:
                raise ValueError(f"prompt_ids holds a placeholder ({IMAGE_TOKEN_ID}) but no pixels were given.")
            return self.embed_tokens[ids]
        frames = pixels if pixels.ndim == 5 else pixels[None]
        if frames.ndim != 5 or not len(frames) or frames.shape[1] != self.config.views_per_frame:
            raise ValueError(
                f"pixels has shape {tuple(pixels.shape)}; this checkpoint takes ({self.config.views_per_frame}, 3, 336, 336) "
                f"for an image and (frames, {self.config.views_per_frame}, 3, 336, 336) for a video."
            )
        text = self.embed_tokens[ids.clamp(min=0)]
        fused = [
            prefusion(*self.frame(views), text, ids, self.prefusion, self.config) for views in frames.to(self.dtype)
        ]
        vision = torch.cat([compressed for compressed, _ in fused])
        return splice(ids, frame_mean([rows for _, rows in fused]), vision, self.config.max_rows)

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """The LLM: rows (R, H) at positions 0 .. R - 1 -> logits of every row, (R, vocab)."""
        positions, visible = torch.arange(len(rows)), torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        for weights in self.layers:
            rows = llama_layer(rows, positions, visible, weights, self.config)
        return rms_norm(rows, self.norm, self.config.rms_norm_eps) @ self.lm_head.T

    def generate(
        self, prompt_ids: list[int], pixels: Tensor | None = None, max_new_tokens: int = 16, stop: bool = True
    ) -> list[int]:
        """New tokens, greedily; with `stop` the first stop id ends the answer and is part of it."""
        return self.answer(self.embed(prompt_ids, pixels), max_new_tokens, stop)

    @torch.no_grad()
    def answer(self, rows: Tensor, max_new_tokens: int = 16, stop: bool = True) -> list[int]:
        """`generate` from fused rows (R, H). The sequence is recomputed for every token.

        A new token enters as its plain embedding; it is never pre-fused.
        """
        tokens: list[int] = []
        while len(tokens) < max_new_tokens and not (stop and tokens and tokens[-1] in self.config.eos_token_ids):
            tokens.append(int(self.logits(rows)[-1].argmax()))
            rows = torch.cat([rows, self.embed_tokens[tokens[-1]][None]])
        return tokens


def read_weights(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of every `*.safetensors` file of a directory, in `dtype`."""
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no *.safetensors file; the reference reads weights in that format only.")
    return {name: tensor.to(dtype) for file in files for name, tensor in load_file(file).items()}


def find_tower(
    directory: Path, config: LlavaMiniConfig, weights: Weights, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vision tower's weights (names without `vision_model.`) and its config.

    The checkpoint's own tower counts where the config says it was trained, or where `mm_vision_tower` can't be had;
    a relative `mm_vision_tower` is looked up inside the checkpoint before the working directory.
    """
    places = [directory / config.mm_vision_tower, Path(config.mm_vision_tower)]
    outside = next((place for place in places if (place / "config.json").is_file()), None)
    tower = part(weights, "model.vision_tower.vision_tower.")
    settings = {}
    if outside:
        settings = json.loads((outside / "config.json").read_text(encoding="utf-8"))
        settings = settings.get("vision_config") or settings
        if not (tower and config.unfreeze_mm_vision_tower):
            tower = read_weights(outside, dtype)
    if not tower:
        raise ValueError(
            f"the vision tower {config.mm_vision_tower!r} is no directory here and the checkpoint carries no tower of its own."
        )
    return part(tower, "vision_model.") or tower, CLIP_DEFAULTS | settings
