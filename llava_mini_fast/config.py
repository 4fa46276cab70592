"""What a published `config.json` says, checked, under the names that the rest of the package uses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_TYPE = "llava_mini_llama"
ARCHITECTURE = "LlavaMiniLlamaForCausalLM"

IMAGE_SIZE = 336
"""Side of a view in pixels, the vision tower's input."""
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
"""Patches along one side of a view: 24, so 576 patch rows a view."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
COMPRESSOR_HEADS = 8
COMPRESSOR_LN_EPS = 1e-5
CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
"""CLIP ViT-L/14 at 336 pixels, the published vision tower."""
IMAGE_TOKEN_ID = -200
"""The id that stands in a prompt where the media goes (one a prompt, image or video)."""


@dataclass(frozen=True)
class LlavaMiniConfig:
    """The published configuration (`model_type` `llava_mini_llama`): a flat Llama config plus the fusion front end's keys."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    compressor_size: int
    resolution_ratio: int
    prefusion_layer_num: int
    image_aspect_ratio: str | None
    mm_vision_tower: str
    mm_hidden_size: int
    mm_vision_select_layer: int
    unfreeze_mm_vision_tower: bool
    max_rows: int | None
    """`tokenizer_model_max_length`: spliced rows beyond it are cut by `embed`, refused by every other door."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, hash=False)
    vision: dict[str, Any] = field(default_factory=lambda: dict(CLIP_L_336), repr=False, hash=False)
    """The vision tower's CLIP config; `checkpoint.read_config` fills in the winning tower's own."""

    @property
    def views_per_frame(self) -> int:
        """1 in standard resolution; the tiles plus the whole frame (5) in HD."""
        return 1 if self.resolution_ratio == 1 else self.resolution_ratio**2 + 1

    @property
    def num_compressed(self) -> int:
        """Q, the compressed rows of a frame."""
        return self.compressor_size**2

    @property
    def num_patch_rows(self) -> int:
        """Patch rows of a frame: 576, in HD 2880."""
        return self.views_per_frame * GRID**2

    @classmethod
    def from_dict(cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> LlavaMiniConfig:
        """Read a parsed `config.json`.

        Raises:
            ValueError: the config is of another model, lacks a key, or asks for something the published code can't do.
        """
        kind = config.get("model_type")
        if kind != MODEL_TYPE:
            raise ValueError(
                f"config.json has model_type {kind!r}; this engine serves LLaVA-Mini checkpoints, whose model_type is {MODEL_TYPE!r}."
            )
        missing = [key for key in _REQUIRED if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}, which every LLaVA-Mini config has.")
        for key, allowed in _ALLOWED.items():
            if config.get(key, allowed[0]) not in allowed:
                raise ValueError(f"config.json has {key} {config[key]!r}; supported: {', '.join(map(repr, allowed))}.")
        heads = config["num_attention_heads"]
        eos = (generation_config or {}).get("eos_token_id")
        eos = config.get("eos_token_id") if eos is None else eos
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            compressor_size=config.get("compressor_size", 2),
            resolution_ratio=config.get("resolution_ratio", 1),
            prefusion_layer_num=config.get("prefusion_layer_num", 4),
            image_aspect_ratio=config.get("image_aspect_ratio"),
            mm_vision_tower=config["mm_vision_tower"],
            mm_hidden_size=config.get("mm_hidden_size", 1024),
            mm_vision_select_layer=config.get("mm_vision_select_layer", -2),
            unfreeze_mm_vision_tower=bool(config.get("unfreeze_mm_vision_tower", False)),
            max_rows=config.get("tokenizer_model_max_length"),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            raw=dict(config),
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LlavaMiniConfig:
        """Read `config.json` and, where present, `generation_config.json` of a checkpoint directory."""
        directory = Path(directory)
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no config.json; a checkpoint directory holds config.json and *.safetensors."
            )
        generation = directory / "generation_config.json"
        return cls.from_dict(_read_json(path), _read_json(generation) if generation.is_file() else None)

    def llama_config(self, **overrides: Any):
        """The language model's `transformers.LlamaConfig`; `overrides` win."""
        from transformers import LlamaConfig

        ours = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
        return LlamaConfig(**{k: v for k, v in self.raw.items() if k not in ours} | overrides)

    def clip_config(self, **overrides: Any):
        """The vision tower's `transformers.CLIPVisionConfig`; `overrides` win."""
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(**self.vision | overrides)


_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mm_vision_tower",
)  # fmt: skip
_ALLOWED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "resolution_ratio": (1, 2),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return parsed
