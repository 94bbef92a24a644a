"""The capsule writer port: what each of the three writers (native, sdk, cli) offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.contract import WriterName
from common.frames.model import Frame

CAPACITY_BYTES = 52_428_800
"""What Memvid's free tier holds: header, WAL and payloads, indexes not counted."""
MAX_INDEX_BYTES = 512 * 1024 * 1024
"""memvid reads no TOC and no index larger than this back."""


def never() -> None:
    """Do not stop."""


class PartWriter(Protocol):
    """Writes one ``.mv2`` file; frames come in order and get their position as frame id."""

    def add(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """Append frames; ``vectors`` has one row for each of them that has an ``embed_text``, in order.

        Raises CapacityExceeded, WriterFailed, StorageFailed.
        """
        ...

    def finish(self) -> None:
        """Write the indexes, seal and fsync; the file is complete only after this. Raises as ``add``."""
        ...

    def abort(self) -> None:
        """Stop; what was written is the caller's to remove. Idempotent, also right after ``finish``."""
        ...


class CapsuleWriter(Protocol):
    """Makes part writers."""

    name: WriterName
    readers: str
    """Which memvid versions read the files."""
    takes_vectors: bool
    exact: bool
    """Whether each frame comes back as it was handed over, and no other."""
    batch: int
    """Frames that one ``add`` takes at most, so that ``should_stop`` is asked in between."""

    def open(
        self,
        path: Path,
        *,
        timestamp: int,
        model: str | None,
        dimension: int | None,
        expected_frames: int,
        capacity: int = CAPACITY_BYTES,
        should_stop: Callable[[], None] = never,
    ) -> PartWriter:
        """Start a new file at ``path``, whose folder exists.

        ``timestamp`` (Unix seconds) is given to every frame; ``model`` and ``dimension`` are of the vectors, None
        without; ``expected_frames`` is the plan, which sizes the lexical segments; ``capacity`` bounds header, WAL and
        payloads. A writer that waits for a process calls ``should_stop`` meanwhile.
        """
        ...
