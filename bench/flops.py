"""Floating-point operations of the front end, by stage: what a ratio of times can reach at most."""

from __future__ import annotations

from dataclasses import dataclass

from llava_mini_fast.config import COMPRESSOR_HEADS, GRID, PATCH_SIZE, LlavaMiniConfig


@dataclass(frozen=True)
class Gemm:
    """`count` products (m, k) x (k, n)."""

    m: int
    k: int
    n: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.count


def tower_gemms(config: LlavaMiniConfig, views: int, published: bool = False) -> list[Gemm]:
    """The vision tower's linear layers over `views` views; the published code runs every layer."""
    clip = config.vision
    width, inner, layers = clip["hidden_size"], clip["intermediate_size"], clip["num_hidden_layers"]
    used = layers if published else layers + 1 + config.mm_vision_select_layer
    rows = views * (GRID**2 + 1)
    return [
        Gemm(views * GRID**2, 3 * PATCH_SIZE**2, width),
        Gemm(rows, width, width, 4 * used),
        Gemm(rows, width, inner, used),
        Gemm(rows, inner, width, used),
    ]


def projector_gemms(config: LlavaMiniConfig, frames: int) -> list[Gemm]:
    rows = frames * (config.num_patch_rows + config.num_compressed)
    return [Gemm(rows, config.mm_hidden_size, config.hidden_size), Gemm(rows, config.hidden_size, config.hidden_size)]


def layer_gemms(config: LlavaMiniConfig, rows: int, count: int = 1) -> list[Gemm]:
    """Whole Llama layers over `rows` rows."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return [
        Gemm(rows, h, q + 2 * kv, count),
        Gemm(rows, q, h, count),
        Gemm(rows, h, 2 * i, count),
        Gemm(rows, i, h, count),
    ]


def image_part_gemms(config: LlavaMiniConfig, frames: int) -> list[Gemm]:
    """The image part: in the last layer patch rows make K and V only."""
    h, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    rows = frames * (config.num_patch_rows + config.num_compressed)
    whole = layer_gemms(config, rows, config.prefusion_layer_num - 1)
    return [*whole, Gemm(rows, h, 2 * kv), *layer_gemms(config, frames * config.num_compressed)]


def front_gemms(config: LlavaMiniConfig, frames: int, text_rows: int) -> list[Gemm]:
    """Every linear layer of `frames` cold frames and one prompt of `text_rows` rows, but for the compressor's few."""
    return [
        *tower_gemms(config, frames * config.views_per_frame),
        *projector_gemms(config, frames),
        *image_part_gemms(config, frames),
        *layer_gemms(config, frames * text_rows, config.prefusion_layer_num),
    ]


def attention_flops(queries: int, keys: int, heads: int, head_dim: int) -> int:
    """Scores and weighted sum, without a saving for the causal half."""
    return 4 * queries * keys * heads * head_dim


def front_flops(config: LlavaMiniConfig, frames: int, text_rows: int, published: bool = False) -> dict[str, int]:
    """Operations by stage for `frames` cold frames and one prompt of `text_rows` rows.

    `published`: the vision tower's last layer runs too, the compressor forms K and V, and every row runs through every
    pre-fusion layer.
    """
    c, clip = config, config.vision
    patches, compressed = c.num_patch_rows, c.num_compressed
    grid = patches if c.views_per_frame == 1 else patches - GRID**2
    views, view_rows = frames * c.views_per_frame, GRID**2 + 1
    layers = clip["num_hidden_layers"] + (0 if published else 1 + c.mm_vision_select_layer)
    tower = sum(g.flops for g in tower_gemms(c, views, published))
    tower += layers * views * attention_flops(view_rows, view_rows, 1, clip["hidden_size"])
    d = c.mm_hidden_size
    if published:
        compressor = 2 * (2 * grid + 2 * compressed) * d * d + attention_flops(compressed, grid, 1, d)
    else:
        compressor = 4 * COMPRESSOR_HEADS * compressed * grid * d + 2 * 2 * compressed * d * d
    rows = patches + compressed
    heads, head_dim, depth = c.num_attention_heads, c.head_dim, c.prefusion_layer_num
    if published:
        whole = rows + text_rows
        fused = sum(g.flops for g in layer_gemms(c, whole, depth)) + depth * attention_flops(
            whole, whole, heads, head_dim
        )
        stages = {"pre-fusion": frames * fused}
    else:
        image = sum(g.flops for g in image_part_gemms(c, 1))
        image += (depth - 1) * attention_flops(rows, rows, heads, head_dim)
        image += attention_flops(compressed, rows, heads, head_dim)
        text = sum(g.flops for g in layer_gemms(c, text_rows, depth))
        text += depth * attention_flops(text_rows, rows + text_rows, heads, head_dim)
        stages = {"image part": frames * image, "text part": frames * text}
    projector = sum(g.flops for g in projector_gemms(c, frames))
    return {"vision tower": tower, "compressor": frames * compressor, "projector": projector, **stages}
