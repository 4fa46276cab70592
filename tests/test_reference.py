"""The oracle against the published numbers, and its stages against torch's own modules."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mini_fast import reference
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.reference import Reference
from llava_mini_fast.testing.checkpoints import cached
from llava_mini_fast.testing.goldens import ReferenceEngine, load_cases

GOLDENS = Path(__file__).parent / "goldens"
CASES = {case.name: case for case in load_cases(GOLDENS)}
IN_DOUBLE = ["image_short", "image_c2", "vicuna", "video_one_frame"]

_engines = {}


def engine(case, dtype="float32"):
    directory = case.checkpoint_directory()
    if (directory, dtype) not in _engines:
        _engines[directory, dtype] = ReferenceEngine(directory, dtype)
    return _engines[directory, dtype]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_numbers(name):
    (row,) = CASES[name].rows
    tensors = load_file(GOLDENS / "cases" / f"{name}.safetensors")
    model = engine(CASES[name])
    fused = model.embed(row.prompt_ids, row.media)
    torch.testing.assert_close(fused, row.fused, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.reference.logits(fused)[-1], tensors["logits_last"][0], rtol=0, atol=1e-3)
    assert model.reference.answer(fused) == row.tokens


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_float64_agrees_with_float32(name):
    (row,) = CASES[name].rows
    double, single = engine(CASES[name], "float64"), engine(CASES[name])
    fused = double.embed(row.prompt_ids, row.media)
    assert fused.dtype == torch.float64
    torch.testing.assert_close(fused, row.fused.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(fused, single.embed(row.prompt_ids, row.media).double(), rtol=0, atol=1e-4)
    assert double.reference.answer(fused) == row.tokens


def test_there_are_as_many_cases_as_published():
    assert len(CASES) == 20
    assert not [case.name for case in CASES.values() if case.problem]


def test_compressor_equals_the_published_one_and_torchs_attention():
    model = Reference(cached("llama31_c2", GOLDENS))
    weights, features = model.compressor, torch.randn(576, 1024, generator=torch.manual_seed(0))
    module = torch.nn.MultiheadAttention(1024, 8, batch_first=True)
    module.load_state_dict(reference.part(weights, "attn."))
    table = weights["pos_embed"]
    square = table.reshape(1, 2, 2, 1024).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, (24, 24), mode="bicubic", align_corners=False)
    norms = [
        torch.nn.functional.layer_norm(x, (1024,), weights[f"{n}.weight"], weights[f"{n}.bias"], 1e-5)
        for x, n in ((weights["query"], "ln_q"), (features, "ln_kv"))
    ]
    query, key = norms[0] + table, norms[1] + resized[0].flatten(1).T
    with torch.no_grad():
        expected, _ = module(query[None], key[None], norms[1][None])
    torch.testing.assert_close(reference.compressor(features, weights), expected[0], rtol=0, atol=2e-5)

    case = CASES["image_c2"]
    model = engine(case)
    features = reference.clip_features(
        model.pixels(case.rows[0].media)[0, 0], model.reference.tower, model.reference.tower_config
    )
    published = load_file(GOLDENS / "cases" / "image_c2.safetensors")["compressor.0.out"][0]
    torch.testing.assert_close(reference.compressor(features, weights), published, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "grid"), [(1, 24), (2, 24), (8, 48), (24, 24)])
def test_position_table_is_resized_as_torch_does(size, grid):
    table = torch.randn(size * size, 16, dtype=torch.float64, generator=torch.manual_seed(1))
    square = table.reshape(1, size, size, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    torch.testing.assert_close(reference.resize_positions(table, grid), expected[0].flatten(1).T)


def test_attention_equals_torchs():
    q, k, v = (torch.randn(heads, 7, 16, dtype=torch.float64) for heads in (4, 2, 2))
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v, visible), expected.transpose(0, 1).flatten(1))


def test_rope_frequencies_equal_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlavaMiniConfig.from_pretrained(cached("llama31", GOLDENS))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config.llama_config(), "cpu")
    assert torch.equal(reference.rope_frequencies(config), expected)
    strange = {**config.raw, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    with pytest.raises(ValueError, match="'yarn'"):
        reference.rope_frequencies(LlavaMiniConfig.from_dict(strange))


def test_tiles_make_one_grid_in_spatial_order():
    tiles = torch.arange(4 * 576).reshape(4, 576, 1)
    grid = reference.tiles_to_grid(tiles).reshape(48, 48)
    for tile, corner in enumerate([(0, 0), (0, 24), (24, 0), (24, 24)]):
        part = grid[corner[0] : corner[0] + 24, corner[1] : corner[1] + 24]
        assert torch.equal(part, tiles[tile].reshape(24, 24))


def test_frame_mean_sums_in_float32():
    frames = [torch.full((2, 3), x, dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0, 2.0)]
    mean = reference.frame_mean(frames)
    assert mean.dtype == torch.bfloat16
    assert torch.equal(mean, torch.full((2, 3), 65.0, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def llama31():
    return Reference(cached("llama31", GOLDENS))


@pytest.fixture(scope="module")
def fuse():
    """fuse(ids) -> plain text rows, fused vision row, fused text rows: random patches, one compressed row, float64."""
    model = Reference(cached("llama31", GOLDENS), torch.float64)
    vision = torch.randn(6, 256, dtype=torch.float64, generator=torch.manual_seed(2))

    def fuse(ids):
        ids = torch.tensor(ids)
        text = model.embed_tokens[ids.clamp(min=0)]
        return text, *reference.prefusion(vision[:5], vision[5:], text, ids, model.prefusion, model.config)

    return fuse


class TestPrefusion:
    @pytest.mark.parametrize("masked", [0, -200, -1])
    def test_masked_rows_come_out_plain_and_change_nothing_else(self, fuse, masked):
        text, vision, fused = fuse([7, masked, 9, 11, masked])
        _, vision_without, fused_without = fuse([7, 9, 11])
        assert torch.equal(fused[[1, 4]], text[[1, 4]])
        torch.testing.assert_close(fused[[0, 2, 3]], fused_without, rtol=0, atol=1e-12)
        torch.testing.assert_close(vision, vision_without, rtol=0, atol=1e-12)

    def test_rows_see_what_lies_before_them_only(self, fuse):
        _, vision, fused = fuse([7, 9, 11])
        _, vision_other, other = fuse([7, 9, 12])
        torch.testing.assert_close(fused[:2], other[:2], rtol=0, atol=1e-12)
        torch.testing.assert_close(vision, vision_other, rtol=0, atol=1e-12)
        assert (fused[2] - other[2]).abs().max() > 0.1


class TestPrompts:
    def test_text_only_is_plain_embeddings(self, llama31):
        assert torch.equal(llama31.embed([5, 0, 7]), llama31.embed_tokens[[5, 0, 7]])

    def test_media_without_placeholder_fuses_the_text(self, llama31):
        pixels = torch.randn(1, 3, 336, 336, generator=torch.manual_seed(3))
        rows = llama31.embed([5, 6, 7], pixels)
        # The placeholder is seen by nobody, so the text rows are the same and only the vision row is missing.
        with_placeholder = llama31.embed([5, 6, 7, -200], pixels)
        assert rows.shape == (3, 256)
        torch.testing.assert_close(rows, with_placeholder[:3])

    @pytest.mark.parametrize(
        ("ids", "pixels", "message"),
        [
            ([5, -200, -200], torch.zeros(1, 3, 336, 336), "2 placeholders"),
            ([5, -200], None, "no pixels"),
            ([5, -200], torch.zeros(5, 3, 336, 336), r"\(1, 3, 336, 336\)"),
            ([5, -200], torch.zeros(0, 1, 3, 336, 336), r"\(frames, 1, 3, 336, 336\)"),
        ],
    )
    def test_refuses(self, llama31, ids, pixels, message):
        with pytest.raises(ValueError, match=message):
            llama31.embed(ids, pixels)

    def test_answer_ends_with_the_first_stop_id(self, llama31):
        rows = llama31.embed([5, 6, 7])
        free = llama31.answer(rows, 6, stop=False)
        stopping = Reference(cached("llama31", GOLDENS))
        stopping.config = replace(stopping.config, eos_token_ids=(free[2],))
        first = free.index(free[2])
        assert stopping.answer(rows, 6) == free[: first + 1]
        assert stopping.answer(rows, 6, stop=False) == free


class TestTower:
    """Which vision tower wins: told apart by one tensor."""

    KEY = "embeddings.class_embedding"
    INSIDE = f"model.vision_tower.vision_tower.vision_model.{KEY}"

    @pytest.fixture
    def checkpoint(self, tmp_path):
        """A checkpoint with a tower inside (ones) and one in clip/ (twos, names without `vision_model.`)."""

        def make(**config):
            save_file({self.INSIDE: torch.ones(4)}, tmp_path / "model.safetensors")
            (tmp_path / "clip").mkdir()
            save_file({self.KEY: torch.full((4,), 2.0)}, tmp_path / "clip" / "model.safetensors")
            (tmp_path / "clip" / "config.json").write_text(json.dumps({"hidden_act": "gelu"}))
            raw = LlavaMiniConfig.from_pretrained(cached("llama31", GOLDENS)).raw
            weights = reference.read_weights(tmp_path, torch.float32)
            return tmp_path, LlavaMiniConfig.from_dict({**raw, **config}), weights, torch.float32

        return make

    @pytest.mark.parametrize(
        ("config", "value", "act"),
        [
            ({"mm_vision_tower": "clip"}, 2.0, "gelu"),
            ({"mm_vision_tower": "clip", "unfreeze_mm_vision_tower": True}, 1.0, "gelu"),
            ({"mm_vision_tower": "somebody/else"}, 1.0, "quick_gelu"),
        ],
    )
    def test_choice(self, checkpoint, config, value, act):
        tower, settings = reference.find_tower(*checkpoint(**config))
        assert tower[self.KEY].unique().tolist() == [value]
        assert settings["hidden_act"] == act

    def test_inside_the_checkpoint_comes_before_the_working_directory(self, checkpoint, tmp_path_factory, monkeypatch):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "clip").mkdir()
        (elsewhere / "clip" / "config.json").write_text("{}")
        save_file({self.KEY: torch.full((4,), 3.0)}, elsewhere / "clip" / "model.safetensors")
        monkeypatch.chdir(elsewhere)
        tower, _ = reference.find_tower(*checkpoint(mm_vision_tower="clip"))
        assert tower[self.KEY].unique().tolist() == [2.0]

    def test_none_at_all(self, checkpoint):
        directory, config, _, dtype = checkpoint(mm_vision_tower="somebody/else")
        with pytest.raises(ValueError, match="somebody/else"):
            reference.find_tower(directory, config, {}, dtype)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        reference.read_weights(tmp_path, torch.float32)
