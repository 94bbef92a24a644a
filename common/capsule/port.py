"""The capsule writer port: what each of the three writers (native, sdk, cli) offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.contract import WriterName
from common.frames.model import Frame


class PartWriter(Protocol):
    """Writes one ``.mv2`` file; frames come in order and get their position as frame id."""

    def add(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """Append frames; ``vectors`` has one row for each of them that has an ``embed_text``, in order.

        Raises CapacityExceeded before anything over the limit is written, WriterFailed.
        """
        ...

    def finish(self) -> None:
        """Write the indexes, seal and fsync. The file is complete at its path only after this."""
        ...

    def abort(self) -> None:
        """Remove what was written. Idempotent; also right after ``finish``."""
        ...


class CapsuleWriter(Protocol):
    """Makes part writers."""

    name: WriterName

    def open(self, path: Path, *, timestamp: int, model: str | None, dimension: int | None) -> PartWriter:
        """Start a new file. ``timestamp`` (Unix seconds) is given to every frame."""
        ...
