"""The demo model's vision tower: a small CLIP, trained to say what lies under each of its patches, and then frozen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from llava_mini_fast.config import GRID, PATCH_SIZE
from llava_mini_fast.demo.data import scenes
from llava_mini_fast.demo.scenes import COLOURS, PLACES, SHAPES, SIZE, SIZES, Scene, draw_shape
from llava_mini_fast.preprocess.views import normalize
from llava_mini_fast.testing.checkpoints import position_table

CONFIG = {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 336, "patch_size": PATCH_SIZE, "num_channels": 3,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128,
}  # fmt: skip
CROWD, LOOKED_AT, WHOLE = 6, 224, 0.15
"""Most of the training is on crowded scenes, of which only that many patches are looked at; the last share on whole ones."""
COVERED = 0.25
"""The share of a patch that a shape must cover to be what lies under it."""
TARGETS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": PLACES}
"""What is said of the shape under a patch, by attribute of `Shape`. A class is one more than the place in the tuple; 0 is the ground."""
CLASSES = tuple(len(values) + 1 for values in TARGETS.values())
CELLS = 7
"""Along one side of a patch. Which of a patch's cells a shape covers is learned too: outlines make forms tell apart."""


class DenseTower(nn.Module):
    """The tower and, for training alone, linear layers that say what `TARGETS` lists of each patch, and its outline."""

    def __init__(self):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(**CONFIG)
        config._attn_implementation = "sdpa"
        self.clip = CLIPVisionModel(config)
        self.clip.post_layernorm = nn.Identity()  # behind the output that is used
        self.head = nn.Linear(config.hidden_size, sum(CLASSES))
        self.outline = nn.Linear(config.hidden_size, CELLS * CELLS)
        # patches find their neighbours sooner where positions that lie close look alike from the start
        with torch.no_grad():
            positions = self.clip.embeddings.position_embedding.weight
            positions[1:] = 0.3 * torch.from_numpy(position_table(GRID, config.hidden_size))

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """What the layers say of patches.

        Args:
            pixels: (B, 3, 336, 336).
            kept: (B, K), which patches of each picture to look at; all 576 when None.

        Returns: logits (B, K, classes) of each of `TARGETS`, and of covered cells (B, K, 49).
        """
        rows = self.clip.embeddings(pixels)
        if kept is not None:
            rows = torch.cat([rows[:, :1], of_patches(rows[:, 1:], kept)], dim=1)
        features = self.clip.encoder(inputs_embeds=self.clip.pre_layrnorm(rows)).last_hidden_state[:, 1:]
        return list(self.head(features).split(CLASSES, dim=-1)), self.outline(features)

    def loss(self, pixels: Tensor, targets: Tensor, cells: Tensor, kept: Tensor | None = None) -> Tensor:
        """targets (B, 576, 4), cells (B, 576, 49) from 0 to 1, kept as in `forward`.

        The ground is most of a picture, so patches of shapes together count as much as it, and edges as much as the rest.
        """
        classes, outline = self(pixels, kept)
        if kept is not None:
            targets, cells = of_patches(targets, kept), of_patches(cells, kept)
        shown = _halves(targets[..., 0] > 0)
        losses = [
            (F.cross_entropy(logits.flatten(0, 1), targets[..., n].flatten(), reduction="none") * shown.flatten()).sum()
            for n, logits in enumerate(classes)
        ]
        covered = F.binary_cross_entropy_with_logits(outline, cells, reduction="none").mean(-1)
        edge = cells.mean(-1)
        return sum(losses) + (covered * _halves((edge > 0) & (edge < 1))).sum()


def of_patches(rows: Tensor, kept: Tensor) -> Tensor:
    """rows (B, N, D), kept (B, K) -> (B, K, D)."""
    return rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[-1]))


def most_covered(covered: Tensor, count: int) -> Tensor:
    """The patches to look at where only some are: those that shapes cover, and for the rest any.

    Args:
        covered: (B, 576) bool.

    Returns: (B, count) int64.
    """
    return (covered + torch.rand(covered.shape)).topk(count, dim=1).indices.sort(dim=1).values


def _halves(chosen: Tensor) -> Tensor:
    """Weights that sum to a half over what is chosen, and to a half over the rest."""
    chosen = chosen.float()
    return (chosen / chosen.sum().clamp(min=1) + (1 - chosen) / (1 - chosen).sum().clamp(min=1)) / 2


