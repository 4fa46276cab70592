"""Checkpoints of read-only goldens, where a link may be a text file that holds nothing but the path it stands for."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from llava_mini_fast.testing.checkpoints import cache_root

_LONGEST = 1024
"""Bytes of the longest file that can be a stand-in for a link."""


def mirror(source: Path) -> Path:
    """A directory in this user's temporary directory with real links to everything that `source` holds or stands for.

    The same source gives the same directory until one of its files changes.
    """
    files = dict(_files(source))
    state = repr([(name, str(path), path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()])
    out = cache_root() / f"{source.name}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if out.is_dir():
        return out
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    try:
        folder.rename(out)
    except OSError:  # another process was quicker
        shutil.rmtree(folder)
    return out


def follow(path: Path) -> Path:
    """Where a path leads: itself, or what it stands for when it is a small file that holds another path."""
    if path.is_file() and path.stat().st_size <= _LONGEST:
        text = path.read_bytes()
        if text.startswith(b"../") and b"\n" not in text.strip():
            target = path.parent / text.decode("utf-8", "replace").strip()
            if target.exists():
                return target.resolve()
    return path.resolve()


def _files(folder: Path, prefix: str = ""):
    """(name below the checkpoint, real file) of everything in a folder, links and stand-ins followed."""
    for entry in sorted(folder.iterdir()):
        target = follow(entry)
        if target.is_dir():
            yield from _files(target, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, target
