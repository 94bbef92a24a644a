"""The gate: a capsule is read back in another process before anyone may call it done.

The child process (``common.capsule.gate_child``) reads through memvid-sdk, the reader that users have, or through the
``memvid`` command for files that only this command can read. Where the native crate is installed it also compares
every frame and every vector with what was written. It is started early, so that its imports overlap with the writing,
and checks one capsule after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal

import msgspec

from common.capsule.process import Child, ChildLost
from common.errors import GateFailed

CHECK_SECONDS = 300.0
"""Longest one file may take: 170,000 frames with vectors take 3 s here."""


class FrameProbe(msgspec.Struct):
    """A frame that must come back by its uri as it was written."""

    uri: str
    title: str
    track: str | None
    """None where the writer loses it."""
    tags: list[str]
    text: str


class WordProbe(msgspec.Struct):
    """A word that must find a frame."""

    word: str
    uri: str


class VectorProbe(msgspec.Struct):
    """A vector that must be its own nearest neighbour."""

    values: list[float]
    uri: str


class GatePlan(msgspec.Struct, kw_only=True):
    """What one file must hold."""

    path: str
    frames: int
    exact: bool
    """False where the writer may add frames of its own (memvid-sdk cuts long documents into chunks)."""
    vectors: int
    reader: Literal["sdk", "cli"]
    frame_probes: list[FrameProbe]
    word_probes: list[WordProbe]
    vector_probes: list[VectorProbe]
    frames_sha256: str | None = None
    """What ``FrameDigest`` said of the frames that were written, or None for a writer that changes them."""
    vectors_sha256: str | None = None
    """SHA-256 of the float32 matrix of all vectors, or None as above."""


class FrameDigest:
    """SHA-256 over frames in order, however they are cut into batches."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._encode = msgspec.msgpack.Encoder().encode

    def add(self, rows: Iterable[tuple[str, str, str, list[str], str]]) -> None:
        """Add ``(uri, title, track, tags, text)`` of the next frames."""
        self._digest.update(b"".join(map(self._encode, rows)))

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._digest.hexdigest()


class GateAnswer(msgspec.Struct):
    """What the child says of a plan."""

    probe: str | None
    """None when all held, else which did not."""
    message: str
    probes: int


class Gate:
    """A gate process; use it as a context manager, for one capsule after the other."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def __enter__(self) -> Gate:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self) -> Child:
        """Start the process, if it does not run."""
        if self._child is None or not self._child.alive:
            self.close()
            self._child = Child("common.capsule.gate_child")
        return self._child

    def check(self, plan: GatePlan, should_stop: Callable[[], None], seconds: float = CHECK_SECONDS) -> int:
        """Read the file back and answer how many probes held.

        Raises GateFailed with the name of the probe that did not, or ``process`` where the child died or took longer
        than ``seconds``; and what ``should_stop`` raises.
        """
        try:
            data = self.start().ask(msgspec.msgpack.encode(plan), seconds, should_stop)
        except ChildLost as error:
            message = f"the process that reads the capsule back gave no answer: {error}"
            raise GateFailed(message, probe="process") from error
        answer = msgspec.msgpack.decode(data, type=GateAnswer)
        if answer.probe is not None:
            raise GateFailed(f"the capsule does not read back: {answer.message}", probe=answer.probe)
        return answer.probes

    def close(self) -> None:
        """End the process. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
