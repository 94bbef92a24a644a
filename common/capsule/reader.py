"""Reads a capsule back: frames with their text, and the vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.capsule.native import native
from common.contract import MALFORMED
from common.errors import CapsuleUnreadable
from common.frames.model import Frame

METADATA_PREFIX = "metadata="
BATCH = 1_024


class CapsuleReader:
    """One ``.mv2`` file, mapped into memory; frames and vectors are checked against their checksums as they are read.

    Raises CapsuleUnreadable for a file that is missing, damaged or not a capsule, and where the crate is not built.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if native is None:
            raise CapsuleUnreadable("reading capsules needs the native crate; install the extra `native`")
        try:
            self._inner = native.CapsuleReader(path)
        except (native.NativeError, OSError) as error:
            raise CapsuleUnreadable(f"{path.name}: {error}", path=str(path)) from error

    def __enter__(self) -> CapsuleReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        self._inner = None

    @property
    def frame_count(self) -> int:
        """How many frames it holds."""
        count: int = self._inner.frame_count
        return count

    def frames(self, start: int, count: int) -> list[Frame]:
        """Frames ``start`` to ``start + count`` (fewer at the end), with their metadata and no ``embed_text``."""
        try:
            rows = self._inner.frames(start, count)
        except native.NativeError as error:
            raise CapsuleUnreadable(f"{self.path.name}: {error}", path=str(self.path)) from error
        return [
            Frame(uri, title, track, _kind(uri), tags, text, _metadata(text)) for uri, title, track, tags, text in rows
        ]

    def all_frames(self) -> Iterator[list[Frame]]:
        """All frames in order, in batches."""
        for start in range(0, self.frame_count, BATCH):
            yield self.frames(start, BATCH)

    @property
    def model(self) -> str | None:
        """Name of the model that made the vectors, or None."""
        model: str | None = self._inner.model
        return model

    def verify(self) -> None:
        """Compare every payload, the time index, the lexical files and the vectors with their checksums."""
        try:
            self._inner.verify()
        except native.NativeError as error:
            raise CapsuleUnreadable(f"{self.path.name}: {error}", path=str(self.path)) from error

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Frame positions of shape (n,) and their vectors of shape (n, dimension), or None for a capsule without."""
        try:
            found = self._inner.vectors()
        except native.NativeError as error:
            raise CapsuleUnreadable(f"{self.path.name}: {error}", path=str(self.path)) from error
        if found is None:
            return None
        frames, dimension, rows = found
        row = np.dtype([("frame", "<i8"), ("length", "<i8"), ("values", "<f4", (dimension,))])
        table = np.frombuffer(rows, dtype=row)
        if not (table["length"] == dimension).all():
            raise CapsuleUnreadable(f"{self.path.name}: vectors of different lengths", path=str(self.path))
        return np.array(frames, dtype=np.int64), np.ascontiguousarray(table["values"], dtype=np.float32)


def properties(frame: Frame) -> dict[str, Any]:
    """The metadata of a frame. Raises CapsuleUnreadable."""
    try:
        return msgspec.json.decode(frame.metadata, type=dict[str, Any])
    except MALFORMED as error:
        raise CapsuleUnreadable(f"the metadata of a frame is malformed: {error}") from error


_KINDS = {"nodes": "node", "communities": "community", "processes": "process", "relations": "relation"}


def _kind(uri: str) -> str:
    """The kind of frame that a uri ``mv2://<what>/<id>`` names."""
    return _KINDS.get(uri.removeprefix("mv2://").partition("/")[0], "meta")


def _metadata(text: str) -> str:
    """The last line of a frame's text, which is its metadata; ``{}`` for a frame that is not ours."""
    last = text[text.rfind("\n") + 1 :]
    return last[len(METADATA_PREFIX) :] if last.startswith(METADATA_PREFIX) else "{}"
