import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.testing import checkpoints

GOLDENS = Path(__file__).parents[1] / "goldens"
DIGESTS = json.loads((GOLDENS / "recipes.sha256.json").read_text())


@pytest.mark.parametrize("name", DIGESTS)
def test_files_are_those_that_the_published_code_ran_on(name):
    directory = checkpoints.cached(name, GOLDENS)
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    assert files.keys() == DIGESTS[name].keys()
    for file, digest in DIGESTS[name].items():
        allowed = [digest] if isinstance(digest, str) else digest
        assert hashlib.sha256(files[file].read_bytes()).hexdigest() in allowed, file


def test_every_recipe_has_digests():
    assert checkpoints.recipes(GOLDENS).keys() == DIGESTS.keys()


def test_a_directory_without_recipes_uses_the_packages(tmp_path):
    assert checkpoints.recipes(tmp_path) == checkpoints.recipes()
    own = {"shared": {"seed": 1}, "checkpoints": {"mine": {"config": {}}}}
    (tmp_path / "recipes.json").write_text(json.dumps(own))
    assert checkpoints.recipes(tmp_path) == {"mine": {"seed": 1, "config": {}}}


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'llama32'; known: llama31,"):
        checkpoints.recipe_named("llama32")


@pytest.fixture
def small():
    """A recipe that takes a moment: hardly any vocabulary, one layer of each kind."""
    recipe = json.loads(json.dumps(checkpoints.recipe_named("llama31")))
    recipe["config"] |= {"vocab_size": 8, "num_hidden_layers": 1, "prefusion_layer_num": 1, "gain": 0.5}
    recipe["vision"] |= {"num_hidden_layers": 1}
    return recipe


def test_made_once_and_never_half(small, tmp_path):
    out = tmp_path / "deep" / "checkpoint"
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: checkpoints.make_checkpoint(small, out), range(3))) == {out}
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]
    before = (out / "model.safetensors").stat().st_mtime_ns
    checkpoints.make_checkpoint(small, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_nothing_is_left_of_a_failure(small, tmp_path):
    del small["config"]["eos_token_id"]
    with pytest.raises(KeyError):
        checkpoints.make_checkpoint(small, tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_a_directory_of_other_things_is_refused(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="choose another"):
        checkpoints.make_checkpoint(small, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_gain_scales_the_layers_and_stays_out_of_the_config(small, tmp_path):
    half = checkpoints.make_checkpoint(small, tmp_path / "half")
    small["config"]["gain"] = 1.0
    whole = checkpoints.make_checkpoint(small, tmp_path / "whole")
    assert "gain" not in json.loads((half / "config.json").read_text())
    a, b = (load_file(path / "model.safetensors") for path in (half, whole))
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(2 * a[name], b[name])
    np.testing.assert_array_equal(a["lm_head.weight"], b["lm_head.weight"])


def test_overrides_change_the_config_and_share_the_rest():
    plain = checkpoints.cached("llama31", GOLDENS)
    changed = checkpoints.cached("llama31", GOLDENS, {"tokenizer_model_max_length": 100})
    assert changed == checkpoints.cached("llama31", GOLDENS, {"tokenizer_model_max_length": 100}) != plain
    assert LlavaMiniConfig.from_pretrained(plain).max_rows == 2048
    assert LlavaMiniConfig.from_pretrained(changed).max_rows == 100
    assert (changed / "model.safetensors").resolve() == (plain / "model.safetensors").resolve()
    assert (changed / "clip" / "config.json").is_file()


def test_a_cache_of_someone_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.tempfile, "gettempdir", lambda: str(tmp_path))
    root = checkpoints.cache_root()
    assert root.parent == tmp_path
    assert root.stat().st_mode & 0o777 == 0o700
    owner = checkpoints.os.getuid()
    (tmp_path / f"llava-mini-fast-{owner + 1}").mkdir()
    monkeypatch.setattr(checkpoints.os, "getuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match="another user"):
        checkpoints.cache_root()
