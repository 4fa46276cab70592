"""How much an MP4's index lists, read before FFmpeg makes a table of it: 70 kB of a file can list sixty million frames."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

# FFmpeg looks for an index in the last two as well.
_FOLDERS = frozenset(b"moov trak mdia minf stbl edts moof traf mvex udta dinf meta wave free hoov".split())
_TABLES = frozenset(b"stsz stz2 stco co64 stsc stts elst hdlr trun".split())
_BOX = 4
"""Entries that a box counts as: its reading takes as much time."""
_PCM_SAMPLES = 160
"""FFmpeg indexes PCM sound in pieces of at least so many samples."""


@dataclass
class _Track:
    """What the boxes of one track say; of a box that comes twice, both."""

    samples: int = 0
    chunks: int = 0
    runs: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """Rows (number of the first chunk, samples in each, an id), each up to the next row's first chunk."""
    edits: int = 1
    handlers: set[bytes] = field(default_factory=set)
    steady: set[bool] = field(default_factory=set)
    """Whether each sample lasts for one tick, as PCM's do."""

    def entries(self) -> int:
        """Of FFmpeg's table, at most: an edit list may show a sample many times."""
        sound = bool(self.handlers & {b"soun", b"m1a "}) and True in self.steady
        certain = sound and not self.handlers & {b"vide", b"subp"} and False not in self.steady
        # the first row begins at 1, whatever it says
        firsts = np.concatenate([[1], self.runs[1:, 0], [self.chunks + 1]])
        lengths = np.diff(firsts)[: len(self.runs)]
        pieces = -(-self.runs[:, 1] // _PCM_SAMPLES)
        pcm = int((lengths * pieces).sum()) if (lengths >= 0).all() else self.chunks * int(pieces.max())
        return ((pcm if sound else 0) + (0 if certain else self.samples)) * self.edits


def entries_listed(file: BinaryIO, enough: int) -> int:
    """The entries that FFmpeg's table for the file will have at most, counted until there are more than `enough`.

    Of a file that is no MP4 (ISO/IEC 14496-12, QuickTime) this finds none. Each box counts as some too, so the time
    that this takes is bounded. A box that is cut off or contradicts itself is read as far as it goes.

    Args:
        file: at any position; left at any.
        enough: where to stop.
    """
    file.seek(0, 2)
    at, ends, done, track = 0, [file.tell()], 0, _Track()
    while ends and done <= enough:
        file.seek(at)
        head = file.read(16)
        if ends[-1] - at < 8 or len(head) < 8:
            at = ends.pop()
            continue
        done += _BOX
        size, kind = struct.unpack(">I4s", head[:8])
        start = at + 8
        if size == 1 and len(head) == 16:
            size, start = struct.unpack(">Q", head[8:])[0], at + 16
        end = min(at + size, ends[-1]) if size >= start - at else ends[-1]
        if kind == b"trak":
            done, track = done + track.entries(), _Track()
        if kind in _FOLDERS:
            at = start
            ends.append(end)
            continue
        if kind in _TABLES:
            file.seek(start)
            done += _read(kind, file, end - start, track)
        at = end
    return done + track.entries()


def _read(kind: bytes, file: BinaryIO, size: int, track: _Track) -> int:
    """Take what a box says of its track; returns the entries that belong to no track (a fragment's)."""

    def numbers(count: int) -> np.ndarray:
        data = file.read(max(0, min(4 * count, size))).ljust(4 * count, b"\0")
        return np.frombuffer(data, ">u4").astype(np.int64)

    if kind in (b"stsz", b"stz2"):
        track.samples = max(track.samples, int(numbers(3)[2]))
    elif kind in (b"stco", b"co64"):
        track.chunks = max(track.chunks, int(numbers(2)[1]))
    elif kind == b"stsc":
        rows = min(int(numbers(2)[1]), size // 12)
        track.runs = np.concatenate([track.runs, numbers(3 * rows).reshape(rows, 3)])
    elif kind == b"stts":
        _, rows, _, ticks = numbers(4)
        track.steady.add(bool(rows == 1 and ticks == 1))
    elif kind == b"elst":
        track.edits = max(track.edits, int(numbers(2)[1]))
    elif kind == b"hdlr":
        track.handlers.add(int(numbers(3)[2]).to_bytes(4, "big"))
    elif kind == b"trun":
        return int(numbers(2)[1])
    return 0
