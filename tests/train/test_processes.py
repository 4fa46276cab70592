"""Two processes through torchrun train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_mini_fast.checkpoint import Tensors
from llava_mini_fast.demo.data import make_data

pytest.importorskip("accelerate", reason="the extra `train` is not installed")
BIN = Path(sys.executable).parent


def trained(launcher, checkpoint, data, out, micro_batch, *more):
    command = [
        *launcher, BIN / "llava-mini", "train", checkpoint, data / "questions.json", "--stage", "2", "--out", out, "--batch", "4",
        "--micro-batch", micro_batch, "--epochs", "1", "--gradient-checkpointing", *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads(next((out / "trainer").glob("checkpoint-*/trainer_state.json")).read_text())
    return Tensors(out), [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["accelerate", "deepspeed"])
def test_two_processes_train_as_one(checkpoint, tmp_path, how):
    more = []
    if how == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed; no extra names it")
        page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
        (tmp_path / "deepspeed.json").write_text(page.split("```json")[1].split("```")[0])
        more = ["--deepspeed", tmp_path / "deepspeed.json"]
    data = make_data(tmp_path / "data", 7, 1, seed=3)
    torchrun = [BIN / "torchrun", "--nproc-per-node", "2", "--no-python"]
    one, losses = trained([], checkpoint("llama31"), data, tmp_path / "one", 4)
    two, losses_of_two = trained(torchrun, checkpoint("llama31"), data, tmp_path / "two", 2, *more)
    assert len(losses) == 2 and losses == pytest.approx(losses_of_two, rel=0.05)
    assert set(one.names()) == set(two.names())
    # the mean over a process's labels is not quite the mean over all, so steps differ a little, and Adam's first steps by sign
    for name in one.names():
        assert (one.get(name) - two.get(name)).abs().max() < 1e-3, name
    moved = [name for name in one.names() if not torch.equal(one.get(name), Tensors(checkpoint("llama31")).get(name))]
    assert moved
