"""Lays out Memvid capsules (.mv2) directly, and reads them back."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEMVID_CORE_VERSION: str

class NativeError(Exception):
    """The capsule could not be written or read."""

class CapacityError(NativeError):
    """The capsule would pass a size limit of Memvid."""

class CapsuleWriter:
    """Writes one capsule file. Raises NativeError, CapacityError and OSError."""

    def __init__(
        self,
        path: PathLike[str],
        *,
        timestamp: int,
        slice_frames: int,
        capacity: int,
        threads: int,
        model: str | None = None,
        dimension: int | None = None,
    ) -> None: ...
    def add(self, frames: Sequence[tuple[Any, ...]], vectors: NDArray[np.float32] | None = None) -> None:
        """Add frames, and a row of ``vectors`` for each that has an ``embed_text``."""
    def finish(self) -> tuple[int, int, int, int]:
        """Seal the file and answer ``(frames, vectors, payload_end, file_bytes)``."""
    def abort(self) -> None:
        """End the worker threads; the unfinished file stays for the caller to remove."""

class CapsuleReader:
    """Reads a capsule back. Raises NativeError and OSError."""

    def __init__(self, path: PathLike[str]) -> None: ...
    @property
    def frame_count(self) -> int: ...
    @property
    def model(self) -> str | None: ...
    def frames(self, start: int, count: int) -> list[tuple[str, str, str, list[str], str]]:
        """``(uri, title, track, tags, text)`` of frames ``start`` to ``start + count``."""
    def verify(self) -> None:
        """Compare all payloads and indexes with their checksums."""
    def vectors(self) -> tuple[list[int], int, bytes] | None:
        """``(frame of each row, dimension, rows)`` or None; a row is ``{u64 id, u64 length, f32…}``, little-endian."""

def memvid_core_commit(path: PathLike[str]) -> None:
    """Replace the indexes of a capsule by those that memvid-core builds itself, to compare with."""
