"""The demo model that comes with the package (docs/demo-model.md), how it was made, and what it is asked about."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = ("shapes.png", "moving.mp4")


def shipped() -> Path:
    """The demo model's checkpoint, which is installed with the package.

    Raises:
        FileNotFoundError: it isn't.
    """
    directory = Path(__file__).parent / "model"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"the demo model is not in {directory}; install the package whole, or name a checkpoint (--model)."
        )
    return directory


def examples() -> Path:
    """The repository's examples/, beside the package or below the current directory.

    Raises:
        FileNotFoundError: neither has all the files.
    """
    candidates = (Path(__file__).parents[2] / "examples", Path.cwd() / "examples")
    for folder in candidates:
        if all((folder / name).is_file() for name in EXAMPLES):
            return folder
    raise FileNotFoundError(
        f"examples/ with {' and '.join(EXAMPLES)} is not here; run this from a clone of the repository."
    )
