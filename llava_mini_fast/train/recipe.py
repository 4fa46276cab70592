"""The two-stage recipe on transformers' Trainer (published: `train.py`, `scripts/`; paper section 5.1)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_mini_fast import checkpoint
from llava_mini_fast.config import LlavaMiniConfig
from llava_mini_fast.engine import LlavaMini
from llava_mini_fast.preprocess.views import normalize, views
from llava_mini_fast.train.data import example, read_entries
from llava_mini_fast.train.model import TrainableModel

PUBLISHED = {
    1: {"learning_rate": 1e-3, "num_train_epochs": 1},
    2: {"learning_rate": 1e-4, "num_train_epochs": 2, "projector_learning_rate": 1e-5},
}
"""What differs between the stages; both take batches of 256, 3 % warm-up, cosine decay, AdamW without weight decay."""
BATCH = 256
WARMUP = 0.03
MAX_GRAD_NORM = 0.5
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files that go from a checkpoint into the one trained from it, where they are there."""


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to leave it.

    `options` are more of transformers' `TrainingArguments`, or others in place of the recipe's: `deepspeed`, `bf16`,
    `save_steps`, `max_steps` and so on.
    """

    model: Path | str
    data: Path
    folder: Path
    out: Path
    stage: int
    batch: int = BATCH
    micro_batch: int = 16
    options: dict[str, Any] | None = None

    def arguments(self, processes: int = 1) -> Any:
        """The recipe as `TrainingArguments`.

        Raises:
            ValueError: an unknown stage, or a batch that micro-batches of all processes don't make up.
        """
        from transformers import TrainingArguments

        if self.stage not in PUBLISHED:
            raise ValueError(f"stage must be 1 or 2; got {self.stage!r}.")
        together = self.micro_batch * processes
        if self.batch % together:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch} times {processes} processes."
            )
        recipe = {key: value for key, value in PUBLISHED[self.stage].items() if key != "projector_learning_rate"}
        return TrainingArguments(
            **recipe
            | {
                "output_dir": str(self.out / "trainer"),
                "per_device_train_batch_size": self.micro_batch,
                "gradient_accumulation_steps": self.batch // together,
                "warmup_steps": WARMUP,  # below 1: a share of all steps
                "lr_scheduler_type": "cosine",
                "weight_decay": 0.0,
                "max_grad_norm": MAX_GRAD_NORM,
                "optim": "adamw_torch",
                "use_cpu": not torch.cuda.is_available(),
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "report_to": "none",
                "logging_steps": 1,
                "save_total_limit": 2,
                "dataloader_pin_memory": torch.cuda.is_available(),
            }
            | (self.options or {})
        )


class Conversations(Dataset):
    """A LLaVA-format file, tokenized and preprocessed on demand: item -> (ids, labels, uint8 views or None)."""

    def __init__(self, data: Path, folder: Path, tokenizer: Any, config: LlavaMiniConfig):
        self.entries, self.folder, self.tokenizer, self.config = read_entries(data), folder, tokenizer, config

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[list[int], list[int], Tensor | None]:
        one = example(self.tokenizer, self.entries[index], self.folder)
        return one.ids, one.labels, None if one.media is None else views(one.media, self.config).pixels


def collate(batch: Sequence[tuple[list[int], list[int], Tensor | None]]) -> dict[str, Any]:
    """Items of `Conversations` -> arguments of `TrainableModel.forward`."""
    shown = [pixels for _, _, pixels in batch if pixels is not None]
    places = iter(range(sum(map(len, shown))))
    return {
        "input_ids": [torch.tensor(ids) for ids, _, _ in batch],
        "labels": [torch.tensor(labels) for _, labels, _ in batch],
        "frames": [[] if pixels is None else [next(places) for _ in pixels] for _, _, pixels in batch],
        "pixels": torch.cat([normalize(pixels, torch.float32) for pixels in shown]) if shown else None,
    }


def train(job: Job) -> Path:
    """Train one stage and write the result, in the published format, to `job.out`.

    A run that was cut off goes on from its last saved step when it is started again with the same job.

    Returns:
        `job.out`.

    Raises:
        ImportError: accelerate is not installed (the extra `train`).
        FileExistsError: `job.out` holds a finished checkpoint.
        ValueError: as `read_entries`, `TrainableModel` and `Job.arguments`.
    """
    if (job.out / "config.json").is_file():
        raise FileExistsError(f"{job.out} holds a checkpoint already; name another directory.")
    directory = checkpoint.resolve(job.model)
    arguments = job.arguments(processes=_processes())
    torch.manual_seed(arguments.seed)
    engine = LlavaMini(directory, checkpoint.read_config(directory), arguments.device, torch.float32)
    model = TrainableModel(engine, job.stage)
    data = Conversations(job.data, job.folder, engine.tokenizer, engine.config)
    trainer = fit(model, arguments, data, collate, _optimizer(model, job.stage, arguments.learning_rate))
    if trainer.is_world_process_zero():
        write_published(engine, job.out)
    return job.out


def fit(
    model: TrainableModel,
    arguments: Any,
    data: Dataset,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    optimizer: torch.optim.Optimizer,
) -> Any:
    """Train a model, or go on from the last step that was saved in `arguments.output_dir`.

    Args:
        arguments: transformers' `TrainingArguments`.
        data: whose items `collate` makes arguments of `TrainableModel.forward` from.

    Returns:
        transformers' `Trainer`, done.
    """
    from transformers import Trainer

    # Trainer asks the model itself; autocast gives the 16-bit copies that a step computes with
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=data,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=_last_saved(Path(arguments.output_dir)))
    return trainer


def _last_saved(folder: Path) -> str | None:
    """The last checkpoint of a Trainer that is whole: its state is written after everything else, and to its end."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def write_published(engine: LlavaMini, out: Path) -> Path:
    """The engine's weights as a checkpoint in the published format, beside the config, tokenizer and vision tower that it
    was loaded with. Returns `out`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    source = engine.directory
    weights = engine.front.published_tensors() | engine.llm.state_dict()
    if engine.config.raw.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    tower = checkpoint.VisionTowerSource(source, engine.config)
    if not tower.inside:  # frozen, and found where the config says
        weights = {name: x for name, x in weights.items() if not name.startswith(checkpoint.TOWER_PREFIX)}
        if tower.tower_directory.resolve().is_relative_to(source.resolve()):
            shutil.copytree(tower.tower_directory, out / tower.tower_directory.relative_to(source), dirs_exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name in (*_CARRIED, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    # last, since its presence says that the checkpoint is whole
    (out / "config.json").write_text(json.dumps(engine.config.raw, indent=2) + "\n", encoding="utf-8")
    return out


def _optimizer(model: TrainableModel, stage: int, learning_rate: float) -> torch.optim.Optimizer:
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    projector = [p for name, p in learned.items() if name.startswith("front.mm_projector.")]
    others = [p for name, p in learned.items() if not name.startswith("front.mm_projector.")]
    groups = [{"params": projector, "lr": PUBLISHED[stage].get("projector_learning_rate", learning_rate)}]
    groups += [{"params": others, "lr": learning_rate}] if others else []
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _processes() -> int:
    """As torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
