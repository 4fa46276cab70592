"""The demo model before it has learned anything: its sizes, its tokenizer, and weights drawn from a seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from llava_mini_fast.config import ARCHITECTURE, MODEL_TYPE, LlavaMiniConfig
from llava_mini_fast.demo.data import clips, scenes
from llava_mini_fast.demo.questions import FACTS, about_clip, about_scene
from llava_mini_fast.demo.tower import CONFIG as TOWER
from llava_mini_fast.preprocess.prompt import LLAMA_SYSTEM
from llava_mini_fast.testing.checkpoints import DATA, position_table

SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "prefusion_layer_num": 3, "compressor_size": 1, "mm_hidden_size": TOWER["hidden_size"],
    "mm_vision_select_layer": -1,
}  # fmt: skip
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>")  # fmt: skip
VOCABULARY = 1024
"""At most; the questions' words need fewer tokens."""


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE that writes every word of the demo's questions as one token, with Llama-3.1's chat format.

    Returns: the tokenizer, which is saved to `folder` too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    template = json.loads((DATA / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[0],
        eos_token="<|eot_id|>",
        pad_token=SPECIAL[-1],
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _texts() -> Iterator[str]:
    """Text with every word that a prompt or an answer of the demo can hold."""
    rng = Random(0)
    for _ in range(50):
        yield f"system\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{LLAMA_SYSTEM}"
        yield "user\n\n"
        yield "assistant\n\n"
    asked = [question for scene in islice(scenes(0, "train"), 1000) for question in about_scene(scene, rng)]
    asked += [about_clip(clip, rng) for clip in islice(clips(0, "train"), 1000)]
    for question in (*asked, *FACTS):
        yield question.text
        yield question.answer


def make_fresh(folder: Path, tower: Path, sizes: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Write a checkpoint in the published format: the trained tower of `tower`, everything else drawn from `seed`.

    Args:
        sizes: config.json keys in place of `SIZES`'.

    Returns:
        `folder`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    stops = [tokenizer.convert_tokens_to_ids(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stops}
    config = SIZES | (sizes or {}) | ids | {
        "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "vocab_size": len(tokenizer), "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "torch_dtype": "float16",
        "image_aspect_ratio": "pad", "resolution_ratio": 1, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch", "mm_vision_tower": "clip", "tokenizer_model_max_length": 4096,
    }  # fmt: skip
    shutil.copytree(tower, folder / "clip", dirs_exist_ok=True)
    save_file(
        _weights(LlavaMiniConfig.from_dict(config), seed), folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    # last, since its presence says that the checkpoint is whole
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _weights(config: LlavaMiniConfig, seed: int) -> dict[str, Tensor]:
    """Every tensor but the tower's: matrices keep their input's scale, what is added to the residual stream is small."""
    from transformers import LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    h, i, width, heads = config.hidden_size, config.intermediate_size, config.mm_hidden_size, config.num_attention_heads
    kv = config.num_key_value_heads * config.head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    def layer(name: str, depth: int) -> dict[str, Tensor]:
        out = (2 * depth) ** -0.5
        q = heads * config.head_dim
        return {
            f"{name}.self_attn.q_proj.weight": matrix(q, h), f"{name}.self_attn.k_proj.weight": matrix(kv, h),
            f"{name}.self_attn.v_proj.weight": matrix(kv, h), f"{name}.self_attn.o_proj.weight": matrix(h, q, out),
            f"{name}.mlp.gate_proj.weight": matrix(i, h), f"{name}.mlp.up_proj.weight": matrix(i, h),
            f"{name}.mlp.down_proj.weight": matrix(h, i, out),
            f"{name}.input_layernorm.weight": torch.ones(h), f"{name}.post_attention_layernorm.weight": torch.ones(h),
        }  # fmt: skip

    weights = {
        "model.embed_tokens.weight": torch.randn(config.vocab_size, h, generator=generator) * h**-0.5,
        "model.norm.weight": torch.ones(h),
        "model.compressor.query": torch.randn(config.num_compressed, width, generator=generator),
        "model.compressor.pos_embed": torch.from_numpy(position_table(config.compressor_size, width)),
        "model.compressor.attn.in_proj_weight": matrix(3 * width, width),
        "model.compressor.attn.in_proj_bias": torch.zeros(3 * width),
        "model.compressor.attn.out_proj.weight": matrix(width, width),
        "model.compressor.attn.out_proj.bias": torch.zeros(width),
        # small, as the embeddings of words are
        "model.mm_projector.0.weight": matrix(h, width), "model.mm_projector.0.bias": torch.zeros(h),
        "model.mm_projector.2.weight": matrix(h, h, 0.2), "model.mm_projector.2.bias": torch.zeros(h),
    }  # fmt: skip
    for name in ("ln_q", "ln_kv"):
        weights |= {
            f"model.compressor.{name}.weight": torch.ones(width),
            f"model.compressor.{name}.bias": torch.zeros(width),
        }
    for stack, depth in (("layers", config.num_hidden_layers), ("prefusion_layers", config.prefusion_layer_num)):
        for n in range(depth):
            weights |= layer(f"model.{stack}.{n}", depth)
    with torch.device("meta"):
        expected = set(LlamaForCausalLM(config.llama_config()).state_dict()) - {"lm_head.weight"}
    assert expected <= set(weights), expected - set(weights)
    return weights
