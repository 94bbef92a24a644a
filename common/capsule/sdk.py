"""The portable writer: memvid-sdk in a child process, for machines where the crate is not built.

About a thousand times slower than the native writer. Seen with memvid-sdk 2.0.160, and why the child does what it does:

- Vectors reach the file through ``put_many`` alone (``put_with_chunk_embeddings`` keeps those of chunks, and a text
  below 2,400 characters has none). It takes no track and no timestamp, so frames with a vector have neither.
- Vectors put before a WAL checkpoint inside one call are not found again: 91 of 300 in one call, none in calls below
  40 KiB.
- A text of 2,400 characters and more becomes chunk frames (``<uri>#page-1``, …) with white space normalised, and the
  frame itself stays empty: such a file holds more frames than were planned.
- memvid narrows a search by SimHash first in files that it wrote itself (their sketch track), however they were
  committed: of 785 words of 17 frames 223 do not find their frame (none in native files), while 25 words of a frame
  found each of 300. So no lexical entry is lost, searches are: the gate asks such files in 25 words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.capsule.port import CAPACITY_BYTES, never
from common.capsule.process import Child, ChildLost
from common.contract import WriterName
from common.errors import CapacityExceeded, StorageFailed, WriterFailed, WriterUnavailable
from common.frames.model import Frame

SECONDS_PER_FRAME = 2.0
"""Deadline of one batch: memvid-sdk needs 0.04 to 0.4 s a frame here; a hung put is ended after this many."""
SECONDS_PER_CALL = 60.0

_encode = msgspec.msgpack.Encoder().encode


class SdkAnswer(msgspec.Struct):
    """What the child says of a message: ``ok``, ``capacity``, ``storage`` or ``failed``."""

    outcome: str
    message: str = ""


class SdkPartWriter:
    """One file under way; see ``common.capsule.port.PartWriter``."""

    def __init__(
        self,
        path: Path,
        *,
        timestamp: int,
        vectors: bool,
        should_stop: Callable[[], None],
        seconds_per_call: float,
        seconds_per_frame: float,
    ) -> None:
        self._path = path
        self._timestamp = timestamp
        self._should_stop = should_stop
        self._seconds_per_call = seconds_per_call
        self._seconds_per_frame = seconds_per_frame
        self._frames = 0
        self._child = Child("common.capsule.sdk_child", str(path), "1" if vectors else "0")

    def _ask(self, message: object, frames: int) -> None:
        seconds = self._seconds_per_call + self._seconds_per_frame * frames
        try:
            answer = msgspec.msgpack.decode(
                self._child.ask(_encode(message), seconds, self._should_stop), type=SdkAnswer
            )
        except ChildLost as error:
            raise WriterFailed(f"{self._path.name}: memvid-sdk's process gave no answer: {error}") from error
        if answer.outcome != "ok":
            text = f"{self._path.name}: memvid-sdk: {answer.message}"
            raise {"capacity": CapacityExceeded, "storage": StorageFailed}.get(answer.outcome, WriterFailed)(text)

    def add(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """See the port."""
        rows = iter(vectors if vectors is not None else ())
        documents = [
            (frame, next(rows).tolist() if vectors is not None and frame.embed_text is not None else None)
            for frame in frames
        ]
        self._frames += len(frames)
        self._ask((self._timestamp, documents), len(frames))

    def finish(self) -> None:
        """See the port."""
        self._ask((self._timestamp, []), self._frames)
        self.abort()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def abort(self) -> None:
        """See the port."""
        self._child.close()


class SdkWriter:
    """Writes through memvid-sdk's own put."""

    name: WriterName = "sdk"
    readers = "memvid-sdk >= 2.0.160"
    takes_vectors = True
    exact = False
    batch = 64

    def __init__(
        self, *, seconds_per_call: float = SECONDS_PER_CALL, seconds_per_frame: float = SECONDS_PER_FRAME
    ) -> None:
        """A call that takes longer than this, and this for each of its frames, is ended."""
        if find_spec("memvid_sdk") is None:
            raise WriterUnavailable("memvid-sdk is not installed")
        self._seconds_per_call, self._seconds_per_frame = seconds_per_call, seconds_per_frame

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
    ) -> SdkPartWriter:
        """See the port; memvid-sdk keeps no model name for vectors that it did not make, and its own capacity."""
        return SdkPartWriter(
            path,
            timestamp=timestamp,
            vectors=dimension is not None,
            should_stop=should_stop,
            seconds_per_call=self._seconds_per_call,
            seconds_per_frame=self._seconds_per_frame,
        )
