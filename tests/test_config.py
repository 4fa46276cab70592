"""config.json, read and refused."""

import json

import pytest

from llava_mini_fast.config import LlavaMiniConfig

MINIMAL = {
    "model_type": "llava_mini_llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100, "mm_vision_tower": "clip",
}  # fmt: skip


def test_defaults_are_the_published_codes():
    config = LlavaMiniConfig.from_dict(MINIMAL)
    assert (config.compressor_size, config.prefusion_layer_num, config.resolution_ratio) == (2, 4, 1)
    assert config.num_key_value_heads == 4 and config.head_dim == 16
    assert (config.views_per_frame, config.num_compressed, config.num_patch_rows) == (1, 4, 576)


def test_hd_has_five_views():
    config = LlavaMiniConfig.from_dict(MINIMAL | {"resolution_ratio": 2, "compressor_size": 8})
    assert (config.views_per_frame, config.num_compressed, config.num_patch_rows) == (5, 64, 2880)


def test_stop_ids_come_from_the_generation_config_first():
    config = LlavaMiniConfig.from_dict(MINIMAL | {"eos_token_id": 2}, {"eos_token_id": [7, 8]})
    assert config.eos_token_ids == (7, 8)
    assert LlavaMiniConfig.from_dict(MINIMAL | {"eos_token_id": 2}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava"}, "model_type 'llava'.*'llava_mini_llama'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'; supported: 'mlp2x_gelu'"),
        ({"resolution_ratio": 3}, "resolution_ratio 3; supported: 1, 2"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
    ],
)
def test_other_configs_are_refused_with_a_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        LlavaMiniConfig.from_dict(MINIMAL | change)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LlavaMiniConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        LlavaMiniConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    assert LlavaMiniConfig.from_pretrained(tmp_path).mm_vision_tower == "clip"
