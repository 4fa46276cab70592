"""Where tensors come from: shards, .bin files, damage, and which vision tower wins."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_mini_fast as lmf
from llava_mini_fast import checkpoint as ckpt


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the smallest seeded checkpoint that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(checkpoint("llama31"), directory)
    return directory


def rewrite(directory, change):
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def same_model(a, b):
    ids, picture = [5, -200, 9, 11], lmf.image(torch.zeros(1, 3, 336, 336))
    return torch.equal(a.embed(ids, picture), b.embed(ids, picture)) and a.generate_ids(ids, picture) == b.generate_ids(
        ids, picture
    )


def test_shards_and_bin_files_load_like_one_file(copy, model):
    weights = load_file(copy / "model.safetensors")
    names = sorted(weights)
    (copy / "model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in halves.items():
        save_file({n: weights[n] for n in part}, copy / file)
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_model(lmf.load(copy), model("llama31"))

    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"places tensor \S+ in model-00002-of-00002.safetensors"):
        lmf.load(copy)

    for file in copy.glob("model*"):
        file.unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    assert same_model(lmf.load(copy), model("llama31"))


def test_bin_files_run_no_code(copy):
    class Payload:
        def __reduce__(self):
            return (print, ("code ran",))

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights_only"):
        lmf.load(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model.compressor.query",
        "model.prefusion_layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(copy, name):
    rewrite(copy, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lacks tensor {name}"):
        lmf.load(copy)


@pytest.mark.parametrize("name", ["model.mm_projector.0.weight", "model.embed_tokens.weight"])
def test_a_misshapen_tensor_is_named(copy, name):
    rewrite(copy, lambda weights: weights.update({name: torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(3, 4\); this config needs"):
        lmf.load(copy)


def test_a_truncated_file_names_the_tensor(copy):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=r"cut short: tensor \S+ ends beyond"):
        lmf.load(copy)
    file.write_bytes(data[:100])
    with pytest.raises(ValueError, match="cut short: its header"):
        lmf.load(copy)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a directory nor a model"):
        lmf.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither a directory nor a model"):
        ckpt.resolve("nobody/nothing")


def test_dtype_and_backend_are_checked(checkpoint):
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        lmf.load(checkpoint("llama31"), dtype="int8")
    with pytest.raises(ValueError, match="backend must be one of auto"):
        lmf.load(checkpoint("llama31"), backend="magic")


def inside(weights, tower):
    weights.update({ckpt.TOWER_PREFIX + name: tensor for name, tensor in tower.items()})


def test_the_towers_directory_wins_unless_the_tower_was_trained(copy, model):
    other = {name: tensor + 1 for name, tensor in load_file(copy / "clip/model.safetensors").items()}
    rewrite(copy, lambda weights: inside(weights, other))
    assert same_model(lmf.load(copy), model("llama31"))  # unfreeze_mm_vision_tower is false: clip/ wins

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": True}))
    assert not same_model(lmf.load(copy), model("llama31"))


def test_the_checkpoints_tower_serves_where_mm_vision_tower_cant_be_had(copy, model):
    tower = load_file(copy / "clip/model.safetensors")
    rewrite(copy, lambda weights: inside(weights, tower))
    shutil.rmtree(copy / "clip")
    assert same_model(lmf.load(copy), model("llama31"))  # its CLIP config is read off the shapes

    rewrite(copy, lambda weights: [weights.pop(n) for n in list(weights) if n.startswith(ckpt.TOWER_PREFIX)])
    with pytest.raises(FileNotFoundError, match="the vision tower can't be had"):
        lmf.load(copy)


def test_clip_names_without_the_old_prefix(copy, model):
    file = copy / "clip/model.safetensors"
    save_file({name.removeprefix("vision_model."): t for name, t in load_file(file).items()}, file)
    assert same_model(lmf.load(copy), model("llama31"))