def under_patches(scene: Scene) -> tuple[Tensor, Tensor]:
    """What lies under each patch, row by row.

    Returns:
        (576, 4) int64, classes of `TARGETS`, 0 where the ground is; and (576, 49) float32, how far each cell is covered.
    """
    owner = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(owner)
    for index, shape in enumerate(scene.shapes, start=1):
        draw_shape(pen, shape, SIZE, index)
    pixels = np.asarray(owner)
    patches = pixels.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    # the ground is the shape of number 0, and lies under a patch of which no shape covers enough
    shares = np.stack([(patches == index).mean(1) for index in range(len(scene.shapes) + 1)])
    shares[0] = COVERED
    classes = np.array(
        [[0] * len(TARGETS)]
        + [[values.index(getattr(shape, name)) + 1 for name, values in TARGETS.items()] for shape in scene.shapes]
    )
    best = len(shares) - 1 - shares[::-1].argmax(0)
    size = PATCH_SIZE // CELLS
    cells = (pixels > 0).reshape(GRID, CELLS, size, GRID, CELLS, size).mean((2, 5)).transpose(0, 2, 1, 3)
    return (
        torch.from_numpy(classes[best]),
        torch.from_numpy(cells.reshape(GRID * GRID, -1)).float(),
    )


def batches(
    seed: int, size: int, split: str = "train", count: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels (B, 3, 336, 336), normalised, and what `under_patches` gives for each, endlessly; `count` as in `scenes`."""
    drawn = scenes(seed, split, count)
    while True:
        chosen = list(islice(drawn, size))
        pictures = torch.stack([torch.from_numpy(np.array(scene.picture())) for scene in chosen]).permute(0, 3, 1, 2)
        targets, cells = zip(*map(under_patches, chosen))
        yield normalize(pictures, torch.float32), torch.stack(targets), torch.stack(cells)


def train_tower(
    folder: Path,
    steps: int,
    batch: int = 8,
    learning_rate: float = 1e-3,
    save_every: int = 100,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train the tower and write it to `folder`/clip as transformers would. Goes on from `folder`/tower.pt where there is one.

    Args:
        folder: made where it isn't there.
        steps: of AdamW, with a warm-up of 5 % and cosine decay.
        progress: called with the number of steps done and the last loss.

    Returns:
        `folder`/clip.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tower, done = DenseTower(), 0
    optimizer = torch.optim.AdamW(tower.parameters(), learning_rate, weight_decay=0.01)
    saved = folder / "tower.pt"
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        tower.load_state_dict(state["tower"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["steps"]
    for step in range(done, steps):
        # all that is drawn in a step depends on its number alone, so a run that goes on sees what an unbroken one would
        torch.manual_seed(step)
        whole = step >= steps * (1 - WHOLE)
        drawn = next(batches(step, batch, count=None if whole else CROWD))
        kept = None if whole else most_covered(drawn[2].mean(-1) > 0, LOOKED_AT)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        loss = tower.loss(*drawn, kept)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            write_whole(saved, {"tower": tower.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1})
    return _write_clip(tower, folder / "clip")


def schedule(step: int, steps: int, warmup: float = 0.05) -> float:
    """The share of the learning rate at a step: linear warm-up, then half a cosine down to 0."""
    rise = max(1, int(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.no_grad()
def accuracy(tower: DenseTower, pictures: int = 64) -> dict[str, float]:
    """Over the patches of shapes in held-out scenes: how often each of `TARGETS` is named right."""
    pixels, targets, _ = next(batches(0, pictures, "held_out"))
    shown = targets[..., 0] > 0
    found = (logits.argmax(-1) for logits in tower(pixels)[0])
    triples = zip(TARGETS, found, targets.unbind(-1))
    return {name: (named == target)[shown].float().mean().item() for name, named, target in triples}


def write_whole(path: Path, value: Any) -> None:
    """torch.save that a crash can't leave half done."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def _write_clip(tower: DenseTower, out: Path) -> Path:
    from safetensors.torch import save_file

    out.mkdir(exist_ok=True)
    weights = {f"vision_model.{name}": tensor.contiguous() for name, tensor in tower.clip.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    return out
