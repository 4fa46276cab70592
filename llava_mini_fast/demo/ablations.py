"""The paper's ablations on the demo data, each trained for the same number of steps (paper: Tables 5 to 7).

    python -m llava_mini_fast.demo.ablations build/demo-model --json bench/results/demo-ablations.json

Needs a folder in which `llava_mini_fast.demo.recipe` has made the tower. Pictures only: without compression a clip would
be thousands of rows for the language model.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_mini_fast.demo.exam import Task, exam, examine_features
from llava_mini_fast.demo.fresh import make_fresh
from llava_mini_fast.demo.lessons import Album
from llava_mini_fast.demo.questions import PICTURE_KINDS
from llava_mini_fast.demo.recipe import Part, Plan, learn, make_album, unpacked
from llava_mini_fast.demo.tutor import Tutored
from llava_mini_fast.ops.segments import Segments


class WithoutPreFusion(Tutored):
    """Text rows and compressed rows go to the language model as they are."""

    def _image_part(self, patches: Tensor, compressed: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        return compressed, []

    def _text_part(self, text: Tensor, segments: Segments, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        return text


class WithoutCompression(Tutored):
    """The language model sees all 576 patch rows of a picture, after pre-fusion, in place of compressed rows."""

    def _image_part(self, patches: Tensor, compressed: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        return super()._image_part(patches[:, :0], patches)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    vision_rows: int
    model: type[Tutored] = Tutored
    compressor_size: int = 1


BATCH = 8
"""Pictures of a step: half of the recipe's, so that all variants take about an hour on two cores."""
VARIANTS = (
    Variant("one vision token (C = 1)", 1),
    Variant("C = 2", 4, compressor_size=2),
    Variant("C = 4", 16, compressor_size=4),
    Variant("without pre-fusion", 1, WithoutPreFusion),
    Variant("without compression", 576, WithoutCompression),
)


def run(
    folder: Path, steps: tuple[int, ...], questions: int, plan: Plan, variants: tuple[Variant, ...] = VARIANTS
) -> list[dict[str, Any]]:
    """Train and examine the variants, each from the same fresh weights over the same lessons.

    A variant that was finished before is read from `folder`/ablations, not trained again.
    """
    out = folder / "ablations"
    rows = []
    for variant in variants:
        directory = out / variant.name.replace(" ", "-")
        done = directory / "result.json"
        if not done.is_file():
            done.parent.mkdir(parents=True, exist_ok=True)
            result = _one(
                folder, directory, variant, steps, exam(questions, split="held_out", kinds=PICTURE_KINDS), plan
            )
            done.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        rows.append(json.loads(done.read_text(encoding="utf-8")))
    return rows


def _one(
    folder: Path, directory: Path, variant: Variant, steps: tuple[int, ...], tasks: list[Task], plan: Plan
) -> dict[str, Any]:
    torch.manual_seed(0)
    fresh = make_fresh(directory / "fresh", folder / "tower" / "clip", {"compressor_size": variant.compressor_size})
    engine = unpacked(fresh)
    model = variant.model(engine)
    album = make_album(folder / "album", engine, plan.scenes, plan.clips)
    losses = learn(model, engine, album, plan, directory / "trainer", steps)
    shown = {task.subject.digest: task.subject for task in tasks}
    held_out = Album(folder / f"held-out-{len(tasks)}", engine.front.vision_tower, list(shown.values()), [])
    result = examine_features(model.eval(), engine.tokenizer, held_out, tasks)
    return {
        "variant": variant.name, "vision_rows": variant.vision_rows, "steps": steps, "last_loss": losses[-1] if losses else None,
        "accuracy": result.accuracy, "overall": result.overall, "majority": result.majority,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava_mini_fast.demo.ablations", description=__doc__)
    parser.add_argument("folder", type=Path, help="where `python -m llava_mini_fast.demo.recipe` has made the tower")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(1000, 200),
        metavar=("SOME", "WHOLE"),
        help="of training on some patches and on whole pictures, for each variant (default: 1000 200)",
    )
    parser.add_argument("--questions", type=int, default=900, help="of the exam (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only variants with this in their name")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table there")
    chosen = parser.parse_args(arguments)
    if not (chosen.folder / "tower" / "clip" / "config.json").is_file():
        parser.error(f"{chosen.folder} has no trained tower; run python -m llava_mini_fast.demo.recipe {chosen.folder}")
    variants = tuple(variant for variant in VARIANTS if chosen.only in variant.name)
    parts = Part(2, 1.5e-3, patches=100, turns=6, clips=0), Part(1, 5e-4, turns=6, clips=0)
    plan = replace(Plan(), parts=parts, batch=BATCH)
    rows = run(chosen.folder, tuple(chosen.steps), chosen.questions, plan, variants)
    for row in rows:
        shares = "  ".join(f"{kind} {share:.1%}" for kind, share in row["accuracy"].items())
        print(f"{row['variant']:<28}{row['vision_rows']:>4} rows  all {row['overall']:.1%}  {shares}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"steps": chosen.steps, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
