"""The demo model's tower: dense targets that fit the picture, and a training that goes on where it stopped."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from llava_mini_fast.config import GRID, PATCH_SIZE
from llava_mini_fast.demo import tower as towers
from llava_mini_fast.demo.scenes import COLOURS, SHAPES, SIZES, Scene, Shape

SCENE = Scene((Shape("square", "blue", "large", 0.5, 0.25),), "plain", ((200, 200, 180), (200, 200, 180)), 1)


def test_targets_lie_under_their_patches():
    targets, cells = towers.under_patches(SCENE)
    targets = targets.view(GRID, GRID, 4)
    # a centre at a quarter of the height is in the top row, at half the width in its middle: the second place
    square = [SHAPES.index("square") + 1, list(COLOURS).index("blue") + 1, list(SIZES).index("large") + 1, 2]
    picture = np.asarray(SCENE.picture()).astype(int)
    blue = (picture == COLOURS["blue"]).all(-1).reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((1, 3))
    assert np.array_equal((targets[..., 0] > 0).numpy()[blue > 0.4], np.ones((blue > 0.4).sum(), dtype=bool))
    assert not targets[..., 0].numpy()[blue < 0.1].any()
    assert np.abs(cells.view(GRID, GRID, -1).mean(-1).numpy() - blue).max() < 0.2 and set(cells[0].tolist()) == {0.0}
    assert torch.equal(targets[int(0.25 * GRID), GRID // 2], torch.tensor(square))


def test_warm_up_then_cosine():
    rates = [towers.schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.2 and rates[4] == 1.0 and max(rates) == 1.0 and rates[-1] < 0.01
    assert all(a >= b for a, b in pairwise(rates[5:]))


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    seen = []
    towers.train_tower(tmp_path / "whole", 4, batch=2, save_every=2, progress=lambda step, loss: seen.append(loss))

    def cut(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        towers.train_tower(tmp_path / "cut", 4, batch=2, save_every=2, progress=cut)
    again = []
    out = towers.train_tower(
        tmp_path / "cut", 4, batch=2, save_every=2, progress=lambda step, loss: again.append((step, loss))
    )
    assert again == [(3, seen[2]), (4, seen[3])]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "clip" / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 128
    rates = towers.accuracy(towers.DenseTower(), 2)
    assert set(rates) == {"shape", "colour", "size", "place"} and all(0 <= rate <= 1 for rate in rates.values())
