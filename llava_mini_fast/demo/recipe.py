"""How the demo model is made from nothing: the tower on dense targets, then stage 2 over its stored features.

    python -m llava_mini_fast.demo.recipe build/demo-model

The language model is not pretrained, so stage 1, which fits a projector to one, has nothing to fit to: stage 2 learns
everything but the tower at ten times the published rate. Each part goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from llava_mini_fast import checkpoint
from llava_mini_fast.demo.data import clips, scenes
from llava_mini_fast.demo.fresh import make_fresh
from llava_mini_fast.demo.lessons import Album, Lessons
from llava_mini_fast.demo.tower import train_tower
from llava_mini_fast.demo.tutor import Tutored
from llava_mini_fast.engine import LlavaMini
from llava_mini_fast.train.recipe import fit, write_published


@dataclass(frozen=True)
class Part:
    """Some epochs of stage 2, with a warm-up and cosine decay of their own.

    `patches` of a picture's 576 are looked at (all when None). `turns` are the questions of a conversation, `clips` how many of the
    album's clips take part (all when None).
    """

    epochs: int
    learning_rate: float
    patches: int | None = None
    turns: int = 3
    clips: int | None = None


@dataclass(frozen=True)
class Plan:
    """How long each stage learns, and on how much."""

    tower_steps: int = 4500
    tower_batch: int = 8
    scenes: int = 6500
    clips: int = 3250
    parts: tuple[Part, ...] = (Part(4, 1e-3, patches=100, turns=6), Part(1, 5e-4, turns=4))
    batch: int = 15
    """Pictures and clips of a step; a picture brings two conversations."""
    warmup: float = 0.05
    save_steps: int = 100


def train_demo(folder: Path, plan: Plan | None = None) -> Path:
    """Make the demo model in `folder`, or go on making it.

    Args:
        folder: gets tower/, album/, fresh/ (untrained), stage2/, losses.json (of every tenth step of stage 2), trained/ (float32)
            and model/ (float16, what ships).

    Returns:
        `folder`/model.
    """
    plan = plan or Plan()
    with _bar("tower", plan.tower_steps) as shown:
        tower = train_tower(folder / "tower", plan.tower_steps, plan.tower_batch, progress=shown)
    fresh = folder / "fresh"
    if not (fresh / "config.json").is_file():
        make_fresh(fresh, tower)
    trained = folder / "trained"
    if not (trained / "config.json").is_file():
        engine = unpacked(fresh)
        album = make_album(folder / "album", engine, plan.scenes, plan.clips)
        losses = learn(Tutored(engine), engine, album, plan, folder / "stage2")
        (folder / "losses.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
        write_published(engine, trained)
    return halved(trained, folder / "model")


def unpacked(directory: Path) -> LlavaMini:
    """An engine in float32 that can be trained."""
    return LlavaMini(directory, checkpoint.read_config(directory), torch.device("cpu"), torch.float32)


def make_album(folder: Path, engine: LlavaMini, num_scenes: int, num_clips: int) -> Album:
    """Pictures and clips of the training split with their features, stored in `folder`."""
    drawn = list(islice(scenes(1, "train"), num_scenes)), list(islice(clips(1, "train"), num_clips))
    with _bar(f"features of {num_scenes} pictures and {num_clips} clips") as shown:
        return Album(folder, engine.front.vision_tower, *drawn, progress=shown)


def learn(
    model: Tutored, engine: LlavaMini, album: Album, plan: Plan, folder: Path, steps: Sequence[int] = ()
) -> list[float]:
    """Stage 2 of a model over an album, part by part of the plan.

    Args:
        folder: of the Trainers' own state.
        steps: of each part, where they are not to go through all of their epochs.

    Returns:
        The losses of every tenth step.
    """
    from transformers import TrainingArguments

    losses = []
    for number, part in enumerate(plan.parts):
        arguments = TrainingArguments(
            output_dir=str(folder / f"part-{number + 1}"),
            per_device_train_batch_size=plan.batch,
            num_train_epochs=1,  # the lessons count theirs themselves, for new questions each time
            max_steps=steps[number] if steps else -1,
            learning_rate=part.learning_rate,
            warmup_steps=plan.warmup,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            use_cpu=True,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            logging_steps=10,
            save_steps=plan.save_steps,
            save_total_limit=2,
            dataloader_pin_memory=False,
        )
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, part.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        subjects = [*album.scenes, *album.clips[: part.clips]]
        lessons = Lessons(album, subjects, engine.tokenizer, part.epochs, number, part.turns, part.patches)
        trainer = fit(model, arguments, lessons, lessons.collate, optimizer)
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses


def halved(source: Path, out: Path) -> Path:
    """A checkpoint's copy with float16 weights, tower included. Returns `out`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out, dirs_exist_ok=True)
    for path in (out / "model.safetensors", out / "clip" / "model.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return out


@contextmanager
def _bar(text: str, total: int | None = None):
    """A progress bar on stderr; the block gets a function of steps done (and a loss to show)."""
    from tqdm import tqdm

    with tqdm(desc=text, total=total) as bar:

        def shown(done: int, loss: float | None = None) -> None:
            if loss is None:
                bar.update(done)
            else:
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update(done - bar.n)

        yield shown


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava_mini_fast.demo.recipe", description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything goes; started again, the command goes on from it")
    chosen = parser.parse_args(arguments)
    print(f"the demo model: {train_demo(chosen.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
