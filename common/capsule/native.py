"""The native writer: the full direct layout of the crate in ``native/``."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.capsule.port import CAPACITY_BYTES, never
from common.contract import WriterName
from common.errors import CapacityExceeded, ExportError, StorageFailed, WriterFailed, WriterUnavailable
from common.frames.model import Frame

native: Any
"""The module of the crate, or None where it is not built: then the portable writer stands in for it."""
try:
    native = import_module("memvid_export_native")
except ImportError:
    native = None

LEXICAL_SEGMENTS = 10
"""Lexical segments a capsule is planned to have: enough for two and more cores, few enough to open fast."""
MIN_SLICE_FRAMES = 4_096
MAX_SLICE_FRAMES = 16_384


def slice_frames(expected_frames: int) -> int:
    """Frames in a lexical segment; depends on the plan alone, never on the machine, so that files are the same."""
    return min(MAX_SLICE_FRAMES, max(MIN_SLICE_FRAMES, -(-expected_frames // LEXICAL_SEGMENTS)))


def outcome_of(error: Exception, path: Path) -> ExportError:
    """A native error as one of ours."""
    if isinstance(error, native.CapacityError):
        return CapacityExceeded(str(error))
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return StorageFailed(f"{path.name}: {'no space left on device' if full else error.strerror or error}")
    if "os error" in str(error):  # memvid-core's own file operations
        return StorageFailed(f"{path.name}: {error}")
    return WriterFailed(f"{path.name}: {error}")


class NativePartWriter:
    """One file under way; see ``common.capsule.port.PartWriter``."""

    def __init__(
        self, path: Path, *, timestamp: int, model: str | None, dimension: int | None, slice_: int, capacity: int
    ) -> None:
        self._path = path
        try:
            self._inner = native.CapsuleWriter(
                path,
                timestamp=timestamp,
                slice_frames=slice_,
                capacity=capacity,
                threads=len(os.sched_getaffinity(0)),
                model=model,
                dimension=dimension,
            )
        except (native.NativeError, OSError) as error:
            raise outcome_of(error, path) from error

    def add(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """See the port."""
        try:
            self._inner.add(frames, vectors)
        except (native.NativeError, OSError) as error:
            raise outcome_of(error, self._path) from error

    def finish(self) -> None:
        """See the port."""
        try:
            self._inner.finish()
        except (native.NativeError, OSError) as error:
            raise outcome_of(error, self._path) from error

    def abort(self) -> None:
        """See the port."""
        self._inner.abort()


class NativeWriter:
    """Lays files out directly; see ``docs/capsule.md``."""

    name: WriterName = "native"
    readers = "memvid-sdk >= 2.0.160, memvid-core >= 2.0.140"
    takes_vectors = True
    exact = True
    batch = 512

    def __init__(self) -> None:
        if native is None:
            raise WriterUnavailable("the native writer is not built here; install the extra `native`")

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
    ) -> NativePartWriter:
        """See the port."""
        return NativePartWriter(
            path,
            timestamp=timestamp,
            model=model,
            dimension=dimension,
            slice_=slice_frames(expected_frames),
            capacity=capacity,
        )
