"""The recipe on transformers' Trainer: a run that is cut off ends as one that isn't, in a checkpoint that loads."""

import json

import pytest
import torch

import llava_mini_fast as lmf
from llava_mini_fast.checkpoint import Tensors
from llava_mini_fast.demo.data import make_data
from llava_mini_fast.train.recipe import Job, _last_saved, train

pytest.importorskip("accelerate", reason="the extra `train` is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("train") / "data", 3, 1, seed=2)


def job(checkpoint, data, out, stage=2, file="questions.json", **options):
    fixed = {"max_steps": 4, "save_steps": 2, "disable_tqdm": True}
    return Job(checkpoint("llama31"), data / file, data, out, stage, batch=2, micro_batch=1, options=fixed | options)


class Cut(Exception):
    """The power goes off."""


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(checkpoint, data, tmp_path, monkeypatch):
    from transformers import Trainer

    whole = Tensors(train(job(checkpoint, data, tmp_path / "whole")))
    step = Trainer.training_step

    def until_step_3(trainer, *arguments):
        if trainer.state.global_step == 3:
            raise Cut
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "training_step", until_step_3)
    with pytest.raises(Cut):
        train(job(checkpoint, data, tmp_path / "cut"))
    monkeypatch.undo()
    resumed = Tensors(train(job(checkpoint, data, tmp_path / "cut")))
    assert set(resumed.names()) == set(whole.names())
    assert all(torch.equal(resumed.get(name), whole.get(name)) for name in whole.names())
    history = [
        json.loads((tmp_path / name / "trainer" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for name in ("whole", "cut")
    ]
    losses = [[entry["loss"] for entry in one if "loss" in entry] for one in history]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        train(job(checkpoint, data, tmp_path / "whole"))


def test_only_whole_checkpoints_count(tmp_path):
    assert _last_saved(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (12, None), (14, ""), (16, '{"epoch": 1, "log_hi')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert _last_saved(tmp_path) == str(tmp_path / "checkpoint-10")


def test_stage_1_changes_the_projector_alone_and_the_result_is_served(checkpoint, data, tmp_path, golden):
    out = train(
        job(checkpoint, data, tmp_path / "one", stage=1, file="captions.json", max_steps=2, gradient_checkpointing=True)
    )
    before, after = Tensors(checkpoint("llama31")), Tensors(out)
    changed = {name for name in before.names() if not torch.equal(before.get(name), after.get(name))}
    assert set(before.names()) == set(after.names())
    assert changed and all(name.startswith("model.mm_projector.") for name in changed)
    row, trained, plain = golden("image"), lmf.load(out), lmf.load(checkpoint("llama31"))
    assert (trained.embed(row.prompt_ids, row.media) - plain.embed(row.prompt_ids, row.media)).abs().max() > 1e-4
    assert trained.tokenizer.decode([5]) == plain.tokenizer.decode([5])


def test_the_recipe_is_the_published_one(checkpoint, data, tmp_path):
    one = Job(checkpoint("llama31"), data, data, tmp_path, 1).arguments()
    two = Job(checkpoint("llama31"), data, data, tmp_path, 2).arguments(processes=4)
    assert (one.learning_rate, one.num_train_epochs, two.learning_rate, two.num_train_epochs) == (1e-3, 1, 1e-4, 2)
    for arguments, processes in ((one, 1), (two, 4)):
        together = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
        assert together == 256 and arguments.get_warmup_steps(1000) == 30 and arguments.weight_decay == 0
        assert arguments.lr_scheduler_type == "cosine" and arguments.max_grad_norm == 0.5
    with pytest.raises(ValueError, match="stage must be 1 or 2"):
        Job(checkpoint("llama31"), data, data, tmp_path, 3).arguments()
    with pytest.raises(ValueError, match="not a multiple"):
        Job(checkpoint("llama31"), data, data, tmp_path, 1, batch=10).arguments(processes=3)
